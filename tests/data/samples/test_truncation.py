"""What becomes of sequences that are too long."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swift_dist.data.rows.base import BadRowError
from swift_dist.data.samples import truncation
from swift_dist.data.samples.truncation import LeftOutError
from swift_dist.data.templates.base import Encoded
from tests.data.samples.cases import sequence


def of(text: str) -> Encoded:
    """One token a letter; capitals learn."""
    return Encoded(
        np.array([ord(letter) for letter in text], np.int32), np.array([float(c.isupper()) for c in text], np.float32)
    )


def text(encoded: Encoded) -> str:
    """As `of` reads it."""
    letters = zip(encoded.ids.tolist(), encoded.weights.tolist(), strict=True)
    return "".join(chr(token).upper() if weight else chr(token).lower() for token, weight in letters)


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ("left", ["dEFGH"]),  # D is the first token: nothing to predict it from
        ("right", ["abcDE"]),
        ("split", ["abcDE", "eFGH"]),
        ("delete", None),
    ],
)
def test_single(how, kept):
    whole = of("abcDEFGH")
    if kept is None:
        with pytest.raises(LeftOutError, match=r"^too long \(8 tokens\)$"):
            truncation.single(whole, 5, how)
    else:
        assert [text(s.sequences[0]) for s in truncation.single(whole, 5, how)] == kept
    assert text(truncation.single(whole, 8, how)[0].sequences[0]) == "abcDEFGH"


def test_nothing_left_to_learn():
    with pytest.raises(LeftOutError, match="no token has a weight within 3 tokens"):
        truncation.single(of("abcDE"), 3, "right")
    with pytest.raises(LeftOutError, match="no token has a weight: nothing to learn"):
        truncation.single(of("abc"), 3, "right")
    with pytest.raises(LeftOutError, match="no token has a weight"):
        truncation.single(of("Abc"), 3, "right")  # only a token that nothing stands before
    with pytest.raises(LeftOutError, match="no token has a weight within 4 tokens"):
        truncation.pair(of("abcDE"), of("abcdeF"), 4, "right")


@given(st.lists(st.floats(0, 2, width=32), min_size=2, max_size=60), st.integers(2, 20))
def test_split_predicts_every_token_once(weights, limit):
    """Each (token before, token, weight) of the whole is in one piece, and no other."""
    whole = sequence(len(weights), first=100, weights=[0.0, *weights[1:]])

    def predictions(piece: Encoded) -> list[tuple]:
        ids, given = piece.ids.tolist(), piece.weights.tolist()
        return [(a, b, w) for a, b, w in zip(ids, ids[1:], given[1:], strict=False) if w]

    try:
        pieces = [sample.sequences[0] for sample in truncation.single(whole, limit, "split")]
    except LeftOutError:
        pieces = []
    assert all(len(piece) <= limit and piece.weights[0] == 0 for piece in pieces)
    assert [p for piece in pieces for p in predictions(piece)] == predictions(whole)


def test_pair_loses_the_same_prompt():
    sample = truncation.pair(of("abcdEF"), of("abcdEFGH"), 6, "left")
    assert [text(s) for s in sample.sequences] == ["cdEF", "cdEFGH"]
    sample = truncation.pair(of("abEF"), of("abEFGHIJ"), 4, "left")  # an answer that does not fit on its own
    assert [text(s) for s in sample.sequences] == ["eF", "gHIJ"]
    sample = truncation.pair(of("abEF"), of("abEFGHIJ"), 4, "right")
    assert [text(s) for s in sample.sequences] == ["abEF", "abEF"]
    with pytest.raises(LeftOutError, match=r"too long \(8 tokens\)"):
        truncation.pair(of("abEF"), of("abEFGHIJ"), 4, "delete")


@pytest.mark.parametrize(("how", "mismatched"), [("delete", "abXY"), ("right", "abXY"), ("left", "xYZW")])
def test_a_mismatched_answer_is_cut_and_never_leaves_its_sample_out(how, mismatched):
    sample = truncation.judged(of("abCD"), of("abXYZW"), True, 4, how)
    assert [text(s) for s in sample.sequences] == ["abCD", mismatched] and sample.label == 1
    if how == "delete":
        with pytest.raises(LeftOutError, match="too long"):
            truncation.judged(of("abCDE"), of("abX"), True, 4, how)


@pytest.mark.parametrize(
    ("how", "ids", "weights", "labels"),
    [("right", [0, 1, 2], [1, 0, 0], [7]), ("left", [3, 4, 5], [0, 1, 0], [9])],
)
def test_labels_of_words_go_with_their_tokens(how, ids, weights, labels):
    whole = sequence(6, weights=[1, 0, 1, 0, 1, 0])
    sample = truncation.classified_words(whole, [7, -100, 9], 3, how)
    assert sample.sequences[0].ids.tolist() == ids and sample.sequences[0].weights.tolist() == weights
    assert sample.label == labels


def test_words_that_do_not_count_are_no_sample():
    with pytest.raises(BadRowError, match="nothing to learn"):
        truncation.classified_words(sequence(4, weights=[1, 0, 1, 0]), [-100, -100], 4, "delete")
