"""Turns that the template rewrites when more messages follow: each learns once, from a text that ends with it or keeps
it as it was generated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swift_dist.data.rows import BadRowError, Row
from tests.data.templates.cases import CALLS, GPT_OSS_TURNS, NO_THOUGHT, ONE, QWEN_CALL, QWEN_RESULT, TWO, T, chatml
from tests.data.templates.tiny import answer, call, result, shown, template, tokenizer, user

TALK = (
    user("Hi"),
    answer("Hello.", reasoning_content="Greet."),
    user("How?"),
    answer("Fine.", reasoning_content="Polite."),
    user("Bye"),
    answer("Bye.", reasoning_content="Part."),
)
AGENT = (
    user("Hi"),
    call(reasoning_content="Ask."),
    result("3"),
    answer("Cold.", reasoning_content="So."),
    user("Bye"),
    answer("Bye."),
)


def texts(name: str, messages: Any, tools: Any = (), **section: Any) -> list[str]:
    made = template(name, **section)
    return [shown(made, encoded) for encoded in made.encode_all(Row(tuple(messages), tools=tools))]


def plain(*turns: str) -> str:
    """ChatML in which nothing learns."""
    return chatml("", *turns).replace("⟦", "").replace("⟧", "")


def think(thought: str, text: str) -> str:
    return f"<think>\n{thought}\n</think>\n\n{text}"


def test_a_sequence_for_each_round_of_qwen3():
    assert texts("qwen3", TALK) == [
        chatml("", "Hi", think("Greet.", "Hello.")),
        plain("Hi", "Hello.") + chatml("", "How?", think("Polite.", "Fine.")),
        plain("Hi", "Hello.", "How?", "Fine.") + chatml("", "Bye", think("Part.", "Bye.")),
    ]
    assert texts("qwen3", TWO) == [
        chatml("", "Hi", NO_THOUGHT + "Hello."),
        plain("Hi", "Hello.") + chatml("", "How?", NO_THOUGHT + "Fine."),
    ]


def test_turns_of_one_round_share_a_sequence_where_they_keep_their_text():
    tools, *rounds = texts("qwen3", AGENT, T)[0].split("</tool_call><|im_end|>\n", 1)
    calls = chatml("", "Hi", think("Ask.", QWEN_CALL), QWEN_RESULT.replace('{"t": 3}', "3"), think("So.", "Cold."))
    assert rounds == [calls] and "⟦" not in tools
    (_, last) = texts("qwen3", AGENT, T)
    earlier = calls.replace("⟦", "").replace("⟧", "").replace(think("Ask.", ""), "").replace(think("So.", ""), "")
    assert last.endswith("<|im_end|>\n" + earlier + chatml("", "Bye", NO_THOUGHT + "Bye."))
    # A call without thinking is written with an empty block as long as nothing follows it.
    first, second = texts("qwen3", CALLS, T)
    assert first.endswith(chatml("", "Hi", NO_THOUGHT + QWEN_CALL))
    assert second.endswith(
        plain("Hi", QWEN_CALL, QWEN_RESULT) + "<|im_start|>assistant\n⟦" + NO_THOUGHT + "Cold.<|im_end|>⟧\n"
    )


def test_families_with_quirks():
    begin, turn = "<｜User｜>Hi<｜Assistant｜>", "<think>\n⟦{}\n</think>\n\n{}<｜end▁of▁sentence｜>⟧"
    assert texts("deepseek_r1_distill", TALK[:4]) == [
        "<s>" + begin + turn.format("Greet.", "Hello."),
        "<s>" + begin + "Hello.<｜end▁of▁sentence｜><｜User｜>How?<｜Assistant｜>" + turn.format("Polite.", "Fine."),
    ]
    begin = "[gMASK]<sop><|user|>\nHi<|assistant|>"
    assert texts("glm4moe", TALK[:4]) == [
        begin + "⟦\n<think>Greet.</think>\nHello.<|user|>⟧",
        begin + "\n<think></think>\nHello.<|user|>\nHow?<|assistant|>⟦\n<think>Polite.</think>\nFine.<|user|>⟧",
    ]
    first, second = texts("gptoss", TWO)
    begin = GPT_OSS_TURNS.removeprefix("…")
    assert first.endswith(begin + "⟦<|channel|>final<|message|>Hello.<|return|>⟧")
    assert second.endswith(
        begin + "<|channel|>final<|message|>Hello.<|end|><|start|>user<|message|>How?<|end|><|start|>assistant"
        "⟦<|channel|>final<|message|>Fine.<|return|>⟧"
    )


def test_answer_before_which_the_template_leaves_thinking_out():
    """gpt-oss: asked for the answer, the model still sees what it thought before the call."""
    thought = (user("Hi"), call(reasoning_content="Ask."), result("3"), answer("Cold.", reasoning_content="So."))
    called = (
        "⟦<|channel|>analysis<|message|>Ask.<|end|><|start|>assistant to=functions.get_weather<|channel|>commentary "
        'json<|message|>{"city": "Oslo"}<|call|>⟧<|start|>functions.get_weather to=assistant<|channel|>commentary'
        '<|message|>"3"<|end|><|start|>assistant'
    )
    final = "<|channel|>final<|message|>Cold.<|return|>⟧"
    (text,) = texts("gptoss", thought, T)
    assert text.endswith(
        GPT_OSS_TURNS.removeprefix("…<|end|>")
        + called
        + "⟦<|channel|>analysis<|message|>So.<|end|><|start|>assistant"
        + final
    )
    first, last = texts("gptoss", (*thought[:3], answer("Cold."), user("Bye"), answer("Bye.")), T)
    assert first.endswith(called + "⟦" + final) and last.count("⟦") == 1 and "analysis<|message|>" not in last


def test_marks_are_not_believed_where_thinking_is_left_out():
    assert texts("lfm2_2_5_v2", TALK[:4]) == [
        "<s>" + chatml("", "Hi", "<think>Greet.</think>Hello."),
        "<s>" + plain("Hi", "Hello.") + chatml("", "How?", "<think>Polite.</think>Fine."),
    ]
    assert texts("glm4moe_training", TALK[:4]) == texts("glm4moe", TALK[:4])
    with pytest.raises(BadRowError, match="answer 1: the chat template rewrites this turn"):
        texts("lfm2_2_5_v2", TALK[:4], rewritten_turns="refuse")


def test_templates_that_keep_turns_give_one_sequence():
    for name in ("chatml", "llama3", "qwen2_5", "qwen3_training"):
        assert len(texts(name, TWO)) == 1
    assert texts("qwen3", TWO, thinking="drop", loss_scale="last_round") == [
        plain("Hi", "Hello.")
        + "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n"
        + NO_THOUGHT
        + "⟦Fine.<|im_end|>⟧\n"
    ]


def test_only_turns_that_learn_take_a_sequence():
    silent = (TALK[0], {**TALK[1], "loss": False}, *TALK[2:])
    assert texts("qwen3", silent) == texts("qwen3", TALK)[1:]
    # What follows the last turn that learns is left out: nothing there would learn.
    assert texts("qwen3", (*TALK[:4], user("Bye"))) == texts("qwen3", TALK)[:2]
    assert texts("qwen3", (*TALK[:5], {**TALK[5], "loss": 0})) == texts("qwen3", TALK)[:2]
    assert texts("deepseek_r1_distill", (*TALK[:2], user("How?"))) == texts("deepseek_r1_distill", TALK[:2])
    weights = template("qwen3").encode_all(Row((TALK[0], {**TALK[1], "loss": 0.25}, *TALK[2:4])))
    assert [set(encoded.weights.tolist()) for encoded in weights] == [{0.0, 0.25}, {0.0, 1.0}]


def test_rows_that_are_one_sequence_are_refused_as_before():
    with pytest.raises(BadRowError, match="answer 1: the chat template rewrites this turn"):
        template("qwen3", rewritten_turns="refuse").encode_all(Row(TWO))
    with pytest.raises(BadRowError, match="answer 1: the chat template rewrites"):
        template("qwen3").encode_pair(Row(CALLS, rejected=(answer("No."),), num_answer=3, tools=T))
    (encoded,) = template("qwen3", loss_scale="all").encode_all(Row(TWO))  # in several, each token would learn twice
    assert encoded.weights[1:].all()
    with pytest.raises(BadRowError, match="no thinking"):  # one turn that cannot be learnt leaves the row out
        template("deepseek_r1_distill").encode_all(Row((*ONE, *TALK[2:4])))


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    messages = []
    word = st.sampled_from(["Hi", "cold", "你好 🙂", "a\n\nb", "1 + 1", "<b>", "wait..."])
    for _ in range(draw(st.integers(1, 3))):
        messages.append(user(draw(word)))
        thoughts = {"reasoning_content": "why " + draw(word)} if draw(st.booleans()) else {}
        for _ in range(draw(st.integers(0, 2))):
            messages += [call(**thoughts), result(draw(word))]
        messages.append(answer(draw(word) + ".", **thoughts))
    return messages


@pytest.mark.parametrize("name", ["qwen3", "glm4moe", "qwen2_5"])
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(messages=conversations())
def test_every_turn_learns_once_behind_what_generation_is_asked_with(name: str, messages: list[dict[str, Any]]):
    """Against transformers' own rendering: a learning run begins where a prompt ends, and holds what follows it."""
    made, asked = template(name), {}
    if name == "qwen2_5":
        messages = [{key: value for key, value in m.items() if key != "reasoning_content"} for m in messages]
    render = tokenizer(name).apply_chat_template
    for k, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = render(messages[:k], tools=list(T), add_generation_prompt=True, return_dict=False)
            asked[tuple(prompt)] = render(messages[: k + 1], tools=list(T), return_dict=False)[len(prompt) :]
    for encoded in made.encode_all(Row(tuple(messages), tools=T)):
        edges = np.flatnonzero(np.diff(encoded.weights, prepend=0, append=0))
        for start, end in edges.reshape(-1, 2):
            generated = asked.pop(tuple(encoded.ids[:start].tolist()))
            learnt = encoded.ids[start:end].tolist()
            if name == "glm4moe":  # ends with the token of the next turn, which is not rendered yet
                assert learnt[:-1] == generated and made.tokenizer.decode(learnt[-1:]).startswith("<|")
            else:
                assert learnt == generated[: len(learnt)] and made.tokenizer.decode(learnt[-1:]) == "<|im_end|>"
    assert not asked
