"""ReAct (arXiv:2210.03629), with the prompt that LangChain made common.

A call is ``Action:`` and ``Action Input:``; generation stops at ``Observation:``, and the result stands behind it in
the same turn. What the assistant says is written as the rows have it (with ``Thought:`` and ``Final Answer:`` if they
do).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from swift_dist.data.templates.agents._turns import Message, as_json, functions, in_one_turn, paragraphs, with_system

PROMPT = """Answer the following questions as best you can. You have access to the following tools:

{tools}

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [{names}]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!"""


def render(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[Message]:
    described = functions(tools)
    prompt = PROMPT.format(
        tools="\n\n".join(as_json(tool) for tool in described), names=",".join(tool["name"] for tool in described)
    )
    turns = in_one_turn(messages, write_calls, write_results)
    return with_system(turns, lambda system: paragraphs(system, prompt)) if described else turns


def write_calls(calls: list[dict[str, Any]]) -> str:
    actions = [f"Action: {call['name']}\nAction Input: {as_json(call['arguments'])}\n" for call in calls]
    return "".join(actions) + "Observation:"


def write_results(results: list[str]) -> str:
    return "Observation:".join(f" {result.strip()}\n" for result in results)
