"""Grammars for llguidance around what a schema says: thinking that comes first, and text in which calls may stand.

Free text is a lexeme of any characters but special tokens; a marker that the tokenizer holds as a special token stands
in a grammar as that token (``<[7]>``), any other one as its characters, which the text before it ends with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from swift_dist.serving.hf.requests import Calls, Thinking
from swift_dist.serving.reasoning import HARMONY, HARMONY_CALL, HARMONY_MESSAGE, HARMONY_START
from swift_dist.serving.tool_parsers.base import WORD, CallFormat, Tagged, kinds

# JSON allows any whitespace, and a model in doubt writes nothing else until its tokens are used up; this is what
# `json.dumps` writes, with or without its spaces. (llguidance's whitespace_pattern may repeat, so it limits nothing.)
JSON_OPTIONS: dict[str, Any] = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
_ANY = r"/(.|\n)*/"
_SPACE = r"/[ \n]{0,4}/"
# What says nothing of a value's text.
_SILENT = {"type", "description", "title", "default", "examples"}
_OBJECT = {"type", "properties", "required", "additionalProperties", "$defs", "definitions", "description", "title"}


def after_thinking(grammar: str, thinking: Thinking, special: Mapping[str, int]) -> str:
    """A grammar that is followed once the thinking is over.

    Args:
        grammar: llguidance's, as its `grammar_from_*` write it.
        special: the text of the tokenizer's special tokens -> their ids.
    """
    lark = _Lark(special)
    thought = f"{lark.thought(thinking)} {_SPACE}"
    start = f"{thought} @guide" if thinking.begun else f"({thought})? @guide"
    if not grammar.lstrip().startswith("{"):
        grammar = json.dumps({"grammars": [{"lark_grammar": grammar}]})
    given = json.loads(grammar)
    first, *rest = given["grammars"]
    return json.dumps({"grammars": [{"lark_grammar": lark.text(start)}, {**first, "name": "guide"}, *rest]})


def calls_in_text(calls: Calls, thinking: Thinking | None, special: Mapping[str, int]) -> str:
    """Free text; from where a call begins, the call: of one of the tools, with arguments of its schema.

    Raises:
        ValueError: a schema says what cannot be enforced in the notation of this family.
    """
    if thinking is not None and (thinking.open, thinking.close) == HARMONY:
        return _calls_in_channels(calls, thinking.begun, special)
    lark = _Lark(special)
    (begin,) = {one.begin for one in calls.formats}
    sections = " | ".join(lark.rule(_section(lark, one, calls)) for one in calls.formats)
    call = lark.rule(sections)
    # where the marker is a token, its characters are not to begin a call either
    free = rf"{_ANY} & ~/(.|\n)*{_expression(begin)}(.|\n)*/" if begin in special else _ANY
    after = f"({lark.until(begin, free)} {call})* {lark.rest(free)}"
    body = lark.rule(after if calls.parallel else f"{lark.rest(free)} | {lark.until(begin, free)} {call}")
    if thinking is None:
        return lark.text(body)
    thought = f"{lark.thought(thinking)} {_SPACE} {body}"
    if thinking.begun:
        return lark.text(thought)
    if lark.begins_special(thinking.open):
        return lark.text(f"{thought} | {body}")
    free += rf" & ~/[ \n]*{_expression(thinking.open)}(.|\n)*/"
    first = f"{lark.rest(free)} | {lark.until(begin, free)} {call} {after if calls.parallel else ''}"
    return lark.text(f"{thought} | {first}")


def _calls_in_channels(calls: Calls, begun: bool, special: Mapping[str, int]) -> str:
    """gpt-oss: thinking and preambles, then an answer or one call, which ends the turn."""
    lark = _Lark(special)
    over = lark.rule(lark.until("<|end|>" + HARMONY_START))
    before = " | ".join(
        f"{lark.quoted(f'<|channel|>{channel}{HARMONY_MESSAGE}')} {over}" for channel in ("analysis", "commentary")
    )
    last = [f"{lark.quoted('<|channel|>final' + HARMONY_MESSAGE)} {lark.rest()}"]
    for name, schema in calls.tools:
        heads = (
            head + kind + HARMONY_MESSAGE
            for head in (f"{HARMONY_CALL}functions.{name}", f" to=functions.{name}<|channel|>commentary")
            for kind in (" <|constrain|>json", " json")
        )
        arguments = lark.json(json.loads(schema) if schema is not None else {"type": "object"})
        last.append(f"({' | '.join(map(lark.quoted, heads))}) {arguments}")
    first = over if begun else ""
    return lark.text(f"{first} ({before})* ({' | '.join(last)})")


def _section(lark: _Lark, form: CallFormat, calls: Calls) -> str:
    one = lark.rule(" | ".join(_call(lark, form, name, schema) for name, schema in calls.tools))
    more = f" ({lark.quoted(form.separator)} {one})*" if form.separator is not None and calls.parallel else ""
    return f"{lark.quoted(form.open)} {one}{more} {lark.quoted(form.end)}"


def _call(lark: _Lark, form: CallFormat, name: str, schema: str | None) -> str:
    before, between, after = (lark.quoted(part) for part in (form.before, form.between, form.after))
    if form.tagged is None:
        arguments = lark.json(json.loads(schema) if schema is not None else {"type": "object"})
        return f"{before} {lark.quoted(name)} {between} {arguments} {after}"
    if schema is None:
        return f"{before} {lark.quoted(name)} {between} {lark.until(form.after)}"
    return f"{before} {lark.quoted(name)} {between} {_tagged(lark, form.tagged, json.loads(schema))} {after}"


def _tagged(lark: _Lark, form: Tagged, schema: dict[str, Any]) -> str:
    """The parameters one after another, those that are not required where the model wants them."""
    properties = schema.get("properties", {})
    required = set(schema.get("required", ()))
    odd = sorted((set(schema) - _OBJECT) | (required - set(properties)))
    if odd or schema.get("type") != "object":
        raise ValueError(f"a strict tool of this model's notation is an object of plain properties: not {odd}")
    shared: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    written = []
    for key, value in properties.items():
        one = f"{lark.quoted(form.before + key + form.between)} {_value(lark, form, key, value, shared)}"
        one += f" {lark.quoted(form.after)}"
        written.append(one if key in required else f"({one})?")
    return " ".join(written)


def _value(lark: _Lark, form: Tagged, key: str, schema: Any, shared: dict[str, Any]) -> str:
    found = kinds(schema)
    if "string" not in found:  # read back as JSON
        return f"{lark.json({**schema, **shared} if isinstance(schema, dict) else {})} {lark.quoted(form.end)}"
    texts = schema.get("enum")
    if texts is None and set(schema) <= _SILENT:
        return lark.until(form.end)
    plain = isinstance(texts, list) and texts and all(isinstance(one, str) and form.end not in one for one in texts)
    if plain and set(schema) <= {*_SILENT, "enum"}:
        return "(" + " | ".join(lark.quoted(one + form.end) for one in texts) + ")"
    raise ValueError(f"{key}: a string in this model's notation is any text or one of an enum: not {sorted(schema)}")


def _expression(text: str) -> str:
    """A regular expression, between slashes, of exactly this text."""
    return re.escape(text).replace("/", r"\/")


class _Lark:
    """A grammar in llguidance's dialect of Lark, rule by rule."""

    def __init__(self, special: Mapping[str, int]) -> None:
        self._special = special
        self._rules: list[str] = []
        self._split = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")

    def text(self, start: str) -> str:
        return "\n".join(["%llguidance {}", f"start: {start}", *self._rules, ""])

    def rule(self, body: str, attribute: str = "") -> str:
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{attribute}: {body}")
        return name

    def quoted(self, text: str) -> str:
        """Exactly this text."""
        parts, at = [], 0
        for found in [*self._split.finditer(text), None]:
            plain = text[at : found.start() if found else len(text)]
            for place, piece in enumerate(plain.split(WORD)):
                parts += ["/[A-Za-z0-9]+/"] if place else []
                parts += [json.dumps(piece, ensure_ascii=False)] if piece else []
            if found:
                parts.append(f"<[{self._special[found[0]]}]>")
                at = found.end()
        return " ".join(parts)

    def begins_special(self, text: str) -> bool:
        """Whether the text's beginning is a special token."""
        return self._split.match(text) is not None

    def rest(self, text: str = _ANY) -> str:
        """Any text, such as the regular expression says."""
        name = f"T{len(self._rules)}"
        self._rules.append(f"{name}: {text}")
        return name

    def until(self, marker: str, text: str = _ANY) -> str:
        """Any text up to a marker, and the marker."""
        found = self._split.search(marker)
        at = found.start() if found else len(marker)
        if not at:
            return f"{self.rest(text)} {self.quoted(marker)}"
        plain = self.rule(text, f"[suffix={json.dumps(marker[:at], ensure_ascii=False)}]")
        return f"{plain} {self.quoted(marker[at:])}"

    def thought(self, thinking: Thinking) -> str:
        if thinking.begun:
            return self.until(thinking.close)
        if self.begins_special(thinking.open):
            return f"{self.quoted(thinking.open)} {self.until(thinking.close)}"
        # in one lexeme: what follows the tag would otherwise be free text's
        return self.until(thinking.close, rf"/[ \n]*{_expression(thinking.open)}(.|\n)*/")

    def json(self, schema: dict[str, Any]) -> str:
        return f"%json {json.dumps({**schema, 'x-guidance': JSON_OPTIONS})}"
