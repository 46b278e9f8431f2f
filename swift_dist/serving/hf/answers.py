"""One choice of a chat's answer: generated text in, what OpenAI's API shows of it out.

Answers in one piece are the sum of the same deltas that a stream shows.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from typing import Any

from swift_dist.serving.hf.requests import Token
from swift_dist.serving.reasoning import HarmonySplitter, ReasoningSplitter
from swift_dist.serving.tool_parsers.base import Call, Event, ToolParser, call_of


@dataclass
class Delta:
    """What a piece of text adds to a message."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.calls)

    def fields(self) -> dict[str, Any]:
        """As JSON. Reasoning has two names: vLLM's, and the older one that DeepSeek's API began with."""
        shown: dict[str, Any] = {}
        if self.reasoning:
            shown |= {"reasoning": self.reasoning, "reasoning_content": self.reasoning}
        if self.content:
            shown["content"] = self.content
        if self.calls:
            shown["tool_calls"] = self.calls
        return shown


class NamedArguments(ToolParser):
    """The whole text is the arguments of one tool: passed on as it comes."""

    def __init__(self, name: str) -> None:
        self.name = name

    def feed(self, text: str) -> list[Event]:
        return [text] if text else []

    def finish(self) -> list[Event]:
        return []


class RequiredCalls(ToolParser):
    """The text is a JSON list of calls, each passed on when it is complete."""

    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str) -> list[Event]:
        self._held += text
        calls: list[Event] = []
        while (begun := self._held.lstrip(" \t\r\n[,")).startswith("{"):
            try:
                value, end = json.JSONDecoder().raw_decode(begun)
            except ValueError:
                break
            call = call_of(value)
            if call:
                calls.append(call)
            self._held = begun[end:]
        return calls

    def finish(self) -> list[Event]:
        return []


class ChatAnswer:
    """One choice's state.

    Args:
        reasoning: tells thinking from the answer; None where the text has none.
        tools: reads calls; None where the text has none.
        parallel: more than one call may be made.
        show_reasoning: whether the thinking is shown at all.
    """

    def __init__(
        self,
        reasoning: ReasoningSplitter | HarmonySplitter | None,
        tools: ToolParser | None,
        *,
        parallel: bool = True,
        show_reasoning: bool = True,
    ) -> None:
        self._reasoning, self._tools, self._parallel, self._show = reasoning, tools, parallel, show_reasoning
        self._num_calls = 0

    @property
    def called(self) -> bool:
        """Whether a tool has been called."""
        return self._num_calls > 0

    def feed(self, token: Token) -> Delta:
        """What the next token adds."""
        return self._delta(token.text, last=False)

    def finish(self) -> Delta:
        """What the end of the text adds."""
        return self._delta("", last=True)

    def _delta(self, text: str, last: bool) -> Delta:
        delta = Delta()
        if self._reasoning is None:
            self._answer(text, delta)
        else:
            for piece in [*self._reasoning.feed(text), *(self._reasoning.finish() if last else ())]:
                if piece.kind == "content":
                    self._answer(piece.text, delta)
                elif self._show:
                    delta.reasoning += piece.text
        if last and self._tools is not None:
            self._take(self._tools.finish(), delta)
        return delta

    def _answer(self, text: str, delta: Delta) -> None:
        if self._tools is None:
            delta.content += text
        elif isinstance(self._tools, NamedArguments):
            self._named(self._tools.name, text, delta)
        else:
            self._take(self._tools.feed(text), delta)

    def _named(self, name: str, text: str, delta: Delta) -> None:
        if not text:
            return
        if not self.called:
            self._num_calls = 1
            delta.calls.append(_shown(0, Call(name, text)))
        else:
            delta.calls.append({"index": 0, "function": {"arguments": text}})

    def _take(self, events: list[Event], delta: Delta) -> None:
        for event in events:
            if isinstance(event, str):
                delta.content += event
            elif self._parallel or not self.called:
                delta.calls.append(_shown(self._num_calls, event))
                self._num_calls += 1


def _shown(index: int, call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": index, "id": call.id or f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def message_of(deltas: list[Delta]) -> dict[str, Any]:
    """The message that deltas add up to."""
    content = "".join(delta.content for delta in deltas)
    reasoning = "".join(delta.reasoning for delta in deltas)
    calls: list[dict[str, Any]] = []
    for call in (call for delta in deltas for call in delta.calls):
        if "id" in call:
            calls.append({"id": call["id"], "type": "function", "function": dict(call["function"])})
        else:
            calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    message: dict[str, Any] = {
        "role": "assistant",
        "content": content if content or not calls else None,
        "refusal": None,
    }
    if reasoning:
        message |= {"reasoning": reasoning, "reasoning_content": reasoning}
    if calls:
        message["tool_calls"] = calls
    return message


def chat_logprobs(tokens: list[Token]) -> dict[str, Any]:
    """Log-probabilities as chats show them."""

    def shown(piece: bytes, logprob: float | None) -> dict[str, Any]:
        return {"token": piece.decode(errors="replace"), "logprob": logprob, "bytes": list(piece)}

    content = [
        {
            **shown(token.piece, token.logprob),
            "top_logprobs": [shown(other.piece, other.logprob) for other in token.top],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: list[Token], offset: int) -> dict[str, Any]:
    """Log-probabilities as text completions show them.

    Args:
        offset: characters before the first token.
    """
    shown: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        text = token.piece.decode(errors="replace")
        shown["tokens"].append(text)
        shown["token_logprobs"].append(token.logprob)
        top = {other.piece.decode(errors="replace"): other.logprob for other in reversed(token.top)}
        shown["top_logprobs"].append(top if token.logprob is not None else None)
        shown["text_offset"].append(offset)
        offset += len(text)
    return shown
