"""Quantisation of distributions: what schema 1 stores instead of float32 log-probabilities.

    top_steps      uint16 an entry: its distance below the previous entry, in 1/32 nat; 0 for the first
    tail_logprob   float32 a position: log of the mass in no entry, its log-odds rounded to 1/16 nat
    draw_logprobs  float32 a draw from the tail (schema 2): rounded to 1/8 nat

To decode a position, let x be the running sum of its steps over 32. An entry's probability is

    exp(-x) / sum(exp(-x)) * (1 - exp(tail_logprob))

so entries and tail always add up to 1, and an entry with nearly all the mass is decoded exactly as 1 minus the others and
the tail. Rounding is relative to the first entry, so errors do not accumulate: each is at most 1/64 nat.
KL(true || decoded) over entries + tail is at most 2e-4 nat at any position (Hoeffding's lemma on errors in an interval of
1/32, and the two-way KL of tail against entries), and below 7e-5 on average for uniform errors, for any distribution;
`tests/bench/RESULTS.md` has measurements.

Ids and counts are stored unchanged; the exact variant (`exact: true`) is not quantised.

Shapes: T positions, E entries over all of them.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from distill.records import Array, TopK

STEPS_PER_NAT: Final = 32
TAIL_STEPS_PER_NAT = 16
LOGPROB_STEPS_PER_NAT = 1024
"""The sampled token's log-probability is a float32 rounded to a multiple of this, which halves its compressed size."""

DRAW_STEPS_PER_NAT = 8
"""A draw's log-probability enters the value of a loss, times its part of the tail's mass, and no gradient."""

MAX_MASS_ERROR = 1e-2
"""Entries and tail of a position add up to 1 within this tolerance, the error of half-precision logits."""

_CHUNK = 2048
"""Positions decoded at a time, few enough that intermediate arrays stay in the processor's cache."""


def quantise(top: TopK) -> tuple[Array, Array]:
    """Return steps [E] uint16 and tails [T] float32 of a distribution that passed `check`."""
    first_T = _first(top.count_T)
    logp_E = np.asarray(top.logp_E, np.float32)
    below_E = np.repeat(logp_E[first_T], top.count_T) - logp_E
    nats_E = np.rint(below_E * np.float32(STEPS_PER_NAT)).astype(np.int64)
    steps_E = np.diff(nats_E, prepend=0)
    steps_E[first_T] = 0
    kept_T = _sums(np.exp(logp_E.astype(np.float64)), first_T)
    with np.errstate(divide="ignore"):
        odds_T = np.asarray(top.tail_T, np.float64) - np.log(kept_T)
        odds_T = np.rint(odds_T * TAIL_STEPS_PER_NAT) / TAIL_STEPS_PER_NAT
        tail_T = -np.log1p(np.exp(-odds_T))
    return np.minimum(steps_E, 2**16 - 1).astype(np.uint16), tail_T.astype(np.float32)


def dequantise(count_T: Array, steps_E: Array, tail_T: Array) -> Array:
    """Return log-probabilities [E] float32, normalised with the tails [T]; every position must have an entry."""
    first_T = np.concatenate([[0], np.cumsum(count_T, dtype=np.int64)])
    logp_E = np.empty(len(steps_E), np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        kept_T = np.log(-np.expm1(np.asarray(tail_T, np.float64)))
    for start in range(0, len(count_T), _CHUNK):
        bounds = first_T[start : start + _CHUNK + 1]
        a, b = int(bounds[0]), int(bounds[-1])
        count, local = count_T[start : start + _CHUNK], bounds[:-1] - a
        # The running sum may wrap around; the difference to the position's first entry does not.
        sum_E = np.cumsum(steps_E[a:b], dtype=np.uint32)
        sum_E -= np.repeat(sum_E[local], count)
        nats_E = np.multiply(sum_E, np.float32(-1 / STEPS_PER_NAT), dtype=np.float32)
        mass_T = np.add.reduceat(np.exp(nats_E).astype(np.float64), local)
        shift_T = (kept_T[start : start + _CHUNK] - np.log(mass_T)).astype(np.float32)
        np.add(nats_E, np.repeat(shift_T, count), out=logp_E[a:b])
    return logp_E


def round_logprobs(logprobs: Array) -> Array:
    """Round the sampled tokens' log-probabilities for the quantised variant; the error is at most 1/2048 nat."""
    scale = np.float32(LOGPROB_STEPS_PER_NAT)
    return np.asarray(np.rint(np.asarray(logprobs, np.float32) * scale) / scale)


def round_draws(logprobs: Array) -> Array:
    """Round the log-probabilities of draws from the tail for the quantised variant; the error is at most 1/16 nat."""
    scale = np.float32(DRAW_STEPS_PER_NAT)
    return np.asarray(np.minimum(np.rint(np.asarray(logprobs, np.float32) * scale) / scale, 0))


def check(top: TopK, top_k: int) -> None:
    """Check a distribution before it is stored.

    Raises ValueError if a position has no entry or more than top_k, entries are not in descending order, or entries and
    tail do not add up to 1.
    """
    if not len(top):
        return
    if not 1 <= top.count_T.min() <= top.count_T.max() <= top_k:
        raise ValueError(f"positions have {top.count_T.min()} to {top.count_T.max()} entries, not 1 to {top_k} (top_k)")
    first_T = _first(top.count_T)
    rising_E = np.diff(top.logp_E) > 0
    rising_E[first_T[1:] - 1] = False
    if rising_E.any():
        raise ValueError("entries are not in descending order")
    mass_T = _sums(np.exp(top.logp_E.astype(np.float64)), first_T)
    mass_T += np.exp(np.asarray(top.tail_T, np.float64))
    error_T = np.abs(mass_T - 1)
    if error_T.max() > MAX_MASS_ERROR:
        wrong, worst = int((error_T > MAX_MASS_ERROR).sum()), mass_T[error_T.argmax()]
        raise ValueError(f"entries and tail do not add up to 1 at {wrong} positions (worst {worst:.4f})")


def _first(count_T: Array) -> Array:
    """Return the start of each position's entries, [T]."""
    return np.cumsum(count_T, dtype=np.int64) - count_T


def _sums(values_E: Array, first_T: Array) -> Array:
    """Sum the entries of each position, [T]; every position must have one."""
    return np.add.reduceat(values_E, first_T) if len(first_T) else np.empty(0, values_E.dtype)
