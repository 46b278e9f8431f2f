"""Conversations and what must become of them, written by hand: ⟦ ⟧ holds what the assistant would generate.

A text that begins with … stands for the end of the conversation's text (the tools' description is before it).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.data.templates.tiny import WEATHER, answer, call, result, system, user


@dataclass(frozen=True)
class Case:
    template: str
    messages: tuple[dict[str, Any], ...]
    expected: str
    tools: tuple[dict[str, Any], ...] = ()
    section: dict[str, Any] = field(default_factory=dict)


ONE = (user("Hi"), answer("Hello."))
TWO = (user("Hi"), answer("Hello."), user("How?"), answer("Fine."))
SYSTEM = (system("Be brief."), *ONE)
THINKS = (user("Hi"), answer("Hello.", reasoning_content="Greet them."))
OPEN = (*ONE, user("How?"))
NAMELESS = {"role": "tool", "tool_call_id": "abcdefghi", "content": "3"}
CALLS = (user("Hi"), call(), result('{"t": 3}'), answer("Cold."))
T = (WEATHER,)


def chatml(header: str, *turns: str) -> str:
    """ChatML with the assistant's turns marked."""
    roles = ("user", "assistant")
    texts = [
        f"<|im_start|>{roles[k % 2]}\n" + (f"⟦{turn}<|im_end|>⟧\n" if k % 2 else f"{turn}<|im_end|>\n")
        for k, turn in enumerate(turns)
    ]
    return header + "".join(texts)


def sep(role: str, text: str) -> str:
    return f"<|im_start|>{role}<|im_sep|>{text}<|im_end|>"


BRIEF = "<|im_start|>system\nBe brief.<|im_end|>\n"
QWEN = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
QWEN_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
QWEN_RESULT = '<tool_response>\n{"t": 3}\n</tool_response>'
LLAMA31 = (
    "<s><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: 26 Jul 2024\n\nBe brief.<|eot_id|>"
)
NO_THOUGHT = "<think>\n\n</think>\n\n"


def llama(*turns: str) -> str:
    roles = ("user", "assistant")
    texts = [
        f"<|start_header_id|>{roles[k % 2]}<|end_header_id|>\n\n"
        + (f"⟦{turn}<|eot_id|>⟧" if k % 2 else f"{turn}<|eot_id|>")
        for k, turn in enumerate(turns)
    ]
    return "".join(texts)


def phi(*turns: str) -> str:
    roles = ("user", "assistant")
    texts = [
        f"<|{roles[k % 2]}|>\n" + (f"⟦{turn}<|end|>⟧\n" if k % 2 else f"{turn}<|end|>\n")
        for k, turn in enumerate(turns)
    ]
    return "".join(texts) + "</s>"


def gemma(*turns: str) -> str:
    roles = ("user", "model")
    texts = [
        f"<start_of_turn>{roles[k % 2]}\n" + (f"⟦{turn}<end_of_turn>⟧\n" if k % 2 else f"{turn}<end_of_turn>\n")
        for k, turn in enumerate(turns)
    ]
    return "<s>" + "".join(texts)


GPT_OSS_TURNS = "…<|end|><|start|>user<|message|>Hi<|end|><|start|>assistant"

CASES = (
    Case("chatml", ONE, chatml("", "Hi", "Hello.")),
    Case("chatml", TWO, chatml("", "Hi", "Hello.", "How?", "Fine.")),
    Case("chatml", SYSTEM, chatml(BRIEF, "Hi", "Hello.")),
    Case("chatml", OPEN, chatml("", "Hi", "Hello.", "How?")),
    Case("chatml", THINKS, chatml("", "Hi", "<think>\nGreet them.\n</think>\n\nHello.")),
    Case("chatml", THINKS, chatml("", "Hi", "Hello."), section={"thinking": "drop"}),
    Case("chatml", ONE, chatml(BRIEF, "Hi", "Hello."), section={"system": "Be brief."}),
    Case("chatml", SYSTEM, chatml(BRIEF, "Hi", "Hello."), section={"system": "Another."}),
    Case("llama3", TWO, "<s>" + llama("Hi", "Hello.", "How?", "Fine.")),
    Case("llama3", (user("Hi"), answer("\n\nHello. ")), "<s>" + llama("Hi", "Hello.")),
    Case("llama3_1", (system("Be brief."), *TWO), LLAMA31 + llama("Hi", "Hello.", "How?", "Fine.")),
    Case(
        "llama3_1",
        CALLS,
        "…Hi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        '⟦{"name": "get_weather", "parameters": {"city": "Oslo"}}<|eot_id|>⟧'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"{\\"t\\": 3}"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Cold.<|eot_id|>⟧",
        T,
    ),
    Case("qwen2_5", TWO, chatml(QWEN, "Hi", "Hello.", "How?", "Fine.")),
    Case("qwen2_5", SYSTEM, chatml(BRIEF, "Hi", "Hello.")),
    Case("qwen2_5", CALLS, "…</tool_call><|im_end|>\n" + chatml("", "Hi", QWEN_CALL, QWEN_RESULT, "Cold."), T),
    Case("qwen3", ONE, chatml("", "Hi", NO_THOUGHT + "Hello.")),
    Case("qwen3", THINKS, chatml("", "Hi", "<think>\nGreet them.\n</think>\n\nHello.")),
    Case(
        "qwen3",
        (user("Hi"), answer("<think>Greet them.</think>Hello.")),
        chatml("", "Hi", "<think>\nGreet them.\n</think>\n\nHello."),
    ),
    # Told that there is no thinking, the template puts the empty block into the generation prompt.
    Case(
        "qwen3",
        THINKS,
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n" + NO_THOUGHT + "⟦Hello.<|im_end|>⟧\n",
        section={"thinking": "drop"},
    ),
    Case(
        "qwen3",
        TWO,
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        + chatml("", "How?", NO_THOUGHT + "Fine."),
        section={"loss_scale": "last_round"},
    ),
    Case(
        "qwen3",
        (user("Hi"), call(reasoning_content="Ask."), result('{"t": 3}'), answer("Cold.", reasoning_content="So.")),
        "…</tool_call><|im_end|>\n"
        + chatml(
            "",
            "Hi",
            f"<think>\nAsk.\n</think>\n\n{QWEN_CALL}",
            QWEN_RESULT,
            "<think>\nSo.\n</think>\n\nCold.",
        ),
        T,
        {"loss_scale": "last_round"},
    ),
    Case("qwen3_training", TWO, chatml("", "Hi", NO_THOUGHT + "Hello.", "How?", NO_THOUGHT + "Fine.")),
    Case("qwen3_instruct_2507", TWO, chatml("", "Hi", "Hello.", "How?", "Fine.")),
    Case(
        "qwen3_instruct_2507", CALLS, "…</tool_call><|im_end|>\n" + chatml("", "Hi", QWEN_CALL, QWEN_RESULT, "Cold."), T
    ),
    Case(
        "qwen3_5_think",
        THINKS,
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n⟦Greet them.\n</think>\n\nHello.<|im_end|>⟧\n",
    ),
    Case(
        "qwen3_5_think",
        ONE,
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n" + NO_THOUGHT + "⟦Hello.<|im_end|>⟧\n",
        section={"thinking": "drop"},
    ),
    Case("gemma", TWO, gemma("Hi", "Hello.", "How?", "Fine.")),
    Case("gemma3", (system("Be brief."), *TWO), gemma("Be brief.\n\nHi", "Hello.", "How?", "Fine.")),
    # Its last mark holds what stands behind the end of the turn.
    Case("phi3_training", TWO, phi("Hi", "Hello.", "How?", "Fine.")),
    Case("phi3", TWO, phi("Hi", "Hello.", "How?", "Fine.")),
    Case("phi3_5", SYSTEM, "<|system|>\nBe brief.<|end|>\n" + phi("Hi", "Hello.")),
    Case("mistral_v0_2", TWO, "<s>[INST] Hi [/INST]⟦Hello.</s>⟧[INST] How? [/INST]⟦Fine.</s>⟧"),
    Case(
        "deepseek_v2",
        (system("Be brief."), *TWO),
        "<s>Be brief.\n\nUser: Hi\n\nAssistant:⟦ Hello.</s>⟧User: How?\n\nAssistant:⟦ Fine.</s>⟧",
    ),
    Case(
        "deepseek_r1_distill",
        THINKS,
        "<s><｜User｜>Hi<｜Assistant｜><think>\n⟦Greet them.\n</think>\n\nHello.<｜end▁of▁sentence｜>⟧",
    ),
    Case(
        "deepseek_r1_distill",
        (*ONE, user("How?"), answer("<think>\nPolite.\n</think>\n\nFine.")),
        "<s><｜User｜>Hi<｜Assistant｜>Hello.<｜end▁of▁sentence｜><｜User｜>How?<｜Assistant｜><think>\n"
        "⟦Polite.\n</think>\n\nFine.<｜end▁of▁sentence｜>⟧",
        section={"loss_scale": "last_round"},
    ),
    Case(
        "deepseek_r1_distill_training",
        THINKS,
        "<s><｜User｜>Hi<｜Assistant｜><think>\n⟦Greet them.\n</think>\n\nHello.<｜end▁of▁sentence｜>⟧",
    ),
    # Without thinking, an answer does not begin as the prompt does, which opens the thinking.
    Case(
        "nemotron_3_super",
        THINKS,
        "…<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n⟦Greet them.\n</think>\nHello.<|im_end|>⟧\n",
    ),
    Case(
        "nemotron_3_super",
        ONE,
        "…<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think></think>⟦Hello.<|im_end|>⟧\n",
        section={"thinking": "drop"},
    ),
    # Gemma 4 ends a call with the token that the result begins with.
    Case(
        "gemma4_v5",
        CALLS,
        '…<|turn>model\n⟦<|tool_call>call:get_weather{city:<|"|>Oslo<|"|>}<tool_call|><|tool_response>⟧'
        'response:get_weather{value:<|"|>{"t": 3}<|"|>}<tool_response|>⟦Cold.<turn|>⟧\n',
        T,
    ),
    # GLM ends its turn with the token of the next one.
    Case(
        "glm4moe",
        TWO,
        "[gMASK]<sop><|user|>\nHi<|assistant|>⟦\n<think></think>\nHello.<|user|>⟧\nHow?<|assistant|>"
        "⟦\n<think></think>\nFine.<|user|>⟧",
    ),
    Case("glm4moe", THINKS, "[gMASK]<sop><|user|>\nHi<|assistant|>⟦\n<think>Greet them.</think>\nHello.<|user|>⟧"),
    Case(
        "glm4moe",
        CALLS,
        "…<|user|>\nHi<|assistant|>⟦\n<think></think>\n<tool_call>get_weather\n<arg_key>city</arg_key>\n"
        "<arg_value>Oslo</arg_value>\n</tool_call><|observation|>⟧\n"
        '<tool_response>\n{"t": 3}\n</tool_response><|assistant|>⟦\n<think></think>\nCold.<|user|>⟧',
        T,
    ),
    Case(
        "glm4moe",
        CALLS[:2],
        "…<|user|>\nHi<|assistant|>⟦\n<think></think>\n<tool_call>get_weather\n<arg_key>city</arg_key>\n"
        "<arg_value>Oslo</arg_value>\n</tool_call><|observation|>⟧",
        T,
    ),
    Case("glm4moe_training", ONE, "[gMASK]<sop><|user|>\nHi<|assistant|>⟦\n<think></think>\nHello.<|user|>⟧"),
    Case(
        "cohere",
        (system("Be brief."), *TWO),
        "<s><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be brief.<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
        "⟦Hello.<|END_OF_TURN_TOKEN|>⟧<|START_OF_TURN_TOKEN|><|USER_TOKEN|>How?<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦Fine.<|END_OF_TURN_TOKEN|>⟧",
    ),
    Case(
        "lfm2_v2",
        CALLS,
        "…<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "⟦<|tool_call_start|>[get_weather(city='Oslo')]<|tool_call_end|><|im_end|>⟧\n<|im_start|>tool\n"
        '<|tool_response_start|>{"t": 3}<|tool_response_end|><|im_end|>\n<|im_start|>assistant\n⟦Cold.<|im_end|>⟧\n',
        T,
    ),
    Case(
        "phi4_like",
        SYSTEM,
        f"{sep('system', 'Be brief.')}{sep('user', 'Hi')}<|im_start|>assistant<|im_sep|>⟦Hello.<|im_end|>⟧",
    ),
    Case("hermes_2_pro_like", TWO, "<s>" + chatml("", "Hi", "Hello.", "How?", "Fine.")),
    Case(
        "hermes_2_pro_like",
        (user("Hi"), call(), NAMELESS, answer("Cold.")),
        "…<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        '⟦<tool_call>\n{"arguments": {"city": "Oslo"}, "name": "get_weather"}\n</tool_call> <|im_end|>⟧\n'
        '<|im_start|>tool\n<tool_response>\n{"name": "get_weather", "content": "3"}\n</tool_response> <|im_end|>\n'
        "<|im_start|>assistant\n⟦Cold.<|im_end|>⟧\n",
        T,
    ),
    Case("internlm2_like", (system("Be brief."), *TWO), "<s>" + chatml(BRIEF, "Hi", "Hello.", "How?", "Fine.")),
    Case(
        "internlm2_like",
        CALLS,
        "…<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        '⟦<|action_start|><|plugin|>\n{"name": "get_weather", "parameters": {"city": "Oslo"}}<|action_end|>'
        "<|im_end|>⟧\n"
        '<|im_start|>environment name=<|plugin|>\n{"t": 3}<|im_end|>\n<|im_start|>assistant\n⟦Cold.<|im_end|>⟧\n',
        T,
    ),
    Case("gptoss", ONE, GPT_OSS_TURNS + "⟦<|channel|>final<|message|>Hello.<|return|>⟧"),
    Case(
        "gptoss",
        THINKS,
        GPT_OSS_TURNS
        + "⟦<|channel|>analysis<|message|>Greet them.<|end|>"
        + "<|start|>assistant<|channel|>final<|message|>Hello.<|return|>⟧",
    ),
    Case(
        "gptoss",
        CALLS,
        GPT_OSS_TURNS + '⟦ to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>⟧'
        '<|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>"{\\"t\\": 3}"<|end|>'
        "<|start|>assistant⟦<|channel|>final<|message|>Cold.<|return|>⟧",
        T,
    ),
)
