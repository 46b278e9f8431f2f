"""The order of samples: a random-access permutation per epoch, computed, never stored.

An array of a permutation costs 8 bytes a sample: 2 GB a process for a corpus of 1e12 tokens at sequence length 4096.
A Feistel network is a bijection on [0, 4^h) for any round function; walking its cycles until the value falls below n
("cycle walking", Black & Rogaway 2002, https://web.cs.ucdavis.edu/~rogaway/papers/subset.pdf) makes it one on [0, n).
Any element costs a few multiplications, nothing is kept, and the result depends on no library's random stream.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np

_ROUNDS = 8


def derive(seed: int, purpose: str, number: int = 0, size: int = 64) -> bytes:
    """`size` pseudo-random bytes that depend on all arguments: BLAKE2b of seed and number, keyed by the purpose."""
    message = struct.pack("<QQ", seed, number)
    return hashlib.blake2b(message, digest_size=size, person=purpose.encode()[:16]).digest()


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al. 2014): every input bit changes every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Permutation:
    """A permutation of range(n) that depends on (seed, epoch) alone.

    Args:
        n: how many items, >= 1 and < 2^62.
        seed: the job's train.seed.
        epoch: each epoch has a permutation of its own.
    """

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        assert 1 <= n < 1 << 62
        self.n = n
        half = max(2, ((n - 1).bit_length() + 1) // 2)  # the network permutes [0, 4^half), at most 4n (16 for tiny n)
        self._half, self._low = np.uint64(half), np.uint64((1 << half) - 1)
        self._drop = np.uint64(64 - half)
        self._keys = np.frombuffer(derive(seed, "sample order", epoch, 8 * _ROUNDS), dtype="<u8").astype(np.uint64)

    def _network(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self._half, x & self._low
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) >> self._drop)
        return (left << self._half) | right

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Where each index goes. index: integers in [0, n), any shape; returns int64 of that shape."""
        out = self._network(np.asarray(index).astype(np.uint64).reshape(-1))
        while (outside := np.flatnonzero(out >= self.n)).size:
            out[outside] = self._network(out[outside])
        return out.astype(np.int64).reshape(np.shape(index))


def document_keys(seed: int, purpose: str, files: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Pseudo-random keys of documents, by their file and place in it: sorted by them, documents are shuffled.

    Args:
        files: int64 [n], index of each document's file; positions: int64 [n], where it begins there.

    Returns:
        uint64 [n].
    """
    first, second = np.frombuffer(derive(seed, purpose, size=16), dtype="<u8").astype(np.uint64)
    return _mix(_mix(positions.astype(np.uint64) ^ first) + _mix(files.astype(np.uint64) ^ second))
