"""Tokens to text as they come: whole characters, nothing past a stop text, nothing shown that one may take back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from swift_dist.serving.tool_parsers.base import overlap

_UNKNOWN = "\ufffd"  # what decoders put where bytes are no character, or not yet
_CONTEXT = 6  # tokens of the prompt that the first ones are decoded after: whether a word begins with a space


class Detokenizer:
    """The text of one answer, a token at a time. The parts add up to the text of all of it.

    Args:
        decode: token ids -> text, as the tokenizer's.
        prompt: ids that the answer follows.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int]) -> None:
        self._decode = decode
        self._ids = list(prompt[-_CONTEXT:])
        self._known = len(self._ids)  # tokens whose text is out
        self._shown = len(decode(self._ids)) if self._ids else 0  # characters of `_ids` that are out
        self._whole = ""

    def push(self, token: int) -> str:
        """What the token adds. Bytes that may yet become a character are kept for later."""
        self._ids.append(token)
        self._whole = self._decode(self._ids)
        stable = self._whole.rstrip(_UNKNOWN)
        part = stable[self._shown :]
        self._shown = max(self._shown, len(stable))
        if len(stable) == len(self._whole) and part:
            # Whole up to here: from now on only what came since the last such place is decoded again, as context.
            del self._ids[: self._known]
            self._known = len(self._ids)
            self._whole = self._decode(self._ids)
            self._shown = len(self._whole)
        return part

    def flush(self) -> str:
        """What was kept, as the decoder writes it."""
        part, self._shown = self._whole[self._shown :], max(self._shown, len(self._whole))
        return part


class StopTexts:
    """Holds back a text's end while it may be the beginning of a stop text."""

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """What may be shown, and the stop text that was met: the one that begins first, of those the longest."""
        if not self._stops:
            return text, None
        self._held += text
        found = [(at, -len(stop), stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, length, stop = min(found)
            shown = self._held[: at - length if self._include else at]
            self._held = ""
            return shown, stop
        keep = max(len(overlap(self._held, stop)) for stop in self._stops)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown, None

    def flush(self) -> str:
        shown, self._held = self._held, ""
        return shown


def decoder(tokenizer: Any, skip_special_tokens: bool) -> Callable[[list[int]], str]:
    """A tokenizer's `decode` without what it costs around the library's own, where that is the same."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return lambda ids: backend.decode(ids, skip_special_tokens=skip_special_tokens)
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
