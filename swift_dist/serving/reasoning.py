"""Telling what a model thinks from what it answers, in text that comes piece by piece.

The prompt is known here, so nothing is guessed: the answer begins within the thinking exactly where the prompt ends
with its opening tag.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from swift_dist.serving.tool_parsers.base import overlap

_THINK = ("<think>", "</think>")
_MISTRAL = ("[THINK]", "[/THINK]")
_SEED = ("<seed:think>", "</seed:think>")
_GEMMA = ("<|channel>thought", "<channel|>")
HARMONY_START, HARMONY_MESSAGE, HARMONY_END_OF_CALL = "<|start|>assistant", "<|message|>", "<|call|>"
HARMONY_CALL = "<|channel|>commentary to="
# What lies between thinking and an answer is part of the second: a guided answer is on the channel "final".
HARMONY = ("<|channel|>analysis<|message|>", f"<|end|>{HARMONY_START}<|channel|>final<|message|>")
# The names are vLLM's.
PARSERS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        ("deepseek_r1", "deepseek_v3", "qwen3", "glm45", "kimi_k2", "minimax_m2", "olmo3", "step3"), _THINK
    ),
    "mistral": _MISTRAL,
    "seed_oss": _SEED,
    "gemma4": _GEMMA,
    "openai_gptoss": HARMONY,
}
# What a template that knows them holds.
_SIGNS = (
    ("</think>", _THINK),
    ("[/THINK]", _MISTRAL),
    ("</seed:think>", _SEED),
    ("<channel|>", _GEMMA),
    ("<|channel|>analysis", HARMONY),
)
# What ends the thinking as well, and is part of what follows: Gemma may call a tool without closing it.
_CALLS = {_GEMMA: "<|tool_call>"}


@dataclass(frozen=True)
class Piece:
    """Some text of an answer."""

    kind: Literal["reasoning", "content"]
    text: str


def tags_of(template: str) -> tuple[str, str] | None:
    """The tags around the thinking that a chat template writes or reads; None where it knows none."""
    return next((tags for sign, tags in _SIGNS if sign in template), None)


def splitter_of(tags: tuple[str, str], prompt: str) -> ReasoningSplitter | HarmonySplitter:
    """What tells the thinking between these tags in an answer to this prompt."""
    return HarmonySplitter(prompt) if tags == HARMONY else ReasoningSplitter(tags, prompt)


class ReasoningSplitter:
    """One answer's state.

    Args:
        tags: what opens and closes the thinking.
        prompt: the text that the answer follows.
    """

    def __init__(self, tags: tuple[str, str], prompt: str) -> None:
        self._open, self._close = tags
        self._call = _CALLS.get(tags, "")
        opened = prompt.rstrip().endswith(self._open)
        self._state: Literal["before", "thinking", "answering"] = "thinking" if opened else "before"
        self._held, self._said = "", ""

    def feed(self, text: str) -> list[Piece]:
        """What is certain after the answer's next piece."""
        self._held += text
        pieces: list[Piece] = []
        if self._state == "before":
            begun = self._held.lstrip()
            if begun.startswith(self._open):
                self._state, self._held = "thinking", begun[len(self._open) :]
            elif self._open.startswith(begun):
                return []
            else:
                self._state, self._said = "answering", "content"
        if self._state == "thinking":
            before, tag, after = self._held.partition(self._close)
            if self._call and self._call in before:
                before, tag, after = before.partition(self._call)
                after = tag + self._held[len(before) + len(tag) :]
            if tag:
                pieces.append(self._next("reasoning", before.rstrip()))
                self._state, self._held, self._said = "answering", after, ""
            else:
                # white space before the closing tag is not thought
                begun = max(overlap(before, self._close), overlap(before, self._call), key=len)
                certain = before[: len(before) - len(begun)].rstrip()
                pieces.append(self._next("reasoning", certain))
                self._held = before[len(certain) :] if self._said else before[len(certain) :].lstrip()
        if self._state == "answering":
            pieces.append(self._next("content", self._held))
            self._held = ""
        return [piece for piece in pieces if piece.text]

    def finish(self) -> list[Piece]:
        """What is left when the answer ends."""
        if not self._held:
            return []
        kind: Literal["reasoning", "content"] = "reasoning" if self._state == "thinking" else "content"
        return [Piece(kind, self._held)]

    def _next(self, kind: Literal["reasoning", "content"], text: str) -> Piece:
        """A piece, without the white space that it begins with."""
        if self._said != kind:
            text = text.lstrip()
            self._said = kind if text else self._said
        return Piece(kind, text)


_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"(?:^|\s)to=([^\s<]+)")
_HEADERS = ("<|channel|>", "<|start|>", "to=")  # what the first message's header may begin with
_ENDS = ("<|end|>", "<|return|>", HARMONY_END_OF_CALL, "<|start|>")


class HarmonySplitter:
    """gpt-oss: an answer is messages, ``<|channel|>NAME<|message|>TEXT<|end|>``, with ``<|start|>assistant`` between.

    What is on the channel "analysis" is thought, and what is written to a tool is passed on as content for
    `tool_parsers.openai`, in one of the two orders that its header may have. Anything else is said. Messages of a kind
    are joined by a line's end.

    Args:
        prompt: the text that the answer follows; it may end within a message.
    """

    def __init__(self, prompt: str) -> None:
        self._held = ""
        self._kind: Literal["reasoning", "content"] | None = None  # of the message that is read; None: its header is
        self._calling, self._join = False, ""
        self._told: set[str] = set()
        _, sign, begun = prompt.rpartition(HARMONY_START)
        header, message, said = begun.partition(HARMONY_MESSAGE)
        if sign and not any(end in said for end in _ENDS):
            if message:
                self._begin(header)
            else:
                self._held = header.strip()

    def feed(self, text: str) -> list[Piece]:
        """What is certain after the answer's next piece."""
        self._held += text
        pieces: list[Piece] = []
        while self._header(pieces) if self._kind is None else self._message(pieces):
            pass
        return [piece for piece in pieces if piece.text]

    def finish(self) -> list[Piece]:
        """What is left when the answer ends. A header that is cut is no text."""
        begun = self._held.lstrip()
        if self._kind is None:
            return [] if not begun or begun.startswith(("<|", "to=")) else [Piece("content", begun)]
        return [piece for piece in [self._piece(self._held)] if piece.text]

    def _header(self, pieces: list[Piece]) -> bool:
        """Read a header; False where more text is needed first."""
        header, sign, after = self._held.partition(HARMONY_MESSAGE)
        begun = header.lstrip()
        if begun and not any(begun.startswith(one) or one.startswith(begun) for one in _HEADERS):
            self._begin("")  # an answer without channels
            return True
        if not sign:
            return False
        self._held = after
        call = self._begin(begun)
        if call:
            pieces.append(Piece("content", call))
        return True

    def _message(self, pieces: list[Piece]) -> bool:
        """Pass on a message's text; False where it has not ended."""
        found = [(at, end) for end in _ENDS if (at := self._held.find(end)) >= 0]
        if found:
            at, end = min(found)
            pieces.append(self._piece(self._held[:at]))
            if self._calling:
                pieces.append(Piece("content", HARMONY_END_OF_CALL))
            self._held = self._held[at if end == "<|start|>" else at + len(end) :]
            self._kind, self._calling = None, False
            return True
        certain = len(self._held) - max(len(overlap(self._held, end)) for end in _ENDS)
        pieces.append(self._piece(self._held[:certain]))
        self._held = self._held[certain:]
        return False

    def _begin(self, header: str) -> str:
        """Begin a message; where it is a call, what it is passed on with."""
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        self._kind = "reasoning" if channel and channel[1] == "analysis" and not recipient else "content"
        self._calling = recipient is not None and recipient[1] != "assistant"
        self._join = "\n" if self._kind in self._told else ""
        if recipient is None or not self._calling:
            return ""
        return HARMONY_CALL + recipient[1] + HARMONY_MESSAGE

    def _piece(self, text: str) -> Piece:
        assert self._kind is not None
        if not text or self._calling:
            return Piece(self._kind, text)
        text, self._join = self._join + text, ""
        self._told.add(self._kind)
        return Piece(self._kind, text)
