"""Which characters of a rendered conversation the assistant would generate.

The rule: asked with the messages before a turn and the generation prompt, the model would write the turn's text and
then the token that ends it. So a turn's span begins where ``text(messages[:k], prompt)`` ends and goes up to and
including the token at which generation stops; the header before it and what the template adds behind it (a newline
after ``<|im_end|>``) are given. Both texts must be beginnings of the whole conversation's text: a template that
rewrites earlier turns (leaves their thinking out, say) shows the model a turn that it would not have generated, and
such a turn cannot learn. A template's own ``{% generation %}`` marks are believed where they agree with this rule on a
plain answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from swift_dist.data.rows.base import BadRowError
from swift_dist.data.templates.renderer import Renderer

Message = dict[str, Any]

_THINK_TAGS = re.compile(r"</?think>")


@dataclass(frozen=True)
class Spans:
    """Args:
    text: the whole conversation as the model sees it.
    spans: message number -> [first character, character after the turn's last token).
    """

    text: str
    spans: dict[int, tuple[int, int]]


def spans_of(renderer: Renderer, messages: Sequence[Message], tools: Sequence[Any], learning: Sequence[int]) -> Spans:
    """Render a conversation and find the turns that learn.

    Args:
        messages: as chat templates take them.
        learning: numbers of the assistant's messages that learn, ascending.

    Raises:
        BadRowError: the template refuses the conversation, or a turn's span is not certain.
    """
    last = len(messages) - 1
    quirk = renderer.quirk
    if quirk and quirk.answer and last in learning:
        return _after_prompt(renderer, messages, tools, learning, quirk.answer)
    if renderer.marks_agree and learning:
        text, spans = _marked(renderer, messages, tools, learning)
    else:
        text = renderer.text(messages, tools)
        if quirk and renderer.next_header_ends and messages[last]["role"] == "assistant":
            text += quirk.end_of_call if messages[last].get("tool_calls") else quirk.ends[0]
        spans = {k: _span(renderer, messages, tools, k, text) for k in learning}
    for k, (start, end) in spans.items():
        _check_answer(messages[k], text[start:end], _turn(messages, k))
    return Spans(text, spans)


def _span(renderer: Renderer, messages: Sequence[Message], tools: Sequence[Any], k: int, text: str) -> tuple[int, int]:
    prompt = renderer.text(messages[:k], tools, prompt=True)
    own = renderer.text(messages[: k + 1], tools)
    start = len(prompt)
    if not own.startswith(prompt):
        raise BadRowError(
            f"{_turn(messages, k)}: the chat template's generation prompt ({prompt[-30:]!r}) is not how it begins this "
            "turn"
        )
    if own.startswith("\n</think>", start):
        raise BadRowError(
            f"{_turn(messages, k)} has no thinking, with which the generation prompt begins the turn: "
            "template.thinking drop asks for answers without"
        )
    if renderer.next_header_ends:
        end = next((len(own) + len(token) for token in renderer.ends if text.startswith(own + token)), -1)
    else:
        end = renderer.end_of_turn(own, start)
        end = end if text.startswith(own[:end]) else -1
    if end < 0:
        raise BadRowError(
            f"{_turn(messages, k)}: the chat template rewrites this turn when more messages follow, so it is not what "
            "the assistant would have generated: let the last round learn only (template.loss_scale last_round), or "
            'give the message "loss": false'
        )
    return start, end


def _marked(
    renderer: Renderer, messages: Sequence[Message], tools: Sequence[Any], learning: Sequence[int]
) -> tuple[str, dict[int, tuple[int, int]]]:
    text, found = renderer.marked(messages, tools)
    turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    if len(found) != len(turns):
        raise BadRowError(f"the chat template marks {len(found)} generated turns of {len(turns)}")
    return text, {k: span for k, span in zip(turns, found, strict=True) if k in learning}


def _after_prompt(
    renderer: Renderer, messages: Sequence[Message], tools: Sequence[Any], learning: Sequence[int], form: str
) -> Spans:
    """The last answer written after the generation prompt (see `Quirk.answer`)."""
    last = len(messages) - 1
    if len(learning) > 1:
        raise BadRowError(
            f"{_turn(messages, learning[0])}: the chat template leaves the thinking out of earlier turns: let the last "
            "round learn only (template.loss_scale last_round)"
        )
    if messages[last].get("tool_calls"):
        raise BadRowError(
            f"{_turn(messages, last)}: calls of tools after thinking are not known for this chat template"
        )
    reasoning, content = split_thinking(messages[last])
    if not reasoning:
        raise BadRowError(f"{_turn(messages, last)} has no thinking, with which this model begins every answer")
    prompt = renderer.text(messages[:last], tools, prompt=True)
    answer = form.format(reasoning=reasoning, content=content) + renderer.ends[0]
    return Spans(prompt + answer, {last: (len(prompt), len(prompt) + len(answer))})


def split_thinking(message: Message) -> tuple[str, str]:
    """A message's thinking (its ``reasoning_content``, or what its text has in <think> tags) and its answer."""
    content = message.get("content") or ""
    if message.get("reasoning_content"):
        return str(message["reasoning_content"]).strip(), content
    before, tag, after = content.partition("</think>")
    return (before.replace("<think>", "", 1).strip(), after.lstrip("\n")) if tag else ("", content)


def _turn(messages: Sequence[Message], k: int) -> str:
    """Message `k` for people, by a number that does not change where a system message is added."""
    return f"answer {sum(message['role'] == 'assistant' for message in messages[: k + 1])}"


def _check_answer(message: Message, span: str, turn: str) -> None:
    """Raise BadRowError if the template left out a part of a turn that learns."""
    texts = [str(message.get(key) or "") for key in ("content", "reasoning_content")]
    missing = next((p for text in texts for p in _THINK_TAGS.split(text) if p.strip() not in span), None)
    if missing is not None:
        raise BadRowError(f"{turn}: the chat template leaves out a part of the answer: {missing[:60]!r}")
    names = [call["function"]["name"] for call in message.get("tool_calls") or ()]
    missing = next((name for name in names if name not in span), None)
    if missing is not None:
        raise BadRowError(f"{turn}: the chat template leaves out the call of {missing!r}: set template.agent")


def check_context(messages: Sequence[Message], tools: Sequence[Any], text: str) -> None:
    """Raise BadRowError if what the row tells the model (other than earlier answers) is not in the text it sees."""
    for message in messages:
        content = (message.get("content") or "").strip()
        if message["role"] == "assistant" or content in text:
            continue
        if message["role"] == "tool" and json.dumps(content, ensure_ascii=False)[1:-1] in text:
            continue
        raise BadRowError(f"the chat template leaves out what the {message['role']} says: {content[:60]!r}")
    for tool in tools:
        name = tool.get("function", tool).get("name", "")
        if name not in text:
            raise BadRowError(f"the chat template does not tell the model of the tool {name!r}: set template.agent")
