"""Reading calls of tools out of generated text, piece by piece. Text in, events out: no model, no tokenizer, no HTTP.

A whole answer goes through the same code as one piece, so a stream and its answer in one piece never differ. Text is
passed on as soon as it cannot be the beginning of a call; a call is passed on when it is complete, because only then it
is known to be one. Text that looked like a call and cannot be read stays text.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Call:
    """A call of a tool. `arguments` is the JSON text of an object; `id` is the model's own, if it has one."""

    name: str
    arguments: str
    id: str = ""


Event = str | Call
Schemas = Mapping[str, Mapping[str, Any]]  # a tool's name -> JSON schema of its parameters
Reader = Callable[[str, Schemas], "list[Call] | None"]  # None: this is not a call


WORD = "\0"  # in a `CallFormat`: some letters or digits


@dataclass(frozen=True)
class Tagged:
    """Arguments that are not written as JSON: each is ``before KEY between VALUE end after``.

    A value that may be a string is bare text, any other one JSON (`typed`).
    """

    before: str
    between: str
    end: str
    after: str


@dataclass(frozen=True)
class CallFormat:
    """How calls are written: ``begin open CALL separator CALL end``, a call as ``before NAME between ARGUMENTS after``.

    Attributes:
        separator: None where each call has a beginning and an end of its own.
        tagged: how arguments are written; None: as a JSON object.
    """

    begin: str
    before: str
    between: str
    after: str
    end: str = ""
    open: str = ""
    separator: str | None = None
    tagged: Tagged | None = None


class ToolParser(ABC):
    """One answer's state.

    Attributes:
        formats: what a call that is guided looks like, all with one beginning; () where none can be.
        stop: texts at which generation must stop: there the tool's result would follow.
        markers: texts around calls. Some tokenizers hold them as special tokens, which must then stay in the text.
    """

    formats: tuple[CallFormat, ...] = ()
    stop: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()

    @abstractmethod
    def feed(self, text: str) -> list[Event]:
        """What is certain after the answer's next piece."""

    @abstractmethod
    def finish(self) -> list[Event]:
        """What is left when the answer ends."""


class BetweenMarkers(ToolParser):
    """Calls that stand between two texts, such as <tool_call> and </tool_call>.

    Args:
        begin: what calls begin with.
        end: what they end with; "" where they go on to the end of the answer.
        read: what stands between -> its calls, or None where it is not any.
        schemas: of the tools' parameters.
        markers: beside `begin` and `end`.
        formats: see `ToolParser`.
    """

    def __init__(
        self,
        begin: str,
        end: str,
        read: Reader,
        schemas: Schemas,
        markers: tuple[str, ...] = (),
        formats: tuple[CallFormat, ...] = (),
    ) -> None:
        self.formats = formats
        self._begin, self._end, self._read, self._schemas = begin, end, read, schemas
        self.markers = tuple(filter(None, (begin, end, *markers)))
        self._held, self._inside, self._called = "", False, False

    def feed(self, text: str) -> list[Event]:
        self._held += text
        events: list[Event] = []
        while self._step(events):
            pass
        return _joined(events)

    def finish(self) -> list[Event]:
        if not self._inside:
            return _joined([self._text(self._held)])
        # generation may end at the token that closes the call, whose text is then not there
        return _joined(self._calls(self._held.removesuffix(overlap(self._held, self._end)), self._held))

    def _extent(self, held: str) -> tuple[int, int] | None:
        """Where a call's text ends, and where what follows it begins; None while it has not ended."""
        at = held.find(self._end) if self._end else -1
        return (at, at + len(self._end)) if at >= 0 else None

    def _step(self, events: list[Event]) -> bool:
        """Pass on one text or one call; False where more text is needed first."""
        if self._inside:
            extent = self._extent(self._held)
            if extent is None:
                return False
            end, after = extent
            events.extend(self._calls(self._held[:end], self._held[:after]))
            self._held, self._inside = self._held[after:], False
            return True
        at = self._held.find(self._begin)
        certain = at if at >= 0 else len(self._held) - len(overlap(self._held, self._begin))
        if at < 0:
            # white space before a call is part of how calls are written
            certain = len(self._held[:certain].rstrip())
        events.append(self._text(self._held[:certain].rstrip() if at >= 0 else self._held[:certain]))
        self._held = self._held[at + len(self._begin) :] if at >= 0 else self._held[certain:]
        self._inside = at >= 0
        return self._inside

    def _calls(self, body: str, whole: str) -> list[Event]:
        calls = self._read(body, self._schemas)
        if calls is None:
            return [self._begin + whole]
        self._called = True
        return list(calls)

    def _text(self, text: str) -> str:
        return "" if self._called and not text.strip() else text


class LabelledCalls(BetweenMarkers):
    """Calls with a label before the name and one before the arguments, which end where their JSON object does.

    Args:
        begin: the label of the name.
        label: the label of the arguments.
        stop: where generation stops for the result.
    """

    def __init__(self, begin: str, label: str, stop: tuple[str, ...], schemas: Schemas) -> None:
        super().__init__(begin, "", self._read_call, schemas)
        self.stop, self._label = stop, label

    def _extent(self, held: str) -> tuple[int, int] | None:
        _, sign, behind = held.partition(self._label)
        written = behind.lstrip()
        if not sign or not written.startswith("{"):
            return None
        try:
            _, size = json.JSONDecoder().raw_decode(written)
        except ValueError:
            return None
        end = len(held) - len(written) + size
        return end, end

    def _read_call(self, text: str, schemas: Schemas) -> list[Call] | None:
        for sign in self.stop:
            text = text.partition(sign)[0]
        name, sign, written = text.partition(self._label)
        try:
            arguments = json.loads(written.strip() or "{}")
        except ValueError:
            return None
        call = call_of({"name": name.strip(), "arguments": arguments}) if sign else None
        return [call] if call else None


class WholeAnswer(ToolParser):
    """Calls that are the whole answer, told by how it begins.

    Args:
        may_begin: whether the answer's beginning (without white space before it) may be a call's: True, False, or None
            where more text is needed.
        read: the answer -> its calls, or None where it is not any.
    """

    def __init__(
        self,
        may_begin: Callable[[str], bool | None],
        read: Reader,
        schemas: Schemas,
        markers: tuple[str, ...] = (),
    ) -> None:
        self._may_begin, self._read, self._schemas, self.markers = may_begin, read, schemas, markers
        self._held = ""
        self._decided: bool | None = None

    def feed(self, text: str) -> list[Event]:
        if self._decided is False:
            return _joined([text])
        self._held += text
        if self._decided is None and self._held.strip():
            self._decided = self._may_begin(self._held.lstrip())
        if self._decided is False:
            text, self._held = self._held, ""
            return _joined([text])
        return []

    def finish(self) -> list[Event]:
        calls = self._read(self._held.strip(), self._schemas) if self._held.strip() else None
        return _joined(list(calls) if calls else [self._held])


def overlap(text: str, marker: str) -> str:
    """The longest end of `text` with which `marker` begins, and which is not all of it."""
    for size in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:size]):
            return marker[:size]
    return ""


def call_of(value: Any) -> Call | None:
    """The call that a JSON object ``{"name": …, "arguments" or "parameters": …}`` is; None where it is not one."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        return None
    return Call(value["name"], json.dumps(arguments, ensure_ascii=False))


def read_json(text: str, schemas: Schemas) -> list[Call] | None:
    """The calls of a JSON object or a list of them."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    calls = [call_of(one) for one in (value if isinstance(value, list) else [value])]
    return [call for call in calls if call] if calls and all(calls) else None


def tagged_call(name: str, pairs: Iterable[tuple[str, str]], schemas: Schemas) -> Call:
    """A call whose arguments are bare texts between tags, as the tool's schema types them."""
    name = name.strip()
    arguments = {key: typed(value, parameter(schemas, name, key)) for key, value in pairs}
    return Call(name, json.dumps(arguments, ensure_ascii=False))


def typed(text: str, schema: Any) -> Any:
    """A value that a family writes as bare text: JSON, unless the parameter's schema says that it may be a string."""
    found = kinds(schema)
    if "string" in found:
        return None if "null" in found and text == "null" else text
    try:
        return json.loads(text)
    except ValueError:
        return text


def kinds(schema: Any) -> set[str]:
    """The types that a schema names, those of its alternatives included."""
    if not isinstance(schema, Mapping):
        return set()
    named = schema.get("type")
    found = {kind for kind in (named if isinstance(named, list) else [named]) if isinstance(kind, str)}
    for key in ("anyOf", "oneOf"):
        branches = schema.get(key)
        for branch in branches if isinstance(branches, list) else ():
            found |= kinds(branch)
    return found


def parameter(schemas: Schemas, name: str, key: str) -> Any:
    """The schema of one of a tool's parameters; {} where it is not known."""
    properties = schemas.get(name, {}).get("properties")
    return properties.get(key, {}) if isinstance(properties, Mapping) else {}


def _joined(events: list[Event]) -> list[Event]:
    """Texts that follow each other as one; none that are empty."""
    joined: list[Event] = []
    for event in events:
        if isinstance(event, str) and joined and isinstance(joined[-1], str):
            joined[-1] += event
        elif event:
            joined.append(event)
    return joined
