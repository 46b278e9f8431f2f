"""Llama 3.2's small models, Llama 4 and others: the whole answer is a Python list of calls, ``[f(x=1), g(y="a")]``.

Read as a syntax tree: nothing is run.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from swift_dist.serving.tool_parsers.base import Call, Schemas, ToolParser, WholeAnswer

_BEGINNING = re.compile(r"\[\s*(?:[A-Za-z_][\w.]*\s*(?:\(.*)?)?\Z", re.DOTALL)
_CONSTANTS = {"true": True, "false": False, "null": None}
_FRAME = ("<|python_start|>", "<|python_end|>")


def may_begin(text: str) -> bool | None:
    if _FRAME[0].startswith(text):
        return None
    return text.startswith(_FRAME[0]) or (None if text.strip() == "[" else bool(_BEGINNING.match(text)))


def read(text: str, schemas: Schemas) -> list[Call] | None:
    text = text.removeprefix(_FRAME[0]).removesuffix(_FRAME[1]).strip()
    try:
        tree = ast.parse(text, mode="eval").body
        if not isinstance(tree, ast.List) or not tree.elts:
            return None
        calls = [_call(node) for node in tree.elts]
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return calls if all(call.name in schemas for call in calls) else None


def _call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call) or node.args or any(word.arg is None for word in node.keywords):
        raise ValueError("not a call with named arguments")
    arguments = {str(word.arg): _value(word.value) for word in node.keywords}
    return Call(ast.unparse(node.func), json.dumps(arguments, ensure_ascii=False))


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.Dict) and all(isinstance(key, ast.Constant) for key in node.keys):
        keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
        return {str(key): _value(value) for key, value in zip(keys, node.values, strict=True)}
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(element) for element in node.elts]
    value = ast.literal_eval(node)
    if not isinstance(value, str | int | float | bool | None):
        raise ValueError("not a value of JSON")
    return value


def PARSER(schemas: Schemas) -> ToolParser:
    return WholeAnswer(may_begin, read, schemas, markers=_FRAME)
