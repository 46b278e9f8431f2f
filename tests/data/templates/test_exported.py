"""Exported chat templates make, in any server, the prompts that training made."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swift_dist.config.finetune import TemplateSection
from swift_dist.data.rows import BadRowError, Row
from swift_dist.data.templates.exported import agent_of, as_trained, drops_thinking, exported_tokenizer
from swift_dist.data.templates.template import Template
from tests.data.templates.cases import T
from tests.data.templates.tiny import JINJA, answer, made_with, system, user

TEXT = 'Say "yes" {% if x %} {{ y }} #} \\n\tünï 😀 %}'
SECTIONS = (
    TemplateSection(system=TEXT),
    TemplateSection(thinking="drop"),
    TemplateSection(system="Be brief.", agent="hermes", thinking="drop"),
    TemplateSection(agent="react"),
    TemplateSection(system="Be brief.", agent="toolbench"),
    TemplateSection(agent="qwen"),
)
ROWS = (
    Row((user("Hi"), answer("Hello."))),
    Row((user("Hi"), answer("Hello.")), tools=T),
    Row((system("Mine."), user("Hi"), answer("Hello.")), tools=T),
    Row((user("Hi"), answer("Hello."), user("Bye"), answer("Bye."))),
    Row((user("Hi"), answer("<think>\nGreet them.\n</think>\n\nHello."))),
)


def prompt_of_training(row: Row, tokenizer: Any, section: TemplateSection) -> list[int]:
    """The ids before the last answer, as training has them."""
    (encoded,) = Template(tokenizer, section).encode_all(row)
    learns = np.flatnonzero(np.diff((encoded.weights > 0).astype(int), prepend=0) == 1)
    return encoded.ids[: learns[-1]].tolist()


@pytest.mark.parametrize("file", sorted(JINJA.glob("*.jinja")), ids=lambda file: file.stem)
def test_prompts_are_those_of_training(file: Path) -> None:
    source, compared = file.read_text(), 0
    for section in SECTIONS:
        tokenizer = made_with(source)
        exported = exported_tokenizer(copy.deepcopy(tokenizer), section)
        for row in ROWS:
            if row.tools and section.agent == "none":
                continue  # as the template itself has them
            try:
                expected = prompt_of_training(row, tokenizer, section)
            except (BadRowError, ValueError):  # refused, or learnt in several sequences
                continue
            found = exported.apply_chat_template(
                list(row.messages[:-1]),
                tools=list(row.tools) or None,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
            assert found == expected, (section, row)
            compared += 1
    assert compared


def test_what_a_request_says_itself_counts_more() -> None:
    source = (JINJA / "qwen3.jinja").read_text()
    plain, section = made_with(source), TemplateSection(system="Be brief.", thinking="drop")
    exported = exported_tokenizer(copy.deepcopy(plain), section)
    for messages in ([system("Mine."), user("Hi")], [system(""), user("Hi")], [user("Hi")]):
        given = {"add_generation_prompt": True, "tokenize": False, "enable_thinking": True}
        own = messages if messages[0]["role"] == "system" else [system("Be brief."), *messages]
        assert exported.apply_chat_template(messages, **given) == plain.apply_chat_template(own, **given)
    assert '"developer"' not in as_trained(source, section)  # a server would think that the model knows that role


def test_what_is_written_once_is_not_written_again() -> None:
    source = (JINJA / "qwen3.jinja").read_text()
    assert as_trained(source, TemplateSection(truncation="left", date="2026-01-01")) == source
    for section in SECTIONS:
        once = as_trained(source, section)
        assert as_trained(once, section) == once and as_trained(once, TemplateSection()) == once
    react = as_trained(source, TemplateSection(agent="react"))
    further = as_trained(react, TemplateSection(system="Be brief."))
    assert agent_of(further) == "react" and agent_of(source) is None and not drops_thinking(further)
    assert drops_thinking(as_trained(react, TemplateSection(thinking="drop"))) and not drops_thinking(source)


def test_each_of_several_templates_is_written() -> None:
    tokenizer = made_with(None)
    assert exported_tokenizer(tokenizer, SECTIONS[0]).chat_template is None
    source = (JINJA / "chatml.jinja").read_text()
    tokenizer.chat_template = {"default": source, "tool_use": source}
    found = exported_tokenizer(tokenizer, SECTIONS[0]).chat_template
    assert set(found.values()) == {as_trained(source, SECTIONS[0])}
