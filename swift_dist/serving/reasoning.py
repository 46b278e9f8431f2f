"""Telling what a model thinks from what it answers, in text that comes piece by piece.

The prompt is known here, so nothing is guessed: the answer begins within the thinking exactly where the prompt ends
with its opening tag.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from swift_dist.serving.tool_parsers.base import overlap

_THINK = ("<think>", "</think>")
_MISTRAL = ("[THINK]", "[/THINK]")
_SEED = ("<seed:think>", "</seed:think>")
# The names are vLLM's.
PARSERS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        ("deepseek_r1", "deepseek_v3", "qwen3", "glm45", "kimi_k2", "minimax_m2", "olmo3", "step3"), _THINK
    ),
    "mistral": _MISTRAL,
    "seed_oss": _SEED,
}


@dataclass(frozen=True)
class Piece:
    """Some text of an answer."""

    kind: Literal["reasoning", "content"]
    text: str


def tags_of(template: str) -> tuple[str, str] | None:
    """The tags around the thinking that a chat template writes or reads; None where it knows none."""
    return next((tags for tags in (_THINK, _MISTRAL, _SEED) if tags[1] in template), None)


class ReasoningSplitter:
    """One answer's state.

    Args:
        tags: what opens and closes the thinking.
        prompt: the text that the answer follows.
    """

    def __init__(self, tags: tuple[str, str], prompt: str) -> None:
        self._open, self._close = tags
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
            if tag:
                pieces.append(self._next("reasoning", before.rstrip()))
                self._state, self._held, self._said = "answering", after, ""
            else:
                # white space before the closing tag is not thought
                certain = before[: len(before) - len(overlap(before, self._close))].rstrip()
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
