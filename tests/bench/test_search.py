"""Which length is tried next: against memory that is a function of the length, without any process."""

from __future__ import annotations

import itertools
import math

import pytest

from swift_dist.bench.search import PER_DOUBLING, Try, bracket, lengths_between, next_length


def search(lengths, peak, memory, guess=None, told=True):
    """(longest that fits, tries) where a length takes `peak(length)` bytes of `memory`."""
    tries = []
    while (length := next_length(lengths, tries, memory if told else None, guess)) is not None:
        assert length in lengths and length not in [t.length for t in tries]
        size = peak(length)
        tries.append(Try(length, size <= memory, size if size <= memory else None))
    return bracket(tries)[0], tries


def test_lengths_are_eighths_of_doublings_and_both_ends():
    lengths = lengths_between(1000, 9001)
    assert lengths[:9] == (1000, 1125, 1250, 1375, 1500, 1625, 1750, 1875, 2000)
    assert lengths[-1] == 9001 and lengths == tuple(sorted(set(lengths)))
    assert all(b / a <= 1 + 1 / PER_DOUBLING for a, b in itertools.pairwise(lengths))
    assert lengths_between(64, 64) == (64,)


SHAPES = {
    "a line": lambda n: 1000 + 3 * n,
    "flat, then a line": lambda n: max(50_000, 3 * n),
    "flat, then steep": lambda n: max(30_000 + n // 100, 20 * n - 50_000),
    "square": lambda n: n * n // 500,
    "steps": lambda n: 3 * (n // 4096) * 4096 + n,
    "no memory at all": lambda n: 0,
}


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("guess", [None, 1024, 20_000, 1 << 20])
@pytest.mark.parametrize("shape", SHAPES)
def test_finds_the_longest_that_fits(shape, guess, told):
    lengths, peak = lengths_between(1024, 1 << 20), SHAPES[shape]
    for memory in (1, 5_000, 60_000, 400_000, 10_000_000_000_000):
        best, tries = search(lengths, peak, memory, guess, told)
        fitting = [length for length in lengths if peak(length) <= memory]
        assert (best.length if best else None) == (max(fitting) if fitting else None)
        assert len(tries) <= 8 + 2 * math.ceil(math.log2(len(lengths)))


@pytest.mark.parametrize("memory", [10_000, 111_111, 1_000_000])
def test_a_line_takes_few_tries(memory):
    """The shortest, its double, no more than two doublings at once to where the line meets the memory, one beyond."""
    _, tries = search(lengths_between(1024, 1 << 20), SHAPES["a line"], memory)
    assert len(tries) <= 4 + math.ceil(math.log2(memory / 3 / 2048) / 2)


def test_another_search_gives_the_line_its_first_point():
    lengths, peak = lengths_between(1024, 1 << 20), SHAPES["a line"]
    tries = [Try(8192, True, peak(8192))]
    assert next_length(lengths, tries, 100_000) == 16384
    assert next_length(lengths, tries, 100_000, shortest=Try(1024, True, peak(1024))) == 32768
    for unfit in (Try(1024, True, peak(9000)), Try(9216, True, 1)):  # more than it; longer than it
        assert next_length(lengths, tries, 100_000, shortest=unfit) == 16384


def test_a_line_that_a_failure_belies_is_left():
    """Short sequences cost next to nothing beside the floor: their line ends far beyond the memory."""
    _, tries = search(lengths_between(256, 1 << 16), lambda n: max(1000 + n // 100, n), 1300)
    assert [t.length for t in tries] == [256, 512, 2048, 1024, 1536, 1280, 1408]


def test_a_prediction_goes_no_further_than_two_doublings_at_once():
    """It may be wrong, and beyond the memory of a machine there are other people's processes."""
    _, tries = search(lengths_between(1024, 1 << 20), lambda n: 1_000_000 + n // 1000, 1_001_050)
    best = 1024
    for made in tries[1:]:
        assert made.length <= 4 * best
        best = max(best, made.length if made.fits else 0)


def test_what_fits_beyond_a_failure_is_not_told():
    tries = [Try(64, True, 1), Try(128, False), Try(256, True, 2)]
    best, failed = bracket(tries)
    assert (best.length, failed.length) == (64, 128)
