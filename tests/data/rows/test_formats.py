"""What each format makes of rows, and which rows it takes for its own."""

from __future__ import annotations

import json

import pytest

from swift_dist.data.rows import Row
from swift_dist.data.rows._formats import detect, find_format, formats
from swift_dist.data.rows.catalogue import CATALOGUE
from swift_dist.errors import JobError
from tests.data.rows.turns import ASKED, CALL, IN_PARIS, REACT, RESULT, WEATHER, gpt, human, rows, says, system, user

# (case, format, row as written, what it is read as); all are detected too, unless the case says "explicit"
GOOD: list[tuple[str, str, dict, Row]] = [
    ("plain", "messages", {"messages": [system("s"), *ASKED]}, rows(system("s"), *ASKED)),
    ("developer is system", "messages", {"messages": [{"role": "developer", "content": "s"}, *ASKED]},
     rows(system("s"), *ASKED)),
    ("json text", "messages", {"messages": json.dumps(ASKED)}, rows(*ASKED)),
    ("role and content in conversations", "messages", {"conversations": [*ASKED]}, rows(*ASKED)),
    ("react stays text", "messages", {"messages": [user("q"), says(REACT)]}, rows(user("q"), says(REACT))),
    ("system column", "messages", {"system": "s", "messages": [*ASKED]}, rows(system("s"), *ASKED)),
    ("nulls are absent", "messages", {"messages": [{**user("q"), "tool_calls": None}, says("a")], "label": None},
     rows(*ASKED)),
    ("parts", "messages", {"messages": [user([{"type": "text", "text": "q"}]), says("a")]}, rows(*ASKED)),  # type: ignore[arg-type]
    ("losses", "messages", {"messages": [user("q"), says("a", loss=False), user("r"), says("b", loss=0.5)]},
     rows(user("q"), says("a", loss=False), user("r"), says("b", loss=0.5))),
    ("OpenAI's weight", "messages", {"messages": [user("q"), says("a", weight=0), user("r"), says("b", weight=1)]},
     rows(user("q"), says("a", loss=0), user("r"), says("b", loss=1))),
    ("reasoning", "messages", {"messages": [user("q"), says("a", reasoning_content="r")]},
     rows(user("q"), says("a", reasoning_content="r"))),
    ("thinking", "messages", {"messages": [user("q"), says("a", thinking="r", reasoning=None)]},
     rows(user("q"), says("a", reasoning_content="r"))),
    ("a call's parameters", "messages", {"messages": [user("q"), says("", tool_calls=[
        {"name": CALL["function"]["name"], "parameters": CALL["function"]["arguments"]}])]},
     rows(user("q"), says("", tool_calls=[CALL]))),
    ("two users", "messages", {"messages": [user("p"), user("q"), says("a")]}, rows(user("p"), *ASKED)),
    ("tool calls", "messages", {
        "tools": [WEATHER],
        "messages": [user("q"), {"role": "assistant", "content": None, "tool_calls": [{"id": "1", **CALL}]},
                     {**RESULT, "tool_call_id": "1"}, says("a")]},
     rows(user("q"), says("", tool_calls=[{"id": "1", **CALL}]), {**RESULT, "tool_call_id": "1"}, says("a"),
          tools=(WEATHER,))),
    ("arguments as text, tools as json without envelope", "messages", {
        "tools": json.dumps([WEATHER["function"]]),
        "messages": [user("q"), says("t", tool_calls=[{"function": {"name": "weather", "arguments": IN_PARIS}}]),
                     RESULT, says("a")]},
     rows(user("q"), says("t", tool_calls=[CALL]), RESULT, says("a"), tools=(WEATHER,))),
    ("ms-swift's roles; calls join the text before them", "messages", {"messages": [
        user("q"), says("t"), {"role": "tool_call", "content": json.dumps(CALL["function"])},
        {"role": "tool_call", "content": '{"name": "f"}'}, {**RESULT, "role": "tool_response"}, RESULT, says("a")]},
     rows(user("q"), says("t", tool_calls=[CALL, {"type": "function", "function": {"name": "f", "arguments": {}}}]),
          RESULT, RESULT, says("a"))),
    ("function of old", "messages", {"messages": [
        user("q"), {"role": "assistant", "function_call": {"name": "weather", "arguments": IN_PARIS}},
        {"role": "function", "name": "weather", "content": "rain"}, says("a")]},
     rows(user("q"), says("", tool_calls=[CALL]), {**RESULT, "name": "weather"}, says("a"))),
    ("a result as an object", "messages", {"messages": [
        user("q"), says("", tool_calls=[CALL]), {"role": "tool", "content": {"é": 1}}, says("a")]},
     rows(user("q"), says("", tool_calls=[CALL]), {"role": "tool", "content": '{"é": 1}'}, says("a"))),
    ("plain", "sharegpt", {"conversations": [human("q"), gpt("a"), human("r"), gpt("b")]},
     rows(*ASKED, user("r"), says("b"))),
    ("json text", "sharegpt", {"conversations": json.dumps([human("q"), gpt("a")])}, rows(*ASKED)),
    ("tools", "sharegpt", {
        "system": "s", "tools": json.dumps([WEATHER]),
        "conversations": [human("q"), {"from": "function_call", "value": json.dumps(CALL["function"])},
                          {"from": "observation", "value": "rain"}, gpt("a")]},
     rows(system("s"), user("q"), says("", tool_calls=[CALL]), RESULT, says("a"), tools=(WEATHER,))),
    ("thinking", "sharegpt", {"conversations": [human("q"), {**gpt("a"), "reasoning": "r"}]},
     rows(user("q"), says("a", reasoning_content="r"))),
    ("user and assistant", "sharegpt",
     {"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]}, rows(*ASKED)),
    ("plain", "toolbench", {"conversations": [
        {"from": "system", "value": "s"}, {"from": "user", "value": "q"}, {"from": "assistant", "value": REACT},
        {"from": "function", "value": "rain"}, {"from": "assistant", "value": "a"}]},
     rows(system("s"), user("q"), says(REACT), RESULT, says("a"))),
    ("explicit, without function", "toolbench",
     {"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]}, rows(*ASKED)),
    ("with input", "alpaca", {"instruction": "i", "input": "x", "output": "a"}, rows(user("i\nx"), says("a"))),
    ("without input", "alpaca", {"instruction": "q", "input": "", "output": "a"}, rows(*ASKED)),
    ("history and system", "alpaca",
     {"instruction": "q", "output": "a", "history": [["p", "o"]], "system": "s"},
     rows(system("s"), user("p"), says("o"), *ASKED)),
    ("query", "query_response", {"query": "q", "response": "a", "system": "s", "history": [["p", "o"]]},
     rows(system("s"), user("p"), says("o"), *ASKED)),
    ("prompt", "query_response", {"prompt": "q", "completion": "a", "id": 3}, rows(*ASKED)),
    ("question", "query_response", {"question": "q", "answer": "a"}, rows(*ASKED)),
    ("TRL's lists", "query_response", {"prompt": [system("s"), user("q")], "completion": [says("a")]},
     rows(system("s"), *ASKED)),
    ("prompt and texts", "preference", {"prompt": "q", "chosen": "a", "rejected": "b"},
     rows(*ASKED, rejected=(says("b"),), num_answer=1)),
    ("prompt and lists", "preference", {"prompt": [user("q")], "chosen": [says("a")], "rejected": [says("b")]},
     rows(*ASKED, rejected=(says("b"),), num_answer=1)),
    ("conversations, prompt said again", "preference", {
        "prompt": "r", "chosen": [*ASKED, user("r"), says("c")], "rejected": [*ASKED, user("r"), says("d")],
        "messages": [*ASKED, user("r"), says("c")], "score_chosen": 8.0},
     rows(*ASKED, user("r"), says("c"), rejected=(says("d"),), num_answer=1)),
    ("conversations that part early", "preference", {
        "chosen": [user("q"), says("a"), user("r"), says("c")], "rejected": [user("q"), says("b")]},
     rows(*ASKED, user("r"), says("c"), rejected=(says("b"),), num_answer=3)),
    ("hh-rlhf", "preference", {
        "chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: c",
        "rejected": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: d"},
     rows(*ASKED, user("r"), says("c"), rejected=(says("d"),), num_answer=1)),
    ("a transcript as prompt", "preference",
     {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": "a", "rejected": "b"},
     rows(*ASKED, rejected=(says("b"),), num_answer=1)),
    ("alpaca", "preference", {"instruction": "i", "input": "x", "chosen": "a", "rejected": "b"},
     rows(user("i\nx"), says("a"), rejected=(says("b"),), num_answer=1)),
    ("sharegpt", "preference", {"conversations": [human("q")], "chosen": gpt("a"), "rejected": gpt("b")},
     rows(*ASKED, rejected=(says("b"),), num_answer=1)),
    ("orca", "preference", {"system": "s", "question": "q", "chosen": "a", "rejected": "b"},
     rows(system("s"), *ASKED, rejected=(says("b"),), num_answer=1)),
    ("messages and rejected_response", "preference",
     {"messages": [*ASKED, user("r"), says("c")], "rejected_response": "d"},
     rows(*ASKED, user("r"), says("c"), rejected=(says("d"),), num_answer=1)),
    ("messages and rejected_messages", "preference",
     {"messages": [system("s"), *ASKED], "rejected_messages": [system("s"), user("q"), says("b")]},
     rows(system("s"), *ASKED, rejected=(says("b"),), num_answer=1)),
    ("query and rejected_response", "preference", {"query": "q", "response": "a", "rejected_response": "b"},
     rows(*ASKED, rejected=(says("b"),), num_answer=1)),
    ("prompt", "kto", {"prompt": "q", "completion": "a", "label": 1}, rows(*ASKED, label=True, num_answer=1)),
    ("lists", "kto", {"prompt": [user("q")], "completion": [says("a")], "label": False},
     rows(*ASKED, label=False, num_answer=1)),
    ("messages", "kto",
     {"messages": [*ASKED, user("r"), says("", tool_calls=[CALL]), RESULT, says("c")], "label": False},
     rows(*ASKED, user("r"), says("", tool_calls=[CALL]), RESULT, says("c"), label=False, num_answer=3)),
    ("csv", "kto", {"query": "q", "response": "a", "label": "False"}, rows(*ASKED, label=False, num_answer=1)),
    ("kto_tag", "kto", {"instruction": "q", "output": "a", "kto_tag": True}, rows(*ASKED, label=True, num_answer=1)),
    ("explicit, conversation with a number", "kto", {"messages": [*ASKED], "label": 0},
     rows(*ASKED, label=False, num_answer=1)),
    ("class", "classification", {"text": "t", "label": 2}, Row(text="t", label=2)),
    ("class in csv", "classification", {"text": "t", "label": "2"}, Row(text="t", label=2)),
    ("classes", "classification", {"text": "t", "label": [0, 3]}, Row(text="t", label=[0, 3])),
    ("number", "classification", {"text": "t", "label": -0.5}, Row(text="t", label=-0.5)),
    ("messages", "classification", {"messages": [user("q")], "label": 0}, rows(user("q"), label=0)),
    ("sharegpt", "classification", {"conversations": [human("q")], "label": 1}, rows(user("q"), label=1)),
    ("query", "classification", {"query": "q", "system": "s", "label": 1}, rows(system("s"), user("q"), label=1)),
    ("explicit, whole conversation", "classification", {"messages": [*ASKED], "label": 1}, rows(*ASKED, label=1)),
    ("tokens", "token_classification", {"id": "0", "tokens": ["A", "b", "c"], "ner_tags": [1, 0, -100]},
     Row(text="A b c", label=[1, 0, -100])),
    ("words in csv", "token_classification", {"words": '["A", "b"]', "labels": "[1, 0]"},
     Row(text="A b", label=[1, 0])),
    ("text", "text", {"text": "t\nu ", "url": "x"}, Row(text="t\nu ")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "read"), [c[1:] for c in GOOD], ids=[f"{c[1]}: {c[0]}" for c in GOOD])
def test_good_rows(name: str, row: dict, read: Row) -> None:
    before = json.dumps(row)
    assert find_format(name).read(row) == read
    assert json.dumps(row) == before  # read again by the next process


DETECTED = [case for case in GOOD if "explicit" not in case[0]]


@pytest.mark.parametrize(("name", "row"), [c[1:3] for c in DETECTED], ids=[f"{c[1]}: {c[0]}" for c in DETECTED])
def test_rows_are_detected_as_their_own_format_and_as_no_other(name: str, row: dict) -> None:
    assert detect(row) is find_format(name)
    assert [known.name for known in formats() if known.detect(row)] == [name]


@pytest.mark.parametrize("name", [known.name for known in formats()])
def test_examples(name: str) -> None:
    """What the documentation shows is read, and detected as nothing else."""
    known = find_format(name)
    assert [other.name for other in formats() if other.detect(known.example)] == [name]
    row = known.read(known.example)
    assert row.messages or row.text


def test_every_format_has_cases() -> None:
    assert {case[1] for case in GOOD} == {known.name for known in formats()}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [*ASKED], "label": 1},  # judged, or classified?
        {"query": "q", "response": "a", "label": 1},
        {"conversations": [human("q"), gpt("a")], "label": "easy"},
        {"instruction": "i", "response": "a"},
        {"chosen": "a"},
        {"premise": "a", "hypothesis": "b"},
        {},
    ],
)
def test_rows_that_could_be_anything_are_nobodys(row: dict) -> None:
    assert detect(row) is None


def test_a_wrong_name_of_a_format() -> None:
    with pytest.raises(JobError, match=r"^data\.format: 'mesages' is no format of rows; did you mean messages"):
        find_format("mesages")
    for name in ("source", "catalogue", "no.such:FORMAT"):
        with pytest.raises(JobError, match=r"^data\.format: "):
            find_format(name)
    assert find_format("swift_dist.data.rows.alpaca:FORMAT").name == "alpaca"


def test_the_catalogue_names_what_there_is() -> None:
    names = [entry.name for entry in CATALOGUE]
    assert len(set(names)) == len(names) >= 40
    for entry in CATALOGUE:
        assert find_format(entry.format)
        assert entry.hf or entry.ms
        assert all(part.count("/") == 1 for part in (entry.hf, entry.ms) if part)
