"""Table columns whose cells share one unit, so that they can be compared at a glance: `(s)`, `(min)`, `(TFLOP)`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from distill.reports.wording import minus

NONE = "–"
TIMES = (("s", 1.0), ("min", 60.0), ("h", 3600.0))
PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def times(seconds: Sequence[float | None]) -> tuple[str, list[str]]:
    """Return (unit, cells) of durations: seconds up to a column's largest of 120 s, minutes up to 120, then hours."""
    top = max((value for value in seconds if value), default=0.0)
    name, size = next((unit for unit in TIMES if top <= 120 * unit[1]), TIMES[-1])
    return name, _cells([None if value is None else value / size for value in seconds])


def amounts(values: Sequence[float | None], unit: str = "", least: float = 10.0) -> tuple[str, list[str]]:
    """Return (unit with its SI prefix, cells) of amounts such as FLOPs, tokens and bytes; the largest is from `least` to 1000 times it."""
    top = max((abs(value) for value in values if value), default=0.0)
    power = max(0, min(len(PREFIXES) - 1, math.floor(math.log10(top / least) / 3 + 1e-9))) if top > 0 else 0
    return f"{PREFIXES[power]}{unit}", _cells([None if value is None else value / 1000**power for value in values])


def _cells(values: Sequence[float | None]) -> list[str]:
    """Numbers with equally many decimals, at most two; what is smaller than half of the last one is shown as such."""
    known = [abs(value) for value in values if value]
    whole = all(value == round(value) for value in known)
    decimals = 0 if whole or min(known, default=0.0) >= 10 else 1 if max(known) >= 10 else 2
    least = 10.0**-decimals
    return [
        NONE
        if value is None
        else f"<{least:.{decimals}f}"
        if 0 < value < least / 2
        else minus(f"{value:,.{decimals}f}" if value else "0")
        for value in values
    ]


def titled(name: str, unit: str) -> str:
    """A column's heading with its unit: `time (min)`."""
    return f"{name} ({unit})" if unit else name
