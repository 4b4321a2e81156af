"""Numbers and findings as short text, shared by the report, its page and the terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.reports.run_report import ComparisonRow, IntervalRow, TraceRatioRow

MINUS = "\N{MINUS SIGN}"
_NEGATIVE_ZERO = re.compile(r"-(0(?:\.0+)?)(?![\d.])")


def minus(text: str) -> str:
    """Number text with the minus sign, which is as wide as a plus, instead of the hyphen; what rounds to 0 has no sign."""
    return _NEGATIVE_ZERO.sub(r"\1", text).replace("-", MINUS)


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def interval_text(row: IntervalRow | Mapping[str, Any], signed: bool = False) -> str:
    """An estimate with its interval: 41.0% [35.1, 47.1], or signed, in points: +8.2 [−1.1, +15.3]."""
    value, low, high = (100 * row[key] for key in ("value", "low", "high"))
    head = f"{value:+.1f}" if signed else f"{value:.1f}%"
    ends = f"{low:+.1f}, {high:+.1f}" if signed else f"{low:.1f}, {high:.1f}"
    return minus(f"{head} [{ends}]")


def span(low: float, high: float, digits: int = 1) -> str:
    """A range: 12.5–24.7; with a negative end −2.1 to 9.2, because two dashes would be read as one."""
    ends = minus(f"{low:.{digits}f}"), minus(f"{high:.{digits}f}")
    return f"{ends[0]} to {ends[1]}" if low < 0 else f"{ends[0]}–{ends[1]}"


def scaled(value: float, unit: str = "") -> str:
    """A number with three significant digits and an SI prefix: 12.3 k, 1.23 P."""
    if value == 0:
        return f"0 {unit}".rstrip()
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 0.9995 * 10**power:
            return minus(f"{value / 10**power:.3g} {prefix}{unit}")
    return minus(f"{value:.3g} {unit}".rstrip())


def duration(seconds: float) -> str:
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def money(dollars: float) -> str:
    """US dollars: cents from one dollar on, two significant digits below."""
    if not dollars:
        return "–"
    return f"${dollars:,.2f}" if dollars >= 1 else f"${dollars:.2g}"


def p_text(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def reading(row: ComparisonRow) -> str:
    """The verdict of a comparison in words."""
    return {
        "differ": "checkpoints differ",
        "not shown": "no difference shown",
        "supported": "supported over seeds",
        "inconclusive": "inconclusive over seeds",
    }[row["verdict"]]


def ratio_text(row: TraceRatioRow) -> str:
    """A ratio with its interval: 2.1 [1.4, 3.3]; what the curves are too short for has a sign: >16 [1.4, >16]."""
    low = f"{'<' if row['low_at_end'] else ''}{row['low']:.2g}"
    high = f"{'>' if row['high_at_end'] else ''}{row['high']:.2g}"
    sign = "" if not row["at_end"] else ">" if row["ratio"] > 1 else "<"
    return f"{sign}{row['ratio']:.2g} [{low}, {high}]"


def listed(names: Sequence[str]) -> str:
    """Names in a sentence: a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
