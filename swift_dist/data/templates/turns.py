"""Which characters of a rendered conversation the assistant would generate.

The rule: asked with the messages before a turn and the generation prompt, the model would write the turn's text and
then the token that ends it. So a turn's span begins where ``text(messages[:k], prompt)`` ends and goes up to and
including the token at which generation stops; the header before it and what the template adds behind it (a newline
after ``<|im_end|>``) are given. Both texts must be beginnings of the text that the turn is learnt from. Where more
messages follow, many templates rewrite earlier turns (they leave the thinking out, say), and show the model a turn that
it would not have generated: such a turn learns from another text, which ends with it. A template's own
``{% generation %}`` marks are believed where they agree with this rule on a plain answer.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from swift_dist.data.rows.base import BadRowError
from swift_dist.data.templates.renderer import Renderer, opens_thinking

Message = dict[str, Any]

_THINK_TAGS = re.compile(r"</?think>")


@dataclass(frozen=True)
class Spans:
    """Args:
    text: the conversation up to one of its messages, as the model sees it.
    spans: of each message that learns from this text, its number -> [first character, character after its last token).
    num_messages: how many messages of the conversation the text holds.
    """

    text: str
    spans: dict[int, tuple[int, int]]
    num_messages: int


@dataclass(frozen=True)
class _Turn:
    """Args:
    text: the conversation up to a turn, as the model sees it when it has generated that turn.
    start: where the turn begins.
    upto_end: the text up to the turn's last token; one for each that may stand there (see `Quirk.next_header_ends`).
    """

    text: str
    start: int
    upto_end: tuple[str, ...]

    def span_in(self, text: str) -> tuple[int, int] | None:
        """Where the turn stands in the text of a longer conversation; None if it was rewritten there."""
        found = next((known for known in self.upto_end if text.startswith(known)), None)
        return None if found is None else (self.start, len(found))


def spans_of(
    renderer: Renderer, messages: Sequence[Message], tools: Sequence[Any], learning: Sequence[int], apart: bool = False
) -> list[Spans]:
    """Render a conversation and find the turns that learn.

    Args:
        messages: as chat templates take them.
        learning: numbers of the assistant's messages that learn, ascending.
        apart: turns that the template rewrites where more messages follow learn from texts of their own. Else they are
            refused.

    Returns:
        The whole conversation's text, and before it as few shorter ones as it takes for each turn to learn from exactly
        one. A text from which no turn would learn is left out.

    Raises:
        BadRowError: the template refuses the conversation, or a turn's span is not certain.
    """
    if not learning:
        return [Spans(_text(renderer, messages, tools), {}, len(messages))]
    turns: dict[int, _Turn] = {}
    found: list[Spans] = []
    left, size = list(learning), len(messages)
    while left:
        spans = _in_one_text(renderer, messages[:size], tools, left, turns)
        left = [k for k in left if k not in spans.spans]
        if left and not apart:
            raise BadRowError(
                f"{_turn(messages, left[0])}: the chat template rewrites this turn when more messages follow, so it is "
                "not what the assistant would have generated: it can learn from a sample of its own only "
                '(template.rewritten_turns apart; not in pairs and judged answers), or give the message "loss": false'
            )
        if spans.spans:
            found.append(spans)
        size = left[-1] + 1 if left else 0
    return found[::-1]


def _in_one_text(
    renderer: Renderer,
    messages: Sequence[Message],
    tools: Sequence[Any],
    learning: Sequence[int],
    turns: dict[int, _Turn],
) -> Spans:
    """The text of the conversation, and those of the turns that stand in it as they would be generated.

    Args:
        turns: those that were rendered already; added to.
    """
    last, quirk = len(messages) - 1, renderer.quirk
    if quirk and quirk.answer:
        # Only a last turn can be written as it would be generated.
        found = _after_prompt(renderer, messages, tools, quirk.answer) if last in learning else Spans("", {}, last + 1)
    elif renderer.marks_agree:
        found = _marked(renderer, messages, tools, learning)
    else:
        for k in learning:
            turns[k] = turns.get(k) or _generated(renderer, messages[: k + 1], tools)
        text = turns[last].text if last in learning else _text(renderer, messages, tools)
        spans = {k: span for k in learning if (span := turns[k].span_in(text))}
        found = Spans(text, spans, len(messages))
    for k, (start, end) in list(found.spans.items()):
        try:
            _check_answer(messages[k], found.text[start:end], _turn(messages, k))
        except BadRowError:
            if k == last or not renderer.marks_agree:
                raise
            # The mark leaves out what was thought there: that turn is whole where the text ends with it.
            del found.spans[k]
    return found


def _text(renderer: Renderer, messages: Sequence[Message], tools: Sequence[Any]) -> str:
    """The conversation's text, with what ends its last turn."""
    return _ended(renderer, messages, renderer.text(messages, tools))


def _ended(renderer: Renderer, messages: Sequence[Message], text: str) -> str:
    if not (renderer.quirk and renderer.next_header_ends and messages[-1]["role"] == "assistant"):
        return text
    return text + (renderer.quirk.end_of_call if messages[-1].get("tool_calls") else renderer.quirk.ends[0])


def _generated(renderer: Renderer, messages: Sequence[Message], tools: Sequence[Any]) -> _Turn:
    """The last turn of a conversation."""
    last = len(messages) - 1
    prompt = renderer.text(messages[:last], tools, prompt=True)
    own = renderer.text(messages, tools)
    start, turn = len(prompt), _turn(messages, last)
    if not own.startswith(prompt):
        own = _behind(renderer, messages, tools, prompt, own) or own
    begins = own.startswith(prompt)
    if opens_thinking(prompt) and (not begins or own.startswith("\n</think>", start)):
        raise BadRowError(
            f"{turn} has no thinking, with which the generation prompt begins the turn: template.thinking drop asks "
            "for answers without"
        )
    if not begins:
        without = prompt.rstrip().endswith("</think>")
        raise BadRowError(
            f"{turn}: the chat template's generation prompt ({prompt[-30:]!r}) is not how it begins this turn"
            + (": the model is asked for an answer without thinking (template.thinking drop)" if without else "")
        )
    if renderer.next_header_ends:
        return _Turn(_ended(renderer, messages, own), start, tuple(own + end for end in renderer.ends))
    return _Turn(own, start, (own[: renderer.end_of_turn(own, start)],))


def _behind(renderer: Renderer, messages: Sequence[Message], tools: Sequence[Any], prompt: str, own: str) -> str | None:
    """The last answer behind its prompt, where the template writes the messages before it otherwise once it is there.

    gpt-oss leaves out what was thought before a call as soon as the answer follows. Where the answer begins is known
    from another answer in its place: the texts are the same up to behind the header that both begin with.

    Returns:
        The text; None where the turn does not begin with the prompt's header.
    """
    if messages[-1].get("tool_calls"):
        return None
    header = prompt.removeprefix(renderer.text(messages[:-1], tools))
    other = renderer.text([*messages[:-1], {"role": "assistant", "content": "zqx"}], tools)
    same = next((place for place, (one, two) in enumerate(zip(own, other, strict=False)) if one != two), 0)
    at = own.rfind(header, 0, same)
    return prompt + own[at + len(header) :] if header and at >= 0 else None


def _marked(renderer: Renderer, messages: Sequence[Message], tools: Sequence[Any], learning: Sequence[int]) -> Spans:
    text, found = renderer.marked(messages, tools)
    turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    if len(found) != len(turns):
        raise BadRowError(f"the chat template marks {len(found)} generated turns of {len(turns)}")
    return Spans(text, {k: span for k, span in zip(turns, found, strict=True) if k in learning}, len(messages))


def _after_prompt(renderer: Renderer, messages: Sequence[Message], tools: Sequence[Any], form: str) -> Spans:
    """The last answer written after the generation prompt (see `Quirk.answer`)."""
    last = len(messages) - 1
    if messages[last].get("tool_calls"):
        raise BadRowError(
            f"{_turn(messages, last)}: calls of tools after thinking are not known for this chat template"
        )
    reasoning, content = split_thinking(messages[last])
    if not reasoning:
        raise BadRowError(f"{_turn(messages, last)} has no thinking, with which this model begins every answer")
    prompt = renderer.text(messages[:last], tools, prompt=True)
    answer = form.format(reasoning=reasoning, content=content) + renderer.ends[0]
    return Spans(prompt + answer, {last: (len(prompt), len(prompt) + len(answer))}, len(messages))


def split_thinking(message: Message) -> tuple[str, str]:
    """A message's thinking (its ``reasoning_content``, or what its text has in <think> tags) and its answer."""
    content = message.get("content") or ""
    if message.get("reasoning_content"):
        return str(message["reasoning_content"]).strip(), content
    before, tag, after = content.partition("</think>")
    return (before.replace("<think>", "", 1).strip(), after.lstrip("\n")) if tag else ("", content)


def name_results(messages: Sequence[Message]) -> None:
    """Give tools' results the name of the tool: of the call with their id, else of the call in their place."""
    calls: list[dict[str, Any]] = []
    place = 0
    for message in messages:
        if message["role"] != "tool":
            calls, place = message.get("tool_calls") or [], 0
            continue
        known = [call for call in calls if call.get("id") == message.get("tool_call_id", "")] or calls[
            place : place + 1
        ]
        if known:
            message.setdefault("name", known[0]["function"]["name"])
        place += 1


def _turn(messages: Sequence[Message], k: int) -> str:
    """Message `k` for people, by a number that does not change where a system message is added."""
    return f"answer {sum(message['role'] == 'assistant' for message in messages[: k + 1])}"


def _check_answer(message: Message, span: str, turn: str) -> None:
    """Raise BadRowError if the template left out a part of a turn that learns."""
    texts = [str(message.get(key) or "") for key in ("content", "reasoning_content")]
    missing = next((p for text in texts for p in _THINK_TAGS.split(text) if p.strip() not in span), None)
    if missing is not None:
        raise BadRowError(f"{turn}: the chat template leaves out a part of the answer: {missing[:60]!r}")
    names = Counter(call["function"]["name"] for call in message.get("tool_calls") or ())
    missing = next((name for name, count in names.items() if span.count(name) < count), None)
    if missing is not None:
        which = "the call" if names[missing] == 1 else f"one of {names[missing]} calls"
        raise BadRowError(f"{turn}: the chat template leaves out {which} of {missing!r}: set template.agent")


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
