"""Numbers and findings in words: how the report, its page and the terminal say the same thing.

Comes in: raw numbers and rows of the report. Goes out: short text. `seen` makes text from outside safe to show.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from distill.reports.schema import ComparisonRow, IntervalRow, RunReport

UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
"""Characters that act rather than show."""


def seen(text: str) -> str:
    """Text with plain line ends, and what acts rather than shows replaced: terminal controls, turned reading
    direction, lone surrogates."""
    return UNSEEN.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def interval_text(row: IntervalRow | Mapping[str, Any], signed: bool = False) -> str:
    """41.0% [35.1, 47.1]; signed, in points: +8.2 [1.1, 15.3]."""
    value, low, high = (100 * row[key] for key in ("value", "low", "high"))
    head = f"{value:+.1f}" if signed else f"{value:.1f}%"
    ends = f"{low:+.1f}, {high:+.1f}" if signed else f"{low:.1f}, {high:.1f}"
    return f"{head} [{ends}]"


def scaled(value: float, unit: str = "") -> str:
    """Three significant digits with an SI prefix: 12.3 k, 1.23 P."""
    if value == 0:
        return f"0 {unit}".rstrip()
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 0.9995 * 10**power:
            return f"{value / 10**power:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def duration(seconds: float) -> str:
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def p_text(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _p_said(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def reading(row: ComparisonRow) -> str:
    """What a comparison allows one to say."""
    return {
        "differ": "checkpoints differ",
        "not shown": "no difference shown",
        "supported": "supported over seeds",
        "inconclusive": "inconclusive over seeds",
    }[row["verdict"]]


def verdict(report: RunReport) -> str:
    """The run in one sentence: the best student, the next, their difference and how far it carries."""
    arms = report["arms"]
    if not arms:
        return "No arm of this run has been evaluated yet."

    def said(name: str) -> str:
        return f"{name} {interval_text(arms[name]['accuracy'])}"

    ranked = sorted(arms, key=lambda name: -arms[name]["accuracy"]["value"])
    students = [name for name in ranked if arms[name]["role"] == "student"] or ranked
    others = [name for name in ranked if name not in students]
    named = [said(n) if n == arms[n]["role"] else f"{arms[n]['role']} {said(n)}" for n in others]
    beside = f" ({', '.join(named)})" if named else ""
    best = students[0]
    start = f"On {arms[best]['accuracy']['n']} held-out problems {said(best)}"
    if len(students) == 1:
        return f"{start}{beside}."
    second = students[1]
    start = f"{start} and {said(second)}{beside}"
    found = [row for row in report["comparisons"] if {row["a"], row["b"]} == {best, second}]
    row = next(
        (row for row in found if row["unit"] == "training seeds"), found[0] if found else None
    )
    if row is None:
        return f"{start}; the two were not compared."
    sign = 1 if row["a"] == best else -1
    ends = sorted(sign * row["difference"][key] for key in ("low", "high"))
    points = interval_text(
        {"value": sign * row["difference"]["value"], "low": ends[0], "high": ends[1]}, signed=True
    )
    evidence = f"{best} − {second} {points} points, p {_p_said(row['p_holm'])}"
    if row["unit"] == "training seeds":
        seeds = " and ".join(str(n) for n in sorted(set(row.get("seeds", []))))
        return f"{start}; over {seeds} training seeds an arm the difference is {row['verdict']} ({evidence})."
    differ = (
        "these two checkpoints differ"
        if row["verdict"] == "differ"
        else ("no difference between these two checkpoints is shown")
    )
    return (
        f"{start}; {differ} ({evidence}), and one training seed an arm says nothing about the ways "
        "of training in general."
    )
