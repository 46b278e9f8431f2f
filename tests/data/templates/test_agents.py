"""Tools in conversations of models whose chat template does not know them."""

from __future__ import annotations

import pytest

from swift_dist.data.rows import BadRowError, Row
from tests.data.templates.cases import ONE, QWEN_CALL, QWEN_RESULT, T
from tests.data.templates.tiny import answer, call, result, shown, system, template, user

TALK = (
    system("Be brief."),
    user("Hi"),
    call("Thought: ask"),
    result('{"t": 3}'),
    answer("Thought: so\nFinal Answer: cold"),
    user("Bye"),
    answer("Bye."),
)
END = "<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n⟦Bye.<|im_end|>⟧\n"


def shown_by(agent: str, row: Row, name: str = "chatml", **section) -> str:
    made = template(name, agent=agent, **section)
    return shown(made, made.encode(row))


def test_hermes_is_what_qwen_2_5_writes_itself():
    messages = (system("Be brief."), user("Hi"), call("So."), result("3"), result("4"), answer("Cold."), *ONE)
    row = Row(messages, tools=T)
    assert shown_by("hermes", row) == shown_by("none", row, "qwen2_5")


def test_hermes_without_a_system_message():
    text = shown_by("hermes", Row((user("Hi"), call(), result('{"t": 3}'), answer("Cold.")), tools=T))
    assert text.startswith("<|im_start|>system\n# Tools\n\nYou may call")
    assert text.endswith(
        f"<|im_start|>assistant\n⟦{QWEN_CALL}<|im_end|>⟧\n<|im_start|>user\n{QWEN_RESULT}<|im_end|>\n"
        "<|im_start|>assistant\n⟦Cold.<|im_end|>⟧\n"
    )


@pytest.mark.parametrize("agent", ["react", "toolbench"])
def test_react_goes_on_in_the_same_turn_and_does_not_learn_results(agent: str):
    text = shown_by(agent, Row(TALK, tools=T))
    assert text.endswith(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        '⟦Thought: ask\nAction: get_weather\nAction Input: {"city": "Oslo"}\nObservation:⟧ {"t": 3}\n'
        "⟦Thought: so\nFinal Answer: cold<|im_end|>⟧" + END.removeprefix("<|im_end|>")
    )
    head = text[: text.index("<|im_start|>user")]
    assert head.startswith("<|im_start|>system\nBe brief.\n\n") and '"name": "get_weather"' in head
    assert ("one of [get_weather]" in head) == (agent == "react") and "⟦" not in head


def test_qwen_agent():
    text = shown_by("qwen", Row(TALK, tools=T))
    assert text.endswith(
        '⟦Thought: ask\n✿FUNCTION✿: get_weather\n✿ARGS✿: {"city": "Oslo"}\n✿RESULT✿:⟧ {"t": 3}\n✿RETURN✿:'
        "⟦ Thought: so\nFinal Answer: cold<|im_end|>⟧" + END.removeprefix("<|im_end|>")
    )
    assert "### get_weather\n\nget_weather: The weather now Parameters: {" in text


def test_several_calls_and_results():
    two = {**call(), "tool_calls": call()["tool_calls"] * 2}
    text = shown_by("react", Row((user("Hi"), two, result("3"), result("4"), answer("Cold.")), tools=T))
    one = 'Action: get_weather\nAction Input: {"city": "Oslo"}\n'
    assert text.endswith(f"⟦{one}{one}Observation:⟧ 3\nObservation: 4\n⟦Cold.<|im_end|>⟧\n")


def test_turn_that_waits_for_a_result_does_not_learn_to_end():
    text = shown_by("react", Row((user("Hi"), call()), tools=T))
    assert text.endswith("\nObservation:⟧<|im_end|>\n")


def test_weights_inside_a_turn_of_several_messages():
    messages = (user("Hi"), call("Thought: ask", loss=0), result("3"), answer("Thought: so"))
    assert shown_by("react", Row(messages, tools=T)).endswith("Observation: 3\n⟦Thought: so<|im_end|>⟧\n")
    made = template("chatml", agent="react", loss_scale="react")
    encoded = made.encode(Row(TALK, tools=T))
    pieces: dict[float, str] = {0.0: "", 1.0: "", 2.0: ""}
    for token, weight in zip(encoded.ids.tolist(), encoded.weights.tolist(), strict=True):
        pieces[weight] += made.tokenizer.decode([token])
    assert pieces[2.0] == 'Action: get_weather\nAction Input: {"city": "Oslo"}\nObservation:'
    assert pieces[1.0].startswith("Thought: ask\nThought: so\nFinal Answer: cold")


def test_answer_that_goes_on_after_a_result_of_the_prompt():
    row = Row((user("Hi"), call(), result("3"), answer("Cold.")), rejected=(answer("Warm."),), tools=T, num_answer=1)
    made = template("chatml", agent="react")
    chosen, rejected = (shown(made, encoded) for encoded in made.encode_pair(row))
    assert chosen.endswith("Observation: 3\n⟦Cold.<|im_end|>⟧\n") and chosen.count("⟦") == 1
    assert rejected.endswith("Observation: 3\n⟦Warm.<|im_end|>⟧\n") and rejected.count("⟦") == 1


def test_conversations_without_tools_are_left_as_they_are():
    for agent in ("react", "hermes", "toolbench", "qwen"):
        assert shown_by(agent, Row(ONE)) == shown_by("none", Row(ONE))


def test_result_without_a_call_is_refused():
    with pytest.raises(BadRowError, match="follows no call"):
        shown_by("react", Row((user("Hi"), result("3"), answer("Cold.")), tools=T))


def test_template_that_takes_a_turn_apart_with_results_is_refused():
    row = Row((user("Hi"), call(), result("3"), answer("<think>a</think>Cold.")), tools=T)
    with pytest.raises(BadRowError, match="leaves out a part of the answer"):
        shown_by("react", row, "qwen3")
