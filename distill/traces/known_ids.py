"""A set of trace ids in eight bytes each, so that the ids of ten million traces fit in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from distill.records import Array

RECENT = 1 << 16
"""New ids are kept in a set of Python's own, and sorted into the array when there are this many and an eighth of all."""
BLOCK = 1 << 16
DIGITS = np.full(256, 255, np.uint8)
DIGITS[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)
PLACES = np.uint64(4) * np.arange(15, -1, -1, dtype=np.uint64)


class KnownIds:
    """A growing set of ids. An id of 16 hexadecimal digits is its number; of any other, 64 bits of its hash are kept.

    Two of n such other ids are confused with a probability of n^2 / 2^65: 3e-6 for ten million.
    """

    def __init__(self) -> None:
        self._sorted: Array = np.empty(0, np.uint64)
        self._recent: set[int] = set()

    def add(self, ids: Iterable[str]) -> None:
        """Add ids; those that are there already stay."""
        listed = list(ids)
        for start in range(0, len(listed), BLOCK):
            self._recent.update(_numbers(listed[start : start + BLOCK]).tolist())
            if len(self._recent) >= max(RECENT, len(self._sorted) // 8):
                self._settle()

    def _settle(self) -> None:
        if self._recent:
            recent = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._sorted, self._recent = np.union1d(self._sorted, recent), set()

    def __contains__(self, trace_id: object) -> bool:
        number = _number(str(trace_id))
        if number in self._recent:
            return True
        place = int(np.searchsorted(self._sorted, np.uint64(number)))
        return place < len(self._sorted) and int(self._sorted[place]) == number

    def lacks(self, ids: Sequence[str]) -> Array:
        """Return for each id whether it is not in the set, bool [N]."""
        self._settle()
        numbers = _numbers(ids)
        places = np.searchsorted(self._sorted, numbers)
        inside = places < len(self._sorted)
        lacking = ~inside
        lacking[inside] = self._sorted[places[inside]] != numbers[inside]
        return lacking


def _numbers(ids: Sequence[str]) -> Array:
    """Return the number of each id, uint64 [N]."""
    joined = "".join(ids).encode("utf-8", "surrogatepass")
    if len(joined) == 16 * len(ids) and all(len(one) == 16 for one in ids):
        digits = DIGITS[np.frombuffer(joined, np.uint8)].reshape(-1, 16)
        if (digits < 16).all():
            return np.asarray(np.bitwise_or.reduce(digits.astype(np.uint64) << PLACES, axis=1))
    return np.array([_number(one) for one in ids], np.uint64)


def _number(trace_id: str) -> int:
    data = trace_id.encode("utf-8", "surrogatepass")
    if len(data) == 16 and (DIGITS[np.frombuffer(data, np.uint8)] < 16).all():
        return int(trace_id, 16)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
