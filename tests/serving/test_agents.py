"""The agent formats as chat templates write what training taught, and its calls are read back."""

from __future__ import annotations

import importlib
import json
import random

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from swift_dist.config.finetune import TemplateSection
from swift_dist.data.templates.exported import as_trained
from swift_dist.plugins import find
from swift_dist.serving.agents import FORMATS, TOOL_PARSERS, agent_template
from swift_dist.serving.engines.choose import find_engine
from swift_dist.serving.families import ROOM
from swift_dist.serving.options import EngineOptions, ServedModel
from swift_dist.serving.tool_parsers.base import Call

BASE = (
    "\n{% for m in messages %}<{{ m.role }}>{{ m.content }}</>\n{% endfor %}{{ tools }}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}\n"
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "description": 'dé "x" <&>',
            "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
        },
    },
    {"type": "function", "function": {"name": "g", "parameters": {}}},
]


def rendered(messages, tools=None, template=BASE, prompt=False):
    return render_jinja_template(
        conversations=[messages], tools=tools, chat_template=template, add_generation_prompt=prompt
    )[0][0]


def conversation(rng: random.Random) -> list[dict]:
    messages: list[dict] = [{"role": "system", "content": "sys"}] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": f"q{rng.randint(0, 9)}"})
        for _ in range(rng.randint(0, 3)):
            calls = [
                {"type": "function", "function": {"name": rng.choice("fg"), "arguments": {"a": f'ü"{k}<'}}}
                for k in range(rng.randint(1, 2))
            ]
            messages.append({"role": "assistant", "content": rng.choice(["", " think "]), "tool_calls": calls})
            messages += [{"role": "tool", "content": f" r{rng.randint(0, 9)} "} for _ in calls]
        if rng.random() < 0.7:
            messages.append({"role": "assistant", "content": " answer "})
    return messages


@pytest.mark.parametrize("name", FORMATS)
def test_the_prompt_is_the_one_of_training(name):
    """Also where a result is the last message: then the model goes on in the turn that called."""
    write = importlib.import_module(f"swift_dist.data.templates.agents.{name}").render
    template, within_turn = agent_template(name, BASE), 0
    for seed in range(200):
        rng = random.Random(seed)
        messages, tools = conversation(rng), TOOLS if rng.random() < 0.8 else []
        taught = [{key: message[key] for key in ("role", "content")} for message in write(messages, tools)]
        if messages[-1]["role"] == "tool" and name != "hermes":
            within_turn += 1
            expected = rendered(taught[:-1], prompt=True) + taught[-1]["content"]
            assert rendered(messages, tools, template) == expected
        else:
            assert rendered(messages, tools, template) == rendered(taught)
        assert rendered(messages, tools, template, prompt=True).startswith(rendered(messages, tools, template)[:20])
    assert within_turn > 20 or name == "hermes"


@pytest.mark.parametrize("inner", FORMATS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_format_around_another_writes_what_it_writes_alone(name, inner):
    """As with --agent_format of a model whose export has one, or a run that goes on from such an export."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    messages.append({"role": "tool", "content": "r42"})
    alone = rendered(messages, TOOLS, agent_template(name, BASE), prompt=True)
    assert "r42" in alone
    assert rendered(messages, TOOLS, agent_template(name, agent_template(inner, BASE)), prompt=True) == alone


@pytest.mark.parametrize("name", FORMATS)
def test_the_calls_of_training_are_read_back(name):
    write = importlib.import_module(f"swift_dist.data.templates.agents.{name}").render
    calls = [
        {"function": {"name": "f", "arguments": {"a": 'ü "quoted"\n', "b": [1, {"c": None}]}}},
        {"function": {"name": "g", "arguments": {}}},
    ]
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "thinking", "tool_calls": calls}]
    answer = write(messages, TOOLS)[-1]["content"]
    parser = find(ROOM, TOOL_PARSERS[name], "PARSER")({})
    answer = min((answer.partition(stop)[0] for stop in parser.stop), key=len, default=answer)
    events = [*parser.feed(answer), *parser.finish()]
    assert [event for event in events if isinstance(event, str)] == ["thinking"]
    found = [(event.name, json.loads(event.arguments)) for event in events if isinstance(event, Call)]
    assert found == [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


def test_a_result_that_no_call_asked_for_is_refused():
    with pytest.raises(Exception, match="follows no call"):
        rendered([{"role": "tool", "content": "r"}], TOOLS, agent_template("react", BASE))


def test_vllm_reads_what_a_run_was_trained_to_write(tmp_path):
    """The template of an export says how calls are written, and that no thinking is to be told from answers."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "dtype": "bfloat16"}')

    def words(template: str) -> dict[str, str]:
        (tmp_path / "chat_template.jinja").write_text(template)
        asked = find_engine("vllm").command(ServedModel("chat", str(tmp_path), EngineOptions()), "127.0.0.1", 1)
        return dict(zip(asked, [*asked[1:], ""], strict=True))

    plain = "{% if enable_thinking %}<think></think>{% endif %}<tool_call>"
    trained = words(as_trained(plain, TemplateSection(agent="react", thinking="drop")))
    assert trained["--tool-call-parser"] == "react" and trained["--tool-parser-plugin"].endswith("vllm_agents.py")
    assert not {"--reasoning-parser", "--chat-template"} & trained.keys()
    own = words(plain)
    assert (own["--tool-call-parser"], own["--reasoning-parser"]) == ("hermes", "qwen3")
    assert "--tool-parser-plugin" not in own
