"""Messages as OpenAI's chat API writes them, checked, in the one form that chat templates take.

https://platform.openai.com/docs/api-reference/chat (messages, tool_calls, tools). Beside it the roles ``tool_call`` and
``tool_response`` of ms-swift, and per-message ``loss`` (its name there) or ``weight`` (OpenAI's fine-tuning files).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from swift_dist.data.readers import kind_of
from swift_dist.data.rows._fields import as_list, as_text, from_json, has, refuse_media
from swift_dist.data.rows.base import BadRowError, Message

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "function": "tool",
    "tool_call": "tool_call",
}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Names of the thinking before an answer: DeepSeek's and ms-swift's, OpenRouter's and vLLM's, that of gpt-oss' rows."""
_ADDED_CALL = "_added_call"  # marks calls that came from messages of their own, while a conversation is read


def read_messages(value: Any, column: str) -> list[Message]:
    """The messages of a column, each checked; their order is `check_turns`' matter.

    Args:
        value: list of messages, or one as JSON text.
        column: its name, for what is said about it.

    Raises:
        BadRowError: it is no list of messages.
    """
    items = as_list(value, column)
    if not items:
        raise BadRowError(f"{column} is empty")
    messages: list[Message] = []
    for number, item in enumerate(items, 1):
        where = f"{column}, message {number}"
        if not isinstance(item, Mapping):
            raise BadRowError(f"{where} is {kind_of(item)}, not an object")
        _append(messages, _message({key: v for key, v in item.items() if v is not None}, where), where)
    for message in messages:
        message.pop(_ADDED_CALL, None)
        if message["role"] == "assistant" and not message["content"].strip() and "tool_calls" not in message:
            raise BadRowError(f"{column}: an assistant message is empty")
    return messages


def _append(messages: list[Message], message: Message, where: str) -> None:
    """Adds a message; one of role tool_call joins the assistant's message before it."""
    if message["role"] != "tool_call":
        messages.append(message)
        return
    last = messages[-1] if messages else {}
    if last.get("role") == "assistant" and (_ADDED_CALL in last or "tool_calls" not in last):
        if last.get("loss") != message.get("loss"):
            raise BadRowError(f"{where}: the call and the assistant's text before it are one turn: give both one loss")
        last.setdefault("tool_calls", []).extend(message["tool_calls"])
        last[_ADDED_CALL] = True
    else:
        messages.append({**message, "role": "assistant", _ADDED_CALL: True})


def _message(item: dict[str, Any], where: str) -> Message:
    if "role" not in item:
        raise BadRowError(f"{where} has no role, only {', '.join(list(item)[:8]) or 'nothing'}")
    role = _ROLES.get(item["role"]) if isinstance(item["role"], str) else None
    if role is None:
        raise BadRowError(f"{where} has the unknown role {item['role']!r}; there are {', '.join(_ROLES)}")
    where = f"{where} ({item['role']})"
    message: Message = {"role": role, "content": _content(item, role, where)}
    if role == "tool_call":
        message |= {"content": "", "tool_calls": _calls(item["content"], where)}
    if role == "assistant":
        called = item.get("tool_calls") or ([item["function_call"]] if item.get("function_call") else [])
        if called:
            message["tool_calls"] = _calls(called, where)
        message |= _thinking(item, message["content"], where)
    elif item.get("tool_calls") or item.get("function_call"):
        raise BadRowError(f"{where} has tool calls: only the assistant calls")
    for key in ("name", "tool_call_id"):
        if key in item:
            message[key] = as_text(item[key], f"{where}: {key}")
    if "loss" in item or "weight" in item:
        message["loss"] = _loss(item.get("loss", item.get("weight")), role, where)
    return message


def _thinking(item: dict[str, Any], content: str, where: str) -> Message:
    """``reasoning_content``, under whichever name the row has it."""
    found = {key: as_text(item[key], f"{where}: {key}", empty=True) for key in THOUGHTS if item.get(key)}
    if len(found) + ("</think>" in content) > 1:
        names = [*found, *(["<think> in its content"] if "</think>" in content else [])]
        raise BadRowError(f"{where} has its thinking twice: {' and '.join(names)}")
    return {"reasoning_content": next(iter(found.values()))} if found else {}


def _content(item: dict[str, Any], role: str, where: str) -> str:
    """The text of a message. Its being empty is fine for system messages, results of tools, and calls."""
    if role == "tool_call":
        if not item.get("content"):
            raise BadRowError(f"{where} has no content: the call as JSON")
        return ""
    if "content" not in item:
        if item.get("tool_calls") or item.get("function_call"):
            return ""
        raise BadRowError(f"{where} has no content")
    content = item["content"]
    if isinstance(content, list) and all(isinstance(part, Mapping) and "type" in part for part in content):
        texts = []
        for part in content:
            if part["type"] not in ("text", "input_text", "output_text"):
                raise BadRowError(f"{where}: a part of its content is of type {part['type']!r}: rows are text")
            texts.append(as_text(part.get("text"), f"{where}: a part of its content", empty=True))
        content = "".join(texts)
    elif role == "tool" and isinstance(content, (dict, list)):
        content = json.dumps(content, ensure_ascii=False)
    return as_text(content, f"{where}: content", empty=role != "user")


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """``tool_calls`` with their arguments as objects: chat templates write them as JSON themselves."""
    value = from_json(value, where) if isinstance(value, str) else value
    return [_call(item, where) for item in (value if isinstance(value, list) else [value])]


def _call(item: Any, where: str) -> dict[str, Any]:
    function = item.get("function", item) if isinstance(item, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise BadRowError(f"{where}: a tool call is not an object with name and arguments")
    named = [key for key in ("arguments", "parameters") if function.get(key) is not None]
    unread = [key for key in function if key not in ("name", "id", "type", "arguments", "parameters")]
    if len(named) > 1 or (unread and not named):
        raise BadRowError(f"{where}: a call of {function['name']} with {', '.join(named or unread)}, not arguments")
    arguments = function[named[0]] if named else None
    if isinstance(arguments, str) and arguments.strip():
        arguments = from_json(arguments, f"{where}: arguments of {function['name']}")
    arguments = {} if arguments is None or arguments == "" else arguments
    if not isinstance(arguments, Mapping):
        raise BadRowError(f"{where}: arguments of {function['name']} hold {kind_of(arguments)}, not an object")
    call = {"type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}
    return {"id": item["id"], **call} if isinstance(item.get("id"), str) else call


def _loss(value: Any, role: str, where: str) -> float | bool:
    number = isinstance(value, (bool, int, float)) and math.isfinite(value) and value >= 0
    if not number:
        raise BadRowError(f"{where}: loss is {value!r}, not true, false or a number from 0")
    if value and role not in ("assistant", "tool_call"):
        raise BadRowError(f"{where}: loss is {value!r}, but only what the assistant says is learnt")
    return value


def check_turns(messages: Sequence[Message], answered: bool = True, alternate: bool = False) -> None:
    """What holds of every conversation, whatever wrote it.

    Args:
        answered: whether it must end with the assistant's answer.
        alternate: whether two user messages may not follow each other.

    Raises:
        BadRowError: a turn is out of place.
    """
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise BadRowError(f"message {roles.index('system', 1) + 1} is a second or late system message")
    if "user" not in roles:
        raise BadRowError("there is no user message")
    for number, (before, role) in enumerate(zip(["", *roles], roles, strict=False), 1):
        if role == "tool" and before not in ("assistant", "tool"):
            raise BadRowError(f"message {number} is a tool's result, but no assistant message stands before it")
        if role == before and (role == "assistant" or (role == "user" and alternate)):
            raise BadRowError(f"messages {number - 1} and {number} are both of the {role}")
    if answered and roles[-1] != "assistant":
        raise BadRowError(f"the last message is of the {roles[-1]}: there is no answer to learn")


def with_system(messages: list[Message], row: Mapping[str, Any]) -> list[Message]:
    """`messages` with the text of the row's ``system`` column before them."""
    text = as_text(row["system"], "system", empty=True) if has(row, "system") else ""
    if not text.strip():
        return messages
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] != text:
            raise BadRowError("the column system says another thing than the system message")
        return messages
    return [{"role": "system", "content": text}, *messages]


def read_tools(row: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The column ``tools``: functions as OpenAI describes them, with or without the envelope, in a list or as JSON.

    Raises:
        BadRowError: it holds something else; or the row has pictures or sounds.
    """
    refuse_media(row)
    value = row.get("tools")
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    tools = []
    for number, item in enumerate(as_list(value, "tools"), 1):
        tool = from_json(item, f"tools, entry {number}") if isinstance(item, str) else item
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRowError(f"tools, entry {number} is not the description of a function with a name")
        tools.append({"type": "function", "function": dict(function)})
    return tuple(tools)


def history_messages(row: Mapping[str, Any]) -> list[Message]:
    """The column ``history``: earlier rounds as [query, response] pairs."""
    value = row.get("history")
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    messages: list[Message] = []
    for number, pair in enumerate(as_list(value, "history"), 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRowError(f"history, round {number} is not a pair [query, response]")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": as_text(text, f"history, round {number} ({role})")})
    return messages
