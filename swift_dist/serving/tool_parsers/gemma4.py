"""Gemma 4: ``<|tool_call>call:name{city:<|"|>Bonn<|"|>,days:3}<tool_call|>``, a call after another.

Keys are bare, texts stand between signs, objects and lists hold the same again; what is bare is JSON's (a number, true,
false, null). FunctionGemma writes the same with signs of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from swift_dist.serving.tool_parsers.base import BetweenMarkers, Call, Schemas, ToolParser, kinds, typed

_CALL = re.compile(r"\s*call:\s*([^\s{}:,]+)\s*\{")
_BARE = re.compile(r"[^,\[\]{}]*")
_KEY = re.compile(r"[^:,\[\]{}]*")


class Values:
    """Reads values from their beginning on. Every method raises ValueError where there is none.

    Args:
        text: what is read.
        at: the first character's place.
        sign: before and after a text.
    """

    def __init__(self, text: str, at: int, sign: str) -> None:
        self._text, self._at, self._sign = text, at, sign

    def members(self, schema: Any) -> dict[str, Any]:
        """What stands after ``{``, to its ``}``."""
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        found = {}
        for _ in self._between_commas("}"):
            key = self._signed()
            if key is None:
                key = self._match(_KEY)
            if not key or not self._take(":"):
                raise ValueError("no key")
            found[key] = self._value(properties.get(key) if isinstance(properties, Mapping) else None)
        return found

    def end(self) -> None:
        if self._text[self._at :].strip():
            raise ValueError("more than a call")

    def _value(self, schema: Any) -> Any:
        if self._take("{"):
            return self.members(schema)
        if self._take("["):
            items = schema.get("items") if isinstance(schema, Mapping) else None
            return [self._value(items) for _ in self._between_commas("]")]
        text = self._signed()
        if text is None:
            text = self._match(_BARE)
            if not text:
                raise ValueError("no value")
            return typed(text, schema)
        # a text, whatever it looks like, unless the schema takes none
        return typed(text, schema) if kinds(schema) else text

    def _between_commas(self, end: str) -> Iterator[None]:
        if self._take(end):
            return
        while True:
            yield
            if self._take(end):
                return
            if not self._take(","):
                raise ValueError(f"no {end}")

    def _signed(self) -> str | None:
        if not self._take(self._sign):
            return None
        text, sign, _ = self._text[self._at :].partition(self._sign)
        if not sign:
            raise ValueError("a text without its end")
        self._at += len(text) + len(sign)
        return text

    def _match(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self._text, self._at)
        assert found is not None  # both patterns match nothing as well
        self._at = found.end()
        return found[0].strip()

    def _take(self, sign: str) -> bool:
        """Go past a sign and the white space before it, where it is next."""
        at = self._at
        while at < len(self._text) and self._text[at].isspace():
            at += 1
        if not self._text.startswith(sign, at):
            return False
        self._at = at + len(sign)
        return True


def read(text: str, schemas: Schemas, sign: str) -> list[Call] | None:
    found = _CALL.match(text)
    if found is None:
        return None
    values = Values(text, found.end(), sign)
    try:
        arguments = values.members(schemas.get(found[1]))
        values.end()
    except (ValueError, RecursionError):
        return None
    return [Call(found[1], json.dumps(arguments, ensure_ascii=False))]


class GemmaCalls(BetweenMarkers):
    """Calls between two signs, each with a sign for texts, and one where the result would follow."""

    def __init__(self, begin: str, end: str, sign: str, stop: str, schemas: Schemas) -> None:
        super().__init__(begin, end, lambda text, known: read(text, known, sign), schemas, markers=(sign, stop))
        self.stop = (stop,)


def PARSER(schemas: Schemas) -> ToolParser:
    return GemmaCalls("<|tool_call>", "<tool_call|>", '<|"|>', "<|tool_response>", schemas)
