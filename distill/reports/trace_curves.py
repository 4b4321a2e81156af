"""What one trace with its distribution is worth in traces of text: curves of a measure against the number of traces.

In: for each way of training and each number of traces, values by training seed and problem (accuracy) or trace (minus the held-out
KL); larger is better. Out: the ratio of a way of training to the text's: the factor r for which its curve, drawn over log n, lies
best on the text's curve moved by log r (least squares, the text's curve interpolated in log n and level beyond its ends). Where all of
one curve lies above all of the other, no number of traces makes up for it, and the ratio is at the end of the range.
Its interval is a bootstrap over seeds and problems, both drawn for all arms at once: a seed decides the traces of every arm.

Shape suffixes: S training seeds, P problems, N numbers of traces.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from distill.reports.run_report import TraceRatioRow
from distill.reports.statistics import LEVEL, Floats

RESAMPLES = 1000
GRID = 401
"""Number of shifts that are tried."""

LEVEL_CURVE = 1e-6
"""A curve of text that spans less is level."""

Curve = Mapping[int, Floats]
"""Values [S, P] by number of traces."""


@dataclass(frozen=True, slots=True)
class Shift:
    """The best shift in log n, and whether it lies at an end of the range that can be measured."""

    log_ratio: float
    at_end: bool


def ratio(name: str, way: Curve, text: Curve, measure: str, seed: int = 0) -> TraceRatioRow:
    """Traces of text for one trace of a way of training, with a 95% interval.

    Raises ValueError if a curve has fewer than two numbers of traces.
    """
    numbers = sorted(way), sorted(text)
    if min(len(one) for one in numbers) < 2:
        raise ValueError("a curve needs at least two numbers of traces")
    way_NSP, text_NSP = (np.stack([curve[n] for n in ns]) for curve, ns in zip((way, text), numbers, strict=True))
    found = best_shift(numbers[0], way_NSP.mean((1, 2)), numbers[1], text_NSP.mean((1, 2)))
    rng = np.random.default_rng(seed)
    seeds, problems = way_NSP.shape[1:]
    drawn: list[float | None] = []
    for _ in range(RESAMPLES):
        s, p = rng.integers(0, seeds, seeds), rng.integers(0, problems, problems)
        means = [values_NSP[:, s][:, :, p].mean((1, 2)) for values_NSP in (way_NSP, text_NSP)]
        is_level = float(np.ptp(means[1])) < LEVEL_CURVE
        drawn.append(None if is_level else best_shift(numbers[0], means[0], numbers[1], means[1]).log_ratio)
    limit = _range(numbers[0], numbers[1])
    # A level curve of text says nothing about the shift: such a resample counts at both ends.
    lows, highs = ([end if shift is None else shift for shift in drawn] for end in (-limit, limit))
    low = float(np.quantile(lows, 0.5 - LEVEL / 2))
    high = float(np.quantile(highs, 0.5 + LEVEL / 2))
    return TraceRatioRow(
        way=name,
        measure=measure,
        ratio=math.exp(found.log_ratio),
        low=math.exp(low),
        high=math.exp(high),
        low_at_end=bool(low <= -limit + 1e-9),
        high_at_end=bool(high >= limit - 1e-9),
        at_end=found.at_end,
        seeds=seeds,
    )


def best_shift(way_n: Sequence[int], way_N: Floats, text_n: Sequence[int], text_N: Floats) -> Shift:
    """Return the shift of the text's curve, in log n, that brings it closest to a way's; of equal ones the smallest.

    A way that is better everywhere than text is anywhere gets the largest shift, one that is worse everywhere the least.
    """
    limit = _range(way_n, text_n)
    if way_N.min() > text_N.max():
        return Shift(limit, True)
    if way_N.max() < text_N.min():
        return Shift(-limit, True)
    shifts = np.linspace(-limit, limit, GRID)
    shifted = np.log(way_n)[None, :] + shifts[:, None]
    squares = ((np.interp(shifted, np.log(text_n), text_N) - way_N) ** 2).sum(1)
    best = squares <= squares.min() + 1e-12
    shift = float(min(shifts[best], key=abs))
    return Shift(shift, abs(shift) >= limit - 1e-9)


def _range(way_n: Sequence[int], text_n: Sequence[int]) -> float:
    """The largest shift that can be measured: the length of the curves in log n."""
    return math.log(max(*way_n, *text_n) / min(*way_n, *text_n))
