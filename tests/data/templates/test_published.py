"""Every chat template that TRL ships, by the one rule: a turn learns once, behind what generation is asked with."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from swift_dist.config.finetune import TemplateSection
from swift_dist.data.rows import BadRowError, Row
from swift_dist.data.templates.template import Template, _clean
from swift_dist.errors import JobError
from tests.data.templates.cases import CALLS, T
from tests.data.templates.test_rewritten import AGENT, TALK
from tests.data.templates.tiny import answer, made_with, user

spec = find_spec("trl")
assert spec and spec.origin
FILES = sorted((Path(spec.origin).parent / "chat_templates").glob("*.jinja"))
PICTURES = ("idefics3", "llava_next", "smolvlm")  # their messages are lists of parts
ROWS = (
    Row(TALK),
    Row((*TALK[:2], user("Bye"), answer("Bye.", reasoning_content="Part."))),
    Row((user("Hi"), answer("Hello."), user("Bye"), answer("Bye."))),
    Row(CALLS, tools=T),
    Row(AGENT, tools=T),
)


@pytest.mark.parametrize("thinking", ["keep", pytest.param("drop", marks=pytest.mark.table)])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_turns_learn_once_behind_their_prompts(file: Path, thinking: str):
    made = Template(made_with(file.read_text()), TemplateSection(thinking=thinking), name=file.stem)
    if file.stem.startswith(PICTURES):
        with pytest.raises(JobError):
            made.check()
        return
    made.check()
    learnt = sum(_check(made, row) for row in ROWS)
    assert learnt or (thinking == "drop" and file.stem.startswith("deepseek"))


def _check(made: Template, row: Row) -> bool:
    """Compare with prompts and turns rendered one by one; False where the row is refused."""
    try:
        sequences = made.encode_all(row)
    except BadRowError:
        return False
    messages, tools = made._prepared(row.messages, row.tools, 0)
    clean = [_clean(message) for message in messages]
    asked: dict[tuple[int, ...], str] = {}
    for k, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = made._renderer.text(clean[:k], tools, prompt=True)
            ids = made.tokenizer(prompt, add_special_tokens=False)["input_ids"]
            asked[tuple(ids)] = made._renderer.text(clean[: k + 1], tools).removeprefix(prompt)
    for encoded in sequences:
        for start, end in np.flatnonzero(np.diff(encoded.weights, prepend=0, append=0)).reshape(-1, 2):
            written = asked.pop(tuple(encoded.ids[:start].tolist()))
            text = made.tokenizer.decode(encoded.ids[start:end])
            assert text.endswith(made._renderer.ends)
            known = made._renderer.quirk
            assert written.startswith(text) or (known and (known.answer or known.next_header_ends or text in written))
    assert not asked
    return True
