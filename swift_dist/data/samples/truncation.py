"""What becomes of sequences that are longer than data.sequence_length (`template.truncation`).

    delete  the sample is left out
    left    its last L tokens are kept (of a pair both lose the same part of their prompt)
    right   its first L tokens are kept
    split   pieces of L tokens that share one token with the next: every token but the first is predicted exactly once,
            by the piece in which it has something before it

A first token is predicted from nothing, so it never has a weight. A mismatched answer of KTO, which only estimates a
divergence, is cut (`left`: at its beginning, else at its end) and never leaves its sample out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from swift_dist.data.rows.base import BadRowError
from swift_dist.data.templates.base import Encoded

Truncation = Literal["delete", "left", "right", "split"]


class LeftOutError(BadRowError):
    """A row that is sound, but gives no sample under this job's template and sequence length."""


@dataclass(frozen=True)
class Sample:
    """One sample before it is stored.

    Args:
        sequences: one, or two side by side.
        label: of the sample (a number, a list of numbers, None), or of classified words the list of theirs.
    """

    sequences: tuple[Encoded, ...]
    label: Any = None


def cut(sequence: Encoded, begin: int, end: int) -> Encoded:
    """Tokens [begin, end); the first of them predicted from nothing."""
    weights = sequence.weights[begin:end].copy()
    if begin > 0 and len(weights):
        weights[0] = 0.0
    return Encoded(sequence.ids[begin:end], weights)


def learns(sequence: Encoded) -> bool:
    """Whether any token that has another before it has a weight."""
    return bool((sequence.weights[1:] > 0).any())


def single(sequence: Encoded, limit: int, how: Truncation) -> list[Sample]:
    """The samples of one sequence: none without a weight.

    Raises:
        LeftOutError: too long, or nothing in it learns.
    """
    if len(sequence) <= limit:
        pieces = [sequence]
    elif how == "split":
        # A piece begins with the last token of the one before; a last piece of one token would predict nothing.
        starts = range(0, len(sequence) - 1, max(1, limit - 1))
        pieces = [cut(sequence, start, start + limit) for start in starts]
    else:
        pieces = [_shortened(sequence, limit, how)]
    samples = [Sample((piece,)) for piece in pieces if learns(piece)]
    if not samples:
        raise _nothing_learns(limit if len(sequence) > limit else None)
    return samples


def pair(chosen: Encoded, rejected: Encoded, limit: int, how: Truncation) -> Sample:
    """A preference pair.

    Raises:
        LeftOutError: too long, or one of the answers has no token left.
    """
    longest = max(len(chosen), len(rejected))
    if longest > limit and how == "left":
        # The same prompt for both: otherwise the margin would compare answers to different questions.
        first = min(_prompt_length(chosen), _prompt_length(rejected), longest - limit)
        chosen, rejected = (cut(answer, first, len(answer)) for answer in (chosen, rejected))
    answers = tuple(_shortened(answer, limit, how) for answer in (chosen, rejected))
    if not all(map(learns, answers)):
        raise _nothing_learns(limit if longest > limit else None)
    return Sample(answers)


def judged(own: Encoded, mismatched: Encoded, label: bool, limit: int, how: Truncation) -> Sample:
    """An answer that KTO judges, beside the mismatched one.

    Raises:
        LeftOutError: the answer is too long, or nothing of it is left.
    """
    own = judged_answer(own, limit, how)
    return Sample((own, _shortened(mismatched, limit, "left" if how == "left" else "right")), int(label))


def judged_answer(own: Encoded, limit: int, how: Truncation) -> Encoded:
    """The answer alone, as `judged` stores it; raises as it does."""
    short = _shortened(own, limit, how)
    if not learns(short):
        raise _nothing_learns(limit if len(own) > limit else None)
    return short


def classified(sequence: Encoded, label: Any, limit: int, how: Truncation) -> Sample:
    """A sequence with its label.

    Raises:
        LeftOutError: too long.
    """
    return Sample((_shortened(sequence, limit, how),), label)


def classified_words(sequence: Encoded, labels: Sequence[int], limit: int, how: Truncation) -> Sample:
    """A sequence whose words have a label each; those below 0 do not count.

    Args:
        sequence: in which the token that stands for a word has a weight: of its own label, not of predicting it.
        labels: of the words, in order.

    Returns:
        The sample, with weights and labels of the words that count and are left.

    Raises:
        LeftOutError: too long, or no word that counts is left.
    """
    short = _shortened(sequence, limit, how)
    begin = len(sequence) - len(short) if how == "left" else 0
    weights, kept = np.zeros(len(short), np.float32), []
    for place, label in zip(np.flatnonzero(sequence.weights).tolist(), labels, strict=True):
        if label >= 0 and 0 <= place - begin < len(short):
            weights[place - begin] = sequence.weights[place]
            kept.append(label)
    if not kept:
        raise _nothing_learns(limit if len(sequence) > limit else None)
    return Sample((Encoded(short.ids, weights),), kept)


def _prompt_length(sequence: Encoded) -> int:
    """Tokens before the first that learns."""
    return int(np.argmax(sequence.weights > 0))


def _shortened(sequence: Encoded, limit: int, how: Truncation) -> Encoded:
    size = len(sequence)
    if size <= limit:
        return sequence
    if how == "left":
        return cut(sequence, size - limit, size)
    if how == "right":
        return cut(sequence, 0, limit)
    raise LeftOutError(f"too long ({size} tokens)")


def _nothing_learns(limit: int | None) -> LeftOutError:
    within = f" within {limit} tokens" if limit is not None else ""
    return LeftOutError(f"no token has a weight{within}: nothing to learn")
