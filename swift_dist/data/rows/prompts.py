"""Rows as prompts: what a model is to answer, and the answer that the row has, which the model does not see.

Rows of every format will do, with an answer or without one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swift_dist.data.rows._address import parse_address, source_files
from swift_dist.data.rows._fields import KNOWN_COLUMNS, QUERY_COLUMNS, RESPONSE_COLUMNS, first, has, is_plain
from swift_dist.data.rows._formats import detect, find_format
from swift_dist.data.rows._records import RowUnit, count_records, origin, parse, unit_records
from swift_dist.data.rows.base import BadRowError, Message, Row
from swift_dist.data.rows.messages import TURN_COLUMNS, turns
from swift_dist.data.rows.source import RowSource, renamed
from swift_dist.errors import JobError

_ANSWER = "-"  # stands for the answer of a row that has none while the row's format reads it
_WAITING = ("user", "human", "tool", "tool_response", "function", "observation", "function_response")


@dataclass(frozen=True)
class Prompt:
    """A row to be answered.

    Attributes:
        origin: ``path:line``, for people.
        given: the row as it stands in its file.
        messages: what stands before the answer, as OpenAI's API takes it; or `text` to go on with.
        tools: OpenAI's.
        reference: the answer that the row has: its text, or its message where it calls tools; None: it has none.
        answer_column: the row's column that holds nothing but `reference`; None: there is none.
        problem: why the row cannot be asked; "" where it can.
    """

    origin: str
    given: Mapping[str, Any]
    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    reference: Any = None
    answer_column: str | None = None
    problem: str = ""


class PromptSource:
    """The rows of files, folders or hub datasets, in order.

    Args:
        paths: as ``data.train``: with ``#N``, subsets and splits, or of the catalogue.
        row_format: of the rows ("auto": by each row's columns), a file of this folder or ``package.module:ATTRIBUTE``.
        columns: {name that a format knows: name in the file}.
        key: of the option that errors name.

    Raises:
        JobError: a path names nothing, or an unknown format or column is given.
    """

    def __init__(self, paths: Sequence[str], row_format: str, columns: Mapping[str, str], key: str) -> None:
        self._key = key
        if row_format != "auto":
            find_format(row_format)
        unknown = [name for name in columns if name not in KNOWN_COLUMNS]
        if unknown and ":" not in row_format:
            known = ", ".join(sorted(KNOWN_COLUMNS))
            raise JobError("columns", f"no format knows a column {unknown[0]}", f"formats know {known}")
        self._sources: list[RowSource] = []
        for path in paths:
            address = parse_address(path, key)
            catalogue = address.known
            files = source_files(address, path, key)
            named = catalogue.columns if catalogue else columns
            name = catalogue.format if catalogue and row_format == "auto" else row_format
            self._sources.append(RowSource(path, files, name, tuple(sorted(named.items())), address.take))

    def fingerprint(self) -> str:
        """A hash of all that decides which rows there are, and their order."""
        return "-".join(source.fingerprint() for source in self._sources)

    def count(self) -> int:
        """How many rows there are, bad ones included. Reads the files."""
        return sum(count_records(unit) for _, unit in self._units())

    def __iter__(self) -> Iterator[Prompt]:
        for source, unit in self._units():
            for file, number, record in unit_records(unit):
                where = origin(file, number)
                try:
                    given = parse(record, file)
                except BadRowError as error:
                    yield Prompt(where, {}, problem=str(error))
                    continue
                yield read_prompt(given, where, source.format, source.columns)

    def _units(self) -> Iterator[tuple[RowSource, RowUnit]]:
        for source in self._sources:
            for unit in source.units():
                yield source, unit


def read_prompt(
    given: Mapping[str, Any], where: str, row_format: str = "auto", columns: Sequence[tuple[str, str]] = ()
) -> Prompt:
    """A row taken apart into what is asked and what the answer was.

    Args:
        given: the row. where: its origin.
        row_format: "auto", or its name.
        columns: (name that formats know, name in the row).
    """
    row = renamed(given, columns)
    whole, lacks_answer = _with_answer(row)
    try:
        known = detect(whole) if row_format == "auto" else find_format(row_format)
        if known is None:
            raise BadRowError(f"no format knows the columns {', '.join(list(row)[:12]) or '(none)'}")
        read = known.read(whole)
    except BadRowError as error:
        return Prompt(where, given, problem=str(error))
    if read.text is not None and read.label is None:
        return Prompt(where, given, text=read.text)
    if not read.messages:
        return Prompt(where, given, problem="it is to be classified, and has no conversation to answer")
    asked, answer = _split(read)
    reference = None if lacks_answer or not answer else _reference(answer[-1])
    column = None if reference is None else first(row, (*RESPONSE_COLUMNS, "output"))
    column = column if column and row[column] == reference else None
    names = dict(columns)
    return Prompt(
        where,
        given,
        tuple(openai_messages(asked)),
        tools=read.tools,
        reference=reference,
        answer_column=names.get(column, column) if column else None,
    )


def _with_answer(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """The row as its format reads it, and whether its answer had to be made up for that."""
    if not is_plain(row):
        return row, False
    said = turns(row)
    last = said[-1] if said else None
    if isinstance(last, Mapping):
        if last.get("role") in _WAITING:
            return {**row, _turns_column(row): [*said, {"role": "assistant", "content": _ANSWER}]}, True
        if last.get("from") in _WAITING:
            ours = "assistant" if any(turn.get("from") == "assistant" for turn in said) else "gpt"
            ours = "assistant" if any(turn.get("from") == "function" for turn in said) else ours
            return {**row, _turns_column(row): [*said, {"from": ours, "value": _ANSWER}]}, True
        return row, False
    if has(row, "instruction") and not has(row, "output"):
        return {**row, "output": _ANSWER}, True
    if first(row, QUERY_COLUMNS) and not first(row, RESPONSE_COLUMNS) and not has(row, "instruction"):
        return {**row, RESPONSE_COLUMNS[0]: _ANSWER}, True
    return row, False


def _turns_column(row: Mapping[str, Any]) -> str:
    return first(row, TURN_COLUMNS) or TURN_COLUMNS[0]


def _split(row: Row) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """What is asked, and the answer: that of a pair, a judged one, or the assistant's last turn."""
    count = row.num_answer or (1 if row.messages[-1]["role"] == "assistant" else 0)
    cut = len(row.messages) - count
    return row.messages[:cut], row.messages[cut:]


def _reference(message: Message) -> Any:
    return openai_messages([message])[0] if "tool_calls" in message else message["content"]


def openai_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as requests carry them: arguments of calls as JSON text, and an id that a call and its result share.

    Rows need not name calls: results follow the calls in their order.
    """
    made: list[dict[str, Any]] = []
    waiting: list[str] = []
    for number, message in enumerate(messages):
        kept = {key: value for key, value in message.items() if key != "loss"}
        if "tool_calls" in kept:
            calls = []
            for place, call in enumerate(kept["tool_calls"]):
                arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
                name = call["function"]["name"]
                identity = call.get("id") or f"call_{number}_{place}"
                calls.append({"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}})
            kept["tool_calls"], waiting = calls, [str(call["id"]) for call in calls]
        elif kept["role"] == "tool":
            identity = kept.get("tool_call_id") or (waiting[0] if waiting else f"call_{number}")
            kept["tool_call_id"], waiting = identity, [other for other in waiting if other != identity]
        made.append(kept)
    return made
