"""Which sequences share a row: best-fit decreasing bin packing of integer lengths.

Longest first, each sequence goes into the fullest bin that still has room for it (Johnson et al. 1974,
https://doi.org/10.1137/0203025: at most 11/9 of the fewest bins + 6; on lengths as people have them, within a bin or
two of the fewest). Bins with the same room left are alike, so all sequences of one length are placed at once, in a
few numpy operations a length: the cost grows with the number of different lengths, not of sequences.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np


class _OpenBins:
    """Bins by the room that they have left."""

    def __init__(self) -> None:
        self._bins: dict[int, list[np.ndarray]] = {}
        self._rooms: list[int] = []  # sorted

    def put(self, room: int, bins: np.ndarray) -> None:
        if len(bins) == 0:
            return
        if room not in self._bins:
            self._bins[room] = []
            insort(self._rooms, room)
        self._bins[room].append(bins)

    def take_tightest(self, least: int) -> tuple[int, np.ndarray] | None:
        """All bins with the least room that is at least `least`."""
        at = bisect_left(self._rooms, least)
        if at == len(self._rooms):
            return None
        room = self._rooms.pop(at)
        bins = self._bins.pop(room)
        return room, bins[0] if len(bins) == 1 else np.concatenate(bins)


def pack(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Share out sequences to as few bins as best-fit decreasing finds.

    Args:
        lengths: integers [n], 1 <= length <= capacity. Among equal lengths, those that come first are placed first: a
            shuffled order of the same lengths gives the same bins with other sequences in them.
        capacity: of a bin.

    Returns:
        members: int64 [n], indices of the sequences, bin after bin; ends: int64 [bins], where each bin ends in them.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    assert lengths.min() >= 1 and lengths.max() <= capacity
    by_length = np.argsort(-lengths, kind="stable")
    ordered = lengths[by_length]
    begins = np.concatenate([[0], np.flatnonzero(np.diff(ordered)) + 1, [len(ordered)]])
    bin_of = np.empty(len(lengths), dtype=np.int64)  # of by_length's sequences
    open_bins, num_bins, shortest = _OpenBins(), 0, int(ordered[-1])
    for begin, end in zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True):
        length = int(ordered[begin])
        while begin < end:
            found = open_bins.take_tightest(length)
            if found is None:
                each = capacity // length
                room, bins = capacity, np.arange(num_bins, num_bins + -(-(end - begin) // each), dtype=np.int64)
                num_bins += len(bins)
            else:
                room, bins = found
                each = room // length
            # Best fit would fill a bin up before it turns to the next one with as much room.
            wanted = -(-(end - begin) // each)
            used, rest = bins[:wanted], bins[wanted:]
            placed = min(end - begin, each * len(used))
            bin_of[begin : begin + placed] = np.repeat(used, each)[:placed]
            begin += placed
            last = placed - each * (len(used) - 1)  # the last bin may have got fewer
            for left, these in ((room, rest), (room - each * length, used[:-1]), (room - last * length, used[-1:])):
                if left >= shortest:
                    open_bins.put(left, these)
    order = np.argsort(bin_of, kind="stable")
    return by_length[order], np.cumsum(np.bincount(bin_of, minlength=num_bins))
