"""The longest length that fits: which one to try next. Pure: tries made so far in, a length out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

PER_DOUBLING = 8
"""Lengths looked at between L and 2 L, L included: what is found is at most an eighth of L short of the longest."""
_PREDICTED = 8
"""Tries that may follow the memory measured so far; what is left goes by doubling and bisection, which always end."""
_FARTHEST = 2 * PER_DOUBLING
"""Steps on the list (two doublings) that a prediction may go beyond what fits: it may be wrong, and memory runs out."""


@dataclass(frozen=True)
class Try:
    """A length, and what came of it.

    Args:
        length: tokens of the sequence.
        fits: all ranks stayed within the memory.
        peak_bytes: the largest peak of a rank; None where it did not come so far.
        step_seconds: of a step after the first; None where it did not fit.
        reason: why not, "" where it fits.
        timed_out: it took longer than it may; whether it would fit is not known.
    """

    length: int
    fits: bool
    peak_bytes: int | None = None
    step_seconds: float | None = None
    reason: str = ""
    timed_out: bool = False

    @classmethod
    def of(cls, values: dict[str, Any]) -> Try:
        """From a mapping that may hold more."""
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})


def lengths_between(shortest: int, longest: int) -> tuple[int, ...]:
    """The lengths that are looked at: `shortest`, its doublings, seven evenly between each and the next, `longest`.

    >>> lengths_between(1024, 2560)
    (1024, 1152, 1280, 1408, 1536, 1664, 1792, 1920, 2048, 2304, 2560)
    """
    assert 0 < shortest <= longest
    found, base = {longest}, shortest
    while base <= longest:
        found |= {base + base * part // PER_DOUBLING for part in range(PER_DOUBLING)}
        base *= 2
    return tuple(sorted(length for length in found if length <= longest))


def bracket(tries: Iterable[Try]) -> tuple[Try | None, Try | None]:
    """The longest that fits, and the shortest that does not. (None: there is none yet.)

    A longer one that fits, beside a shorter one that does not, is passed over: what is told is to hold for all below.
    """
    tries = list(tries)
    failed = min((t for t in tries if not t.fits), key=lambda t: t.length, default=None)
    fitting = [t for t in tries if t.fits and (failed is None or t.length < failed.length)]
    return max(fitting, key=lambda t: t.length, default=None), failed


def next_length(
    lengths: Sequence[int],
    tries: Sequence[Try],
    memory: int | None,
    guess: int | None = None,
    shortest: Try | None = None,
) -> int | None:
    """The length to try next; None: the longest that fits is known, or that none does.

    Peaks of tries that fit lie on a line as long as activations grow with the length (attention's own memory does too
    where it is computed blockwise), so the first tries go where the line of the last two meets the memory. The rest is
    doubling until one does not fit, then bisection.

    Args:
        lengths: ascending (`lengths_between`).
        tries: made so far, of these lengths.
        memory: bytes that a rank may take; None: unknown, nothing is predicted.
        guess: the length to begin with; None: the shortest.
        shortest: a try of another search: what it took is weights for the most part, and stands in for the first of the
            two that make the line.
    """
    if not tries:
        return max((length for length in lengths if guess is not None and length <= guess), default=lengths[0])
    best, failed = bracket(tries)
    low = lengths.index(best.length) if best else -1
    high = lengths.index(failed.length) if failed else len(lengths)
    if high - low == 1:
        return None
    wanted = _predicted(lengths, tries, memory, shortest) if len(tries) < _PREDICTED else None
    if best is None:
        wanted = high - PER_DOUBLING  # below a guess that failed: half of it, and so on
    elif failed is None:
        wanted = min(low + PER_DOUBLING if wanted is None else wanted, low + _FARTHEST)
    elif wanted is None or wanted >= high:  # what failed shows that the line is none
        wanted = (low + high) // 2
    return lengths[min(max(wanted, low + 1), high - 1)]


def _predicted(lengths: Sequence[int], tries: Iterable[Try], memory: int | None, shortest: Try | None) -> int | None:
    """Index of the longest length whose peak, on the line through the two longest that fit, is within the memory."""
    measured = sorted((t for t in tries if t.fits and t.peak_bytes), key=lambda t: t.length)[-2:]
    if len(measured) == 1 and shortest is not None and shortest.length < measured[0].length:
        measured = [shortest, *measured]
    if memory is None or len(measured) < 2:
        return None
    (first, second) = measured
    assert first.peak_bytes is not None and second.peak_bytes is not None
    rise = (second.peak_bytes - first.peak_bytes) / (second.length - first.length)
    if rise <= 0:
        return None
    longest = second.length + (memory - second.peak_bytes) / rise
    return max((index for index, length in enumerate(lengths) if length <= longest), default=None)
