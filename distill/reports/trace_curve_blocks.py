"""The report's section on numbers of traces: accuracy and held-out KL against traces, and the ratios to text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distill.reports.arm_plots import NARROW, WIDE, percent0
from distill.reports.block_kinds import Block, Figure, Heading, Table, Text
from distill.reports.run_report import ArmRow, IntervalRow, RunReport
from distill.reports.svg import CHAR, Canvas, group, linear, linear_ticks, logarithmic
from distill.reports.wording import interval_text, minus, ratio_text

MEASURES = {"accuracy": "accuracy", "kl": "held-out KL, nats a token"}


@dataclass(frozen=True, slots=True)
class Point:
    """One arm of a curve: its number of traces and a measure with its interval."""

    traces: int
    value: IntervalRow


def curves_of(report: RunReport, measure: str) -> dict[str, dict[str, list[Point]]]:
    """The curves of a measure: by comparison and way of training, ordered by number of traces; ways of one number are left out."""
    found: dict[str, dict[str, list[Point]]] = {}
    for arm in report["arms"].values():
        value = _measured(arm, measure)
        if (traces := arm.get("traces")) is not None and value is not None:
            ways = found.setdefault(traces["comparison"], {})
            ways.setdefault(traces["way"], []).append(Point(traces["number"], value))
    kept = {
        where: {way: sorted(points, key=lambda one: one.traces) for way, points in ways.items() if len(points) > 1}
        for where, ways in found.items()
    }
    return {where: ways for where, ways in kept.items() if ways}


def _measured(arm: ArmRow, measure: str) -> IntervalRow | None:
    if measure == "accuracy":
        return arm["accuracy"]
    return arm["divergence"]["kl"] if "divergence" in arm else None


def trace_curve_blocks(report: RunReport) -> list[Block]:
    """The figures and ratios; empty if no two arms differ in `max_traces`."""
    figures: list[Block] = []
    for measure, title in MEASURES.items():
        for where, ways in curves_of(report, measure).items():
            label = f"{title} against the number of traces, {where}. {describe(ways, measure)}"
            figures.append(
                Figure(
                    f"plots/{where}_traces_{measure}.svg",
                    curve_svg(ways, measure, label),
                    label,
                    curve_svg(ways, measure, label, NARROW),
                )
            )
    if not figures:
        return []
    found: list[Block] = [Heading("Against the number of traces"), *figures]
    if ratios := report.get("trace_ratios"):
        found += [
            Table(
                ["comparison", "way", "by", "traces of text for one trace of it"],
                [[row["comparison"], row["way"], MEASURES[row["measure"]], ratio_text(row)] for row in ratios],
                "lllr",
            ),
            Text(
                "A ratio of 2 means that text alone needs twice as many traces for the same result: the factor by which the way's curve, "
                "over the logarithm of the number of traces, is shifted against the text's. Brackets are 95% bootstrap intervals over "
                "training seeds and problems (or held-out traces); < and > mark ends beyond what the curves can show."
            ),
        ]
    return found


def describe(ways: Mapping[str, Sequence[Point]], measure: str) -> str:
    """The curves in words, as the plot's alternative text."""
    return "; ".join(
        f"{way}: " + ", ".join(f"{_value_text(point.value, measure)} with {point.traces}" for point in points)
        for way, points in ways.items()
    )


def _value_text(row: IntervalRow, measure: str) -> str:
    if measure == "accuracy":
        return interval_text(row)
    return minus(f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]")


def curve_svg(ways: Mapping[str, Sequence[Point]], measure: str, label: str, width: int = WIDE) -> str:
    """Draw a measure against the number of traces (logarithmic), a line with error bars for each way of training."""
    right = 16 + CHAR * max(len(way) for way in ways)
    canvas = Canvas(width, 340 if width > 500 else 300, label, right=right, top=30, bottom=40, left=52)
    points = [point for way in ways.values() for point in way]
    numbers = sorted({point.traces for point in points})
    high = max(point.value["high"] for point in points)
    low = min(0.0, *(point.value["low"] for point in points))
    step = linear_ticks(low, high)
    top = min(1.0, math.ceil(high * 10) / 10) if measure == "accuracy" else max(high, step[-1])
    inset = 14.0
    x = logarithmic(numbers[0], max(numbers[-1], 2 * numbers[0]), canvas.left + inset, canvas.end - inset)
    y = linear(low, top, canvas.floor, canvas.top)
    ticks = [(y(t), percent0(t) if measure == "accuracy" else minus(f"{t:g}")) for t in linear_ticks(low, top)]
    canvas.y_axis(ticks, MEASURES[measure])
    canvas.x_axis([(x(n), str(n)) for n in numbers], "traces, logarithmic", grid=False)
    spread = min(4.0, 2 * inset / max(1, len(ways)))
    for number, (way, line) in enumerate(ways.items()):
        shift = (number - (len(ways) - 1) / 2) * spread
        canvas.add(group("arm", f"{way}: {describe({way: line}, measure)}"))
        path = "L".join(f"{x(p.traces) + shift:.1f} {y(p.value['value'])}" for p in line)
        canvas.add(f'<path class="line" d="M{path}"/>')
        for point in line:
            at = round(x(point.traces) + shift, 1)
            canvas.upright(at, y(point.value["low"]), y(min(point.value["high"], top)))
            canvas.mark(at, y(point.value["value"]), number, 4.0)
        canvas.add("</g>")
    for number, (way, line) in enumerate(ways.items()):
        canvas.add(group("arm", way))
        canvas.place(x(line[-1].traces) + (number - (len(ways) - 1) / 2) * spread, y(line[-1].value["value"]), way)
        canvas.add("</g>")
    return canvas.render()
