"""From weights of characters to weights of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from swift_dist.data.rows.base import BadRowError


def token_weights(
    text: str, offsets: np.ndarray, character_weights: np.ndarray, answers: Sequence[tuple[int, int]]
) -> np.ndarray:
    """The weight of each token: the least of its characters' weights.

    So a token that holds a character that the model is given does not learn. Only white space behind an answer, which
    some tokenizers make part of the token that ends the turn (Phi-3's ``<|end|>``), does not count.

    Args:
        text: what was tokenised, in one go.
        offsets: int64 [n, 2], each token's characters [start, end).
        character_weights: float32 [len(text)].
        answers: characters [start, end) of each.

    Returns:
        float32 [n]; the first is 0: nothing stands before it.

    Raises:
        BadRowError: a token lies across the beginning of an answer: asked with the prompt alone, the model would see
            other tokens.
    """
    if not len(offsets):
        return np.zeros(0, np.float32)
    starts, ends = _whole(offsets)
    for begin, end in answers:
        across = (starts < begin) & (begin < ends)
        if across.any():
            at = int(np.flatnonzero(across)[0])
            raise BadRowError(
                f"an answer begins inside the token {text[starts[at] : ends[at]]!r}, which the prompt before it would "
                "not end with: take the white space from the answer's beginning"
            )
        ends = np.where((starts < end) & (end < ends), end, ends)
    last = max(len(text) - 1, 0)
    weights = character_weights[np.minimum(starts, last)].copy()
    changes = np.concatenate([[0], np.cumsum(np.diff(character_weights) != 0)])
    mixed = changes[np.minimum(starts, last)] != changes[np.clip(ends - 1, 0, last)]
    for index in np.flatnonzero(mixed & (ends > starts)):
        weights[index] = character_weights[starts[index] : ends[index]].min()
    weights[0] = 0
    return weights


def _whole(offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends, with the spaces that some tokenizers trim from offsets given to the token after them."""
    ends = np.maximum.accumulate(offsets[:, 1])
    before = np.concatenate([[0], ends[:-1]])
    return np.minimum(offsets[:, 0], before), ends
