"""Whatever JSON stands in the columns: a row is read, or BadRowError says why not; nothing else is raised."""

from __future__ import annotations

import copy
import json

from hypothesis import given, settings
from hypothesis import strategies as st

from swift_dist.data.rows import BadRowError, Row
from swift_dist.data.rows._fields import KNOWN_COLUMNS
from swift_dist.data.rows._formats import detect, formats

_KEYS = "role content from value tool_calls function name arguments loss type text id".split()
_WORDS = [
    *("user", "assistant", "system", "tool", "tool_call", "human", "gpt", "function_call", "observation", "function"),
    *("", " ", "x", "[]", "[1]", "{}", "true", "1", "NaN", '{"name": "f"}', '[{"role": "user", "content": "q"}]'),
    *("\n\nHuman: q\n\nAssistant: a", "\n\nAssistant: a", "\n\nHuman:"),
]
_LEAVES = st.one_of(
    st.sampled_from(_WORDS), st.none(), st.booleans(), st.integers(-101, 3), st.sampled_from([0.5, 1e400, float("nan")])
)
_TURNS = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": st.sampled_from(_WORDS[:5]), "content": _LEAVES}),
        st.fixed_dictionaries({"from": st.sampled_from(_WORDS[:10]), "value": _LEAVES}),
    ),
    max_size=4,
)
_VALUES = st.one_of(
    _TURNS,
    st.recursive(
        _LEAVES,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(_KEYS), inner, max_size=4), _TURNS
        ),
        max_leaves=8,
    ),
)
_ROWS = st.dictionaries(st.sampled_from([*sorted(KNOWN_COLUMNS), "images"]), _VALUES, max_size=5)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(_ROWS)
def test_any_row(row: dict) -> None:
    before = copy.deepcopy(row)
    detect(row)
    for known in formats():
        try:
            read = known.read(row)
        except BadRowError as error:
            assert str(error)
            continue
        assert isinstance(read, Row)
        assert (read.text is None) == bool(read.messages)
        assert len(read.messages) >= read.num_answer >= len(read.rejected[:1])
        assert all(isinstance(message["content"], str) for message in (*read.messages, *read.rejected))
        json.dumps([read.messages, read.rejected, read.tools, read.label])
    assert repr(row) == repr(before)  # NaN is not equal to itself
