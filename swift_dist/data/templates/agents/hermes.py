"""Hermes' format (NousResearch's Hermes 2 Pro), as Qwen 2.5 and 3 write it: JSON between tags.

Results of tools are turns of the user, so this works with every chat template.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from swift_dist.data.templates.agents._turns import Message, as_json, functions, paragraphs, with_system

PROMPT = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def render(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[Message]:
    written: list[Message] = []
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            response = f"<tool_response>\n{message['content']}\n</tool_response>"
            if index and messages[index - 1]["role"] == "tool":
                written[-1]["content"] += "\n" + response
            else:
                written.append({"role": "user", "content": response})
        elif message.get("tool_calls"):
            calls = [_write_call(call["function"]) for call in message["tool_calls"]]
            kept = {key: value for key, value in message.items() if key != "tool_calls"}
            written.append({**kept, "content": "\n".join([*filter(None, [message["content"]]), *calls])})
        else:
            written.append(dict(message))
    if not tools:
        return written
    wrapped = [json.dumps({"type": "function", "function": tool}, ensure_ascii=False) for tool in functions(tools)]
    prompt = PROMPT.format(tools="\n".join(wrapped))
    return with_system(written, lambda system: paragraphs(system, prompt))


def _write_call(call: dict[str, Any]) -> str:
    return f'<tool_call>\n{{"name": "{call["name"]}", "arguments": {as_json(call["arguments"])}}}\n</tool_call>'
