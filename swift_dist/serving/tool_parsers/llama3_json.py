"""Llama 3.1 and 3.2: the whole answer is ``{"name": …, "parameters": …}``, several of them with ``;`` between.

A JSON answer that is no call of one of the tools is an answer.
"""

from __future__ import annotations

import json

from swift_dist.serving.tool_parsers.base import Call, Schemas, ToolParser, WholeAnswer, call_of

_TAG = "<|python_tag|>"


def may_begin(text: str) -> bool | None:
    if _TAG.startswith(text):
        return None
    return text.startswith(("{", _TAG))


def read(text: str, schemas: Schemas) -> list[Call] | None:
    text, decoder, calls = text.removeprefix(_TAG).strip(), json.JSONDecoder(), []
    while text:
        try:
            value, end = decoder.raw_decode(text)
        except ValueError:
            return None
        call = call_of(value)
        if call is None or call.name not in schemas:
            return None
        calls.append(call)
        text = text[end:].lstrip().removeprefix(";").lstrip()
    return calls or None


def PARSER(schemas: Schemas) -> ToolParser:
    return WholeAnswer(may_begin, read, schemas, markers=(_TAG,))
