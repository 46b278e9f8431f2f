"""Which dataset each sample comes from: evenly interleaved, exact shares, random access.

Sample i comes from the dataset whose share contains x_i = (a i + b) mod m, with a step a of about m / golden ratio:
such points fill the circle evenly (Kronecker sequence), so after any number of samples each dataset's count is within a
few samples of its share. The source of sample i depends on (seed, shares, i) and on nothing that comes later. How many
of the first N samples belong to a dataset, which a resumed run has to know, is a sum of floors with an O(log m)
solution.

With weights m is 2^62. With sizes or epochs m is the total number of samples, and every m samples hold exactly
each dataset's count.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from math import gcd

import numpy as np

from swift_dist.data.order import derive

_WEIGHT_MODULUS = 1 << 62
_GOLDEN = Fraction(2**64, 11400714819323198485)  # golden ratio, to 64 bits


def _floor_sum(n: int, m: int, a: int, b: int) -> int:
    """Sum over 0 <= i < n of floor((a i + b) / m), for a, b >= 0: Euclid's algorithm on (a, m)."""
    total = 0
    while n:
        total += (n - 1) * n // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        top = a * n + b
        n, b, m, a = top // m, top % m, a, m
    return total


def _largest_quotient(a: int, m: int) -> int:
    """Largest partial quotient of the continued fraction of a / m: the smaller, the more even the sequence."""
    largest = 1
    while a:
        largest, m, a = max(largest, m // a), a, m % a
    return largest


def _even_step(m: int) -> int:
    """A step near m / golden ratio, coprime to m, that spreads most evenly among 64 candidates."""
    start = int(m / _GOLDEN)
    candidates = [a for a in range(start, start + 256) if gcd(a, m) == 1][:64]
    return min(candidates, key=lambda a: _largest_quotient(a % m, m)) % m


class Blend:
    """The interleaving of datasets.

    Args:
        shares: one positive integer per dataset, summing to `modulus`.
        seed: the job's train.seed.
    """

    def __init__(self, shares: list[int], seed: int) -> None:
        assert shares and all(share > 0 for share in shares)
        self.bounds = [sum(shares[: k + 1]) for k in range(len(shares))]
        self.modulus = self.bounds[-1]
        self.step = _even_step(self.modulus)
        self.offset = int.from_bytes(derive(seed, "blend", size=8), "little") % self.modulus

    @classmethod
    def from_weights(cls, weights: list[float], seed: int) -> Blend:
        """Shares proportional to the weights, to 2^-62."""
        exact = [Fraction(weight) for weight in weights]
        total, bounds = sum(exact), [0]
        for k in range(len(exact)):
            bounds.append(int(_WEIGHT_MODULUS * sum(exact[: k + 1]) / total))
        return cls([high - low for low, high in pairwise(bounds)], seed)

    def counts(self, num_samples: int) -> list[int]:
        """How many of the first `num_samples` samples each dataset gives."""
        m, a, b = self.modulus, self.step, self.offset
        # floor(y / m) - floor((y - t) / m) is 1 where y mod m < t, and 0 elsewhere.
        whole = _floor_sum(num_samples, m, a, b)
        below = [0] + [whole - _floor_sum(num_samples, m, a, b - t + m) + num_samples for t in self.bounds]
        return [high - low for low, high in pairwise(below)]

    def locate(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Where samples start ... start + count - 1 come from.

        Returns:
            source: int64 [count], the dataset of each; ordinal: int64 [count], how many samples that dataset has given
            before it since sample 0.
        """
        m, a = self.modulus, self.step
        first = (a * start + self.offset) % m
        points = np.array([(first + a * j) % m for j in range(count)], dtype=np.int64)
        source = np.searchsorted(np.array(self.bounds[:-1], dtype=np.int64), points, side="right").astype(np.int64)
        ordinal = np.empty(count, dtype=np.int64)
        for k, before in enumerate(self.counts(start)):
            mine = np.flatnonzero(source == k)
            ordinal[mine] = before + np.arange(mine.size)
        return source, ordinal
