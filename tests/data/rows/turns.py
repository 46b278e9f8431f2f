"""Pieces of rows for the tests of formats."""

from __future__ import annotations

from swift_dist.data.rows import Row


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def says(text: str, **more: object) -> dict:
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def human(text: str) -> dict:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict:
    return {"from": "gpt", "value": text}


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
IN_PARIS = '{"city": "Paris"}'
RESULT = {"role": "tool", "content": "rain"}
REACT = 'Thought: look it up\nAction: weather\nAction Input: {"city": "Paris"}\nObservation: rain\nFinal Answer: Yes.'
ASKED = (user("q"), says("a"))


def rows(*messages: dict, **more: object) -> Row:
    return Row(tuple(messages), **more)  # type: ignore[arg-type]
