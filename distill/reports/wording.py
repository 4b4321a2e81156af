"""Numbers and findings as short text, shared by the report, its page and the terminal."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.reports.run_report import ComparisonRow, IntervalRow, RunReport, TraceRatioRow


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def interval_text(row: IntervalRow | Mapping[str, Any], signed: bool = False) -> str:
    """An estimate with its interval: 41.0% [35.1, 47.1], or signed, in points: +8.2 [+1.1, +15.3]."""
    value, low, high = (100 * row[key] for key in ("value", "low", "high"))
    head = f"{value:+.1f}" if signed else f"{value:.1f}%"
    ends = f"{low:+.1f}, {high:+.1f}" if signed else f"{low:.1f}, {high:.1f}"
    return f"{head} [{ends}]"


def scaled(value: float, unit: str = "") -> str:
    """A number with three significant digits and an SI prefix: 12.3 k, 1.23 P."""
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


def money(dollars: float) -> str:
    """US dollars: cents from one dollar on, two significant digits below."""
    if not dollars:
        return "–"
    return f"${dollars:,.2f}" if dollars >= 1 else f"${dollars:.2g}"


def p_text(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _p_said(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def reading(row: ComparisonRow) -> str:
    """The verdict of a comparison in words."""
    return {
        "differ": "checkpoints differ",
        "not shown": "no difference shown",
        "supported": "supported over seeds",
        "inconclusive": "inconclusive over seeds",
    }[row["verdict"]]


def verdict(report: RunReport) -> str:
    """The result of a run in a sentence or two: the students, best first, the evidence for their differences, and what a
    trace with its distribution is worth, if the run says so."""
    if not report["arms"]:
        return "No arm of this run has been evaluated yet."
    return f"{_compared(report)}{_worth(report)}"


def _worth(report: RunReport) -> str:
    """Traces of text for one trace of each way of training; "" if the run does not compare numbers of traces."""
    by_place: dict[str, list[str]] = {}
    for row in report.get("trace_ratios", []):
        measure = {"accuracy": "accuracy", "kl": "held-out KL"}[row["measure"]]
        place = f"by {measure} ({row.get('comparison', '')})"
        by_place.setdefault(place, []).append(f"{ratio_text(row)} for {row['way']}")
    said = [f"{place} {_listed(ratios)}" for place, ratios in by_place.items()]
    return f" One trace is worth this many traces of text: {'; '.join(said)}." if said else ""


def ratio_text(row: TraceRatioRow) -> str:
    """A ratio with its interval: 2.1 [1.4, 3.3]; what the curves are too short for has a sign: >16 [1.4, >16]."""
    low = f"{'<' if row['low_at_end'] else ''}{row['low']:.2g}"
    high = f"{'>' if row['high_at_end'] else ''}{row['high']:.2g}"
    sign = "" if not row["at_end"] else ">" if row["ratio"] > 1 else "<"
    return f"{sign}{row['ratio']:.2g} [{low}, {high}]"


def _compared(report: RunReport) -> str:
    arms = report["arms"]

    def said(name: str) -> str:
        return f"{name} {interval_text(arms[name]['accuracy'])}"

    ranked = sorted(arms, key=lambda name: -arms[name]["accuracy"]["value"])
    most = max((arm["traces"]["number"] for arm in arms.values() if "traces" in arm), default=None)
    if most is not None:  # of arms that differ in their number of traces, those with the most
        ranked = [name for name in ranked if "traces" not in arms[name] or arms[name]["traces"]["number"] == most]
    students = [name for name in ranked if arms[name]["role"] == "student"] or ranked
    compared = {row[key] for row in report["comparisons"] for key in ("a", "b")} or {*ranked}
    others = [name for name in ranked if name not in students and name in compared]
    named = [said(n) if n == arms[n]["role"] else f"{arms[n]['role']} {said(n)}" for n in others]
    beside = f" ({', '.join(named)})" if named else ""
    start = f"On {arms[students[0]]['accuracy']['n']} held-out problems {_listed([said(n) for n in students])}{beside}"
    if len(students) == 1:
        return f"{start}."
    # All pairs of up to three students; of more, the best against each other one.
    pairs = list(itertools.combinations(students, 2))
    found = [_reading_of(report, *pair) for pair in (pairs if len(students) <= 3 else pairs[: len(students) - 1])]
    readings = [reading for reading in found if reading is not None]
    if not readings:
        return f"{start}; {'the two' if len(students) == 2 else 'they'} were not compared."
    over_seeds = [reading for reading in readings if reading.seeds]
    if over_seeds:
        seeds = " and ".join(str(n) for n in sorted({n for one in over_seeds for n in one.seeds}))
        said_of = f"over {seeds} training seeds an arm {_evidence(over_seeds, SEEDS_WORDS)}."
    else:
        said_of = f"{_evidence(readings, CHECKPOINT_WORDS)}, and one training seed an arm says nothing about the ways of training in general."
    return f"{start}; {said_of}{_divergence_said(report, students)}"


def _divergence_said(report: RunReport, students: list[str]) -> str:
    """The students' held-out KL to the teacher in a sentence, nearest first; "" where it was not measured."""
    kl = {name: arm["divergence"]["kl"] for name in students if "divergence" in (arm := report["arms"][name])}
    if len(kl) < 2:
        return ""
    ranked = sorted(kl, key=lambda name: kl[name]["value"])
    pairs = {(row["a"], row["b"]): row["difference"] for row in report.get("divergence_pairs", [])}
    apart: list[str] = []
    level: list[str] = []
    for near, far in itertools.combinations(ranked, 2):
        row, sign = (pairs[far, near], 1) if (far, near) in pairs else (pairs.get((near, far)), -1)
        if row is not None:
            low, high = sorted(sign * row[key] for key in ("low", "high"))
            text = f"{far} − {near} {_nats({'value': sign * row['value'], 'low': low, 'high': high}, '+')}"
            (apart if low > 0 else level).append(text)
    parts = [f"they differ ({'; '.join(apart)})"] if apart else []
    parts += [f"no difference is shown ({'; '.join(level)})"] if level else []
    return (
        f" In held-out KL to the teacher, {_listed([f'{name} {_nats(kl[name])}' for name in ranked])} nats a token, "
        f"{', '.join(parts)}."
        if parts
        else ""
    )


def _nats(row: Mapping[str, Any], sign: str = "") -> str:
    value, low, high = (f"{row[key]:{sign}.3f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


SEEDS_WORDS = {
    "supported": ("the difference is supported", "these differences are supported"),
    "inconclusive": ("the difference is inconclusive", "these are inconclusive"),
}
CHECKPOINT_WORDS = {
    "differ": ("these two checkpoints differ", "these checkpoints differ"),
    "not shown": (
        "no difference between these two checkpoints is shown",
        "no difference is shown between these",
    ),
}


@dataclass(frozen=True, slots=True)
class _Reading:
    """A compared pair of arms in words, the better one first. seeds: number of seeds of each; () for checkpoints."""

    verdict: str
    text: str
    seeds: tuple[int, ...]


def _reading_of(report: RunReport, best: str, second: str) -> _Reading | None:
    """The comparison of two arms in the report, over training seeds if there is one, else of checkpoints."""
    found = [row for row in report["comparisons"] if {row["a"], row["b"]} == {best, second}]
    row = next((row for row in found if row["unit"] == "training seeds"), found[0] if found else None)
    if row is None:
        return None
    sign = 1 if row["a"] == best else -1
    ends = sorted(sign * row["difference"][key] for key in ("low", "high"))
    points = interval_text({"value": sign * row["difference"]["value"], "low": ends[0], "high": ends[1]}, signed=True)
    text = f"{best} − {second} {points} points, p {_p_said(row['p_holm'])}"
    seeds = tuple(row.get("seeds", ())) if row["unit"] == "training seeds" else ()
    return _Reading(row["verdict"], text, seeds)


def _evidence(readings: list[_Reading], words: Mapping[str, tuple[str, str]]) -> str:
    """The readings grouped by verdict, in the order of `words`."""
    parts = []
    for verdict, (one, several) in words.items():
        texts = [reading.text for reading in readings if reading.verdict == verdict]
        if texts:
            said = one if len(readings) == 1 else several
            parts.append(f"{said} ({'; '.join(texts)})")
    return ", ".join(parts)


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
