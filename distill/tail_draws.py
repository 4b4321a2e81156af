"""Draws from the tail of a stored distribution: the ids outside the kept entries, drawn by the teacher's own probabilities.

In: an engine's top entries, its draws from all ids beyond them, and what is kept of the entries. Out: draws from everything that
is not kept, which is the entries that were cut and the ids beyond.

A position with a tail of mass T gets one draw for every max(T, DRAW_MASS) / num of it, from a random start: `num` draws where T is
DRAW_MASS or more, in proportion fewer below, so that a confident position costs next to nothing. Each draw then stands for
max(T, DRAW_MASS) / num of the tail's mass (`weights`), and the sum of weight * f(drawn id) is an unbiased estimate of the sum of
p * f over the tail, for any f. The draws of a position are spread evenly over the cut entries (systematic sampling), which only
lowers the variance.

Random numbers follow from a request's seed and the position alone, not from order or batch.

Shapes: T positions, E draws over all of them, N draws at a position, B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from distill.records import TopK

Array = npt.NDArray[Any]

DRAW_MASS: Final = 0.01
"""Tail mass from which on a position gets the full number of draws. Part of trace schema 2."""
MAX_DRAWS: Final = 32
"""The largest number of draws at a position."""
_COLUMNS: Final = 64
"""Random numbers of one position: the first are an engine's, the last is the start of the host's draws."""
_GOLDEN, _MIX = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


@dataclass(frozen=True, eq=False)
class Draws:
    """Ids drawn from the tail at T positions, ragged; an id that was drawn twice is there twice.

    count_T: number of draws at each position. ids_E: the ids, position after position. logp_E: their natural-log probabilities
    (float32) under the teacher, normalised over the whole vocabulary.
    """

    count_T: Array
    ids_E: Array
    logp_E: Array

    def __len__(self) -> int:
        return len(self.count_T)

    @staticmethod
    def concat(parts: Sequence[Draws]) -> Draws:
        """Concatenate along positions."""
        if not parts:
            return Draws(np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.float32))
        return Draws(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Draws)))

    @cached_property
    def offsets(self) -> Array:
        """[T+1] start of each position's draws in the flat arrays."""
        return np.asarray(np.concatenate([[0], np.cumsum(self.count_T, dtype=np.int64)]))

    @property
    def width(self) -> int:
        """The largest number of draws at a position."""
        return int(self.count_T.max(initial=0))

    def slice(self, start: int, stop: int) -> Draws:
        """Positions start to stop - 1."""
        a, b = self.offsets[start], self.offsets[stop]
        return Draws(self.count_T[start:stop], self.ids_E[a:b], self.logp_E[a:b])

    def dense(self, width: int) -> tuple[Array, Array]:
        """Rectangular ids [T, width] (padded with -1) and log-probabilities [T, width] (padded with -inf)."""
        ids_TN = np.full((len(self), width), -1, np.int64)
        logp_TN = np.full((len(self), width), -np.inf, np.float32)
        filled_TN = np.arange(width) < np.asarray(self.count_T)[:, None]
        ids_TN[filled_TN], logp_TN[filled_TN] = self.ids_E, self.logp_E
        return ids_TN, logp_TN


@dataclass(frozen=True, slots=True, eq=False)
class BeyondTop:
    """An engine's independent draws from the ids beyond its top entries: ids [T, N], log-probabilities [T, N]."""

    ids_TN: Array
    logp_TN: Array


def weights(tail_T: Array, num: int) -> Array:
    """Return the mass that one draw of each position stands for, float32 [T]. tail_T: log of the tail's mass."""
    return np.asarray(np.maximum(np.exp(np.asarray(tail_T, np.float64)), DRAW_MASS) / num, np.float32)


def draw(full: TopK, kept: TopK, beyond: BeyondTop, num: int, seed: int, no_tail: float) -> Draws:
    """Draw from the tail of `kept`, the entries that `full.truncate` left.

    beyond: `num` independent draws a position from the ids that `full` does not list. seed: of the trace. Positions whose tail
    is below no_tail get none.
    """
    first_T = full.offsets[:-1] + kept.count_T
    running = np.concatenate([[0.0], np.cumsum(np.exp(full.logp_E.astype(np.float64)))])
    base_T, last_T = running[first_T], full.offsets[1:]
    cut_T = running[last_T] - base_T
    tail_T = cut_T + np.exp(full.tail_T.astype(np.float64))
    step_T = np.maximum(tail_T, DRAW_MASS) / num
    start_T = uniforms(np.full(len(full), seed), np.arange(len(full)), _COLUMNS)[:, -1]
    point_TN = (start_T[:, None] + np.arange(num)) * step_T[:, None]
    drawn_TN = (point_TN < tail_T[:, None]) & (tail_T >= no_tail)[:, None]
    entry_TN = np.searchsorted(running, base_T[:, None] + point_TN, side="right") - 1
    in_cut_TN = drawn_TN & (point_TN < cut_T[:, None])
    entry_TN = np.clip(entry_TN, first_T[:, None], np.maximum(last_T - 1, 0)[:, None])
    ids_TN, logp_TN = beyond.ids_TN[:, :num].astype(np.int64), beyond.logp_TN[:, :num].astype(np.float32)
    # Rounding may leave a point above the sum of the cut entries where there is nothing beyond.
    in_cut_TN |= drawn_TN & (logp_TN == -np.inf) & (last_T > first_T)[:, None]
    ids_TN[in_cut_TN], logp_TN[in_cut_TN] = full.ids_E[entry_TN[in_cut_TN]], full.logp_E[entry_TN[in_cut_TN]]
    drawn_TN &= logp_TN > -np.inf
    return Draws(drawn_TN.sum(1).astype(np.int32), ids_TN[drawn_TN], logp_TN[drawn_TN])


def uniforms(seed_B: Array, position_B: Array, num: int) -> Array:
    """Return `num` numbers in [0, 1) for each row, float64 [B, num]: SplitMix64 of the seed, the position and the column."""
    column_N = np.arange(num, dtype=np.uint64)
    count_BN = position_B.astype(np.uint64)[:, None] * np.uint64(_COLUMNS) + column_N + np.uint64(1)
    mixed_BN = _mix(_mix(seed_B.astype(np.uint64))[:, None] + count_BN * np.uint64(_GOLDEN))
    return np.asarray((mixed_BN >> np.uint64(11)) * 2.0**-53)


def _mix(x: Array) -> Array:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX[0])
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX[1])
    return np.asarray(x ^ (x >> np.uint64(31)))
