"""Qwen-Agent's format of Qwen 1.5 and 2 (its ``qwen_fncall_prompt``): call, result and reply in one turn.

Generation stops at the result's sign; the result and the sign of the reply are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from swift_dist.data.templates.agents._turns import Message, as_json, functions, in_one_turn, paragraphs, with_system

PROMPT = """# Tools

## You have access to the following tools:

{tools}

## When you need to call a tool, please insert the following command in your reply, which can be called zero or \
multiple times according to your needs:

✿FUNCTION✿: The tool to use, should be one of [{names}]
✿ARGS✿: The input of the tool
✿RESULT✿: Tool results
✿RETURN✿: Reply based on tool results. Images need to be rendered as ![](url)"""


def render(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[Message]:
    described = functions(tools)
    prompt = PROMPT.format(
        tools="\n\n".join(_describe(tool) for tool in described), names=",".join(tool["name"] for tool in described)
    )
    turns = in_one_turn(messages, _write_calls, _write_results, before_reply=" ")
    return with_system(turns, lambda system: paragraphs(system, prompt)) if described else turns


def _describe(tool: dict[str, Any]) -> str:
    name, human = tool["name"], tool.get("name_for_human") or tool["name"]
    parameters = as_json(tool.get("parameters") or {})
    return (
        f"### {human}\n\n{name}: {tool.get('description') or ''} Parameters: {parameters} "
        "Format the arguments as a JSON object."
    )


def _write_calls(calls: list[dict[str, Any]]) -> str:
    written = [f"✿FUNCTION✿: {call['name']}\n✿ARGS✿: {as_json(call['arguments'])}\n" for call in calls]
    return "".join(written) + "✿RESULT✿:"


def _write_results(results: list[str]) -> str:
    return "✿RESULT✿:".join(f" {result.strip()}\n" for result in results) + "✿RETURN✿:"
