"""A set of trace ids in eight bytes each, so that the ids of ten million traces fit in memory."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

import numpy as np

from distill.records import Array

RECENT = 1 << 16
"""New ids are kept in a set of Python's own, and sorted into the array when there are this many and an eighth of all."""
HEX = re.compile(r"[0-9a-f]{16}")


class KnownIds:
    """A growing set of ids. An id of 16 hexadecimal digits is its number; of any other, 64 bits of its hash are kept.

    Two of n such other ids are confused with a probability of n^2 / 2^65: 3e-6 for ten million.
    """

    def __init__(self) -> None:
        self._sorted: Array = np.empty(0, np.uint64)
        self._recent: set[int] = set()

    def add(self, ids: Iterable[str]) -> None:
        """Add ids; those that are there already stay."""
        self._recent.update(map(_number, ids))
        if len(self._recent) >= max(RECENT, len(self._sorted) // 8):
            both = np.concatenate([self._sorted, np.fromiter(self._recent, np.uint64, len(self._recent))])
            self._sorted = np.unique(both)
            self._recent = set()

    def __contains__(self, trace_id: object) -> bool:
        number = _number(str(trace_id))
        if number in self._recent:
            return True
        place = int(np.searchsorted(self._sorted, np.uint64(number)))
        return place < len(self._sorted) and int(self._sorted[place]) == number

    def __len__(self) -> int:
        inside = np.isin(np.fromiter(self._recent, np.uint64, len(self._recent)), self._sorted)
        return len(self._sorted) + len(self._recent) - int(inside.sum())


def _number(trace_id: str) -> int:
    if HEX.fullmatch(trace_id):
        return int(trace_id, 16)
    return int.from_bytes(hashlib.blake2b(trace_id.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
