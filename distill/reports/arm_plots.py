"""The report's plots of arms, as SVG: accuracy, accuracy against compute, pass@k.

An arm has the same marker in all plots. Models that were not trained in the comparison (teacher, start) are grey. Scales,
axes and marks are drawn by `svg`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from distill.printable import printable
from distill.reports.run_report import ArmRow, SnapshotRow
from distill.reports.svg import (
    CHAR,
    Canvas,
    Scale,
    apart,
    group,
    linear,
    linear_ticks,
    log_ticks,
    logarithmic,
)
from distill.reports.wording import interval_text, percent, scaled

WIDE, NARROW = 760, 358
MAX_NAME = 22

Arms = Mapping[str, ArmRow]


def _short(name: str) -> str:
    name = printable(name)
    return name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…"


def _kind(arm: ArmRow) -> str:
    return "arm" if arm["role"] == "student" else "arm other"


def _top(arms: Arms) -> float:
    """The end of an accuracy axis: the highest interval end, rounded up to a tick."""
    high = max(arm["accuracy"]["high"] for arm in arms.values())
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2) if high / s <= 6 or s == 0.2)
    return min(1.0, math.ceil(round(high / step, 9)) * step) or step


def _bottom(arms: Arms) -> float:
    """The start of an accuracy axis: 0, or the ten percent below the lowest interval end where all arms are above one half."""
    low = min(arm["accuracy"]["low"] for arm in arms.values())
    low = min([low, *(point["low"] for arm in arms.values() for point in arm.get("snapshots", []))])
    return math.floor(low * 10) / 10 if low > 0.5 else 0.0


def describe(arms: Arms) -> str:
    """The accuracies in words, as the plot's alternative text."""
    return "Accuracy: " + "; ".join(f"{name} {interval_text(arm['accuracy'])}" for name, arm in arms.items())


def accuracy_svg(arms: Arms, width: int = WIDE) -> str:
    """Draw a horizontal dot plot of accuracy with intervals, best arm first."""
    order = sorted(arms, key=lambda name: -arms[name]["accuracy"]["value"])
    row = 30
    canvas = Canvas(
        width,
        12 + row * len(order) + 38,
        describe(arms),
        left=14 + CHAR * max((len(_short(name)) for name in order), default=4),
        right=62,
        bottom=38,
    )
    start, end = _bottom(arms), _top(arms)
    x = linear(start, end, canvas.left, canvas.end)
    title = f"accuracy from {percent0(start)}, 95% intervals" if start else "accuracy, 95% intervals"
    canvas.x_axis([(x(t), percent0(t)) for t in linear_ticks(start, end)], title)
    for i, name in enumerate(order):
        interval, y = arms[name]["accuracy"], canvas.top + row * (i + 0.5)
        low, high = x(interval["low"]), x(min(interval["high"], end))
        canvas.add(group(_kind(arms[name]), f"{name}: {interval_text(interval)}"))
        canvas.text(canvas.left - 10, y + 4.5, _short(name), "end")
        canvas.add(f'<path class="bar" d="M{low} {y}H{high}M{low} {y - 4}v8M{high} {y - 4}v8" fill="none"/>')
        canvas.mark(x(interval["value"]), y, list(arms).index(name))
        canvas.text(width - 4, y + 4.5, percent(interval["value"]), "end")
        canvas.add("</g>")
    return canvas.render()


def percent0(share: float) -> str:
    """A share as a whole percentage."""
    return f"{100 * share:.0f}%"


# ---------------------------------------------------------------------------------------------- compute


def compute_svg(arms: Arms, view: str, width: int = WIDE) -> str:
    """Accuracy against FLOPs (logarithmic) in one view of cost; an arm's snapshots form a line.

    Arms without cost in this view are horizontal lines.
    """
    canvas = Canvas(width, round(width * 0.52) if width > 500 else 300, describe(arms), top=30, bottom=40)
    costs = {name: _points(arm, view) for name, arm in arms.items()}
    paid = [point["flops"] for points in costs.values() for point in points if point["flops"] > 0]
    start, end = _bottom(arms), _top(arms)
    y = linear(start, end, canvas.floor, canvas.top)
    canvas.y_axis(
        [(y(t), percent0(t)) for t in linear_ticks(start, end)],
        f"accuracy from {percent0(start)}" if start else "accuracy",
    )
    low, high = (min(paid) / 1.35, max(paid) * 1.5) if paid else (1.0, 10.0)
    x = logarithmic(low, high, canvas.left, canvas.end)
    ticks = log_ticks(low, high, 6 if width > 500 else 4)
    canvas.x_axis([(x(t), scaled(t)) for t in ticks] if paid else [], "FLOPs, logarithmic", grid=False)
    shapes = {name: number for number, name in enumerate(arms)}
    drawn = [name for name in costs if any(point["flops"] > 0 for point in costs[name])]
    for name in drawn:  # reserve the space of all marks first, so that labels avoid them
        for point in costs[name]:
            if point["flops"] > 0:
                px = x(point["flops"])
                canvas.taken.append((px - 5, y(point["high"]) - 2, px + 5, y(point["low"]) + 2))
    for name in costs:
        if name not in drawn:
            level = y(arms[name]["accuracy"]["value"])
            canvas.add(group("arm other", f"{name}: {interval_text(arms[name]['accuracy'])}"))
            canvas.add(f'<line class="level" x1="{canvas.left}" x2="{canvas.end}" y1="{level}" y2="{level}"/>')
            canvas.along(level, f"{_short(name)} (no compute)")
            canvas.add("</g>")
    drawn.sort(key=lambda name: -arms[name]["accuracy"]["value"])
    for name in drawn:
        _compute_arm(canvas, name, arms[name], costs[name], shapes[name], (x, y), end)
    return canvas.render()


def _compute_arm(
    canvas: Canvas,
    name: str,
    arm: ArmRow,
    points: list[SnapshotRow],
    shape: int,
    scales: tuple[Scale, Scale],
    end: float,
) -> None:
    x, y = scales
    points = [point for point in points if point["flops"] > 0]
    last = points[-1]
    text = f"{name}: {interval_text(arm['accuracy'])} at {scaled(last['flops'], 'FLOP')}"
    canvas.add(group(_kind(arm), text))
    if len(points) > 1:
        path = "L".join(f"{x(p['flops'])} {y(p['accuracy'])}" for p in points)
        canvas.add(f'<path class="line" d="M{path}"/>')
    for point in points:
        final = point is last
        ends = y(point["low"]), y(min(point["high"], end))
        canvas.upright(x(point["flops"]), *ends, "bar" if final else "bar small")
        canvas.mark(x(point["flops"]), y(point["accuracy"]), shape, 5.0 if final else 3.0)
    canvas.place(x(last["flops"]), y(last["accuracy"]), _short(name))
    canvas.add("</g>")


def _points(arm: ArmRow, view: str) -> list[SnapshotRow]:
    """The arm's snapshots and, last, its final model. Costs that a view adds to the student's count from the start."""
    flops = arm["cost"][view]["flops"]  # type: ignore[index]
    added = flops - arm["flops"]
    accuracy = arm["accuracy"]
    end = SnapshotRow(flops=flops, accuracy=accuracy["value"], low=accuracy["low"], high=accuracy["high"])
    before = [SnapshotRow(**{**point, "flops": point["flops"] + added}) for point in arm.get("snapshots", [])]
    return [*sorted((p for p in before if p["flops"] < flops), key=lambda p: p["flops"]), end]


# ----------------------------------------------------------------------------------------------- pass@k


def has_pass_curve(arms: Arms) -> bool:
    """Whether an arm has pass@k for several k."""
    return any(len(arm["pass_at"]) > 1 for arm in arms.values())


def pass_svg(arms: Arms, width: int = WIDE) -> str:
    """pass@k against k (logarithmic), with intervals; labels at the right end."""
    names = [name for name in arms if arms[name]["pass_at"]]
    ks = sorted({int(k) for name in names for k in arms[name]["pass_at"]})
    label = "; ".join(_pass_text(name, arms[name]) for name in names)
    right = 16 + CHAR * max(len(_short(name)) for name in names)
    canvas = Canvas(width, 340 if width > 500 else 300, label, right=right, top=30, bottom=40)
    high = max(row["high"] for name in names for row in arms[name]["pass_at"].values())
    end = min(1.0, math.ceil(high * 10) / 10)
    inset = 14
    x = logarithmic(ks[0], max(ks[-1], ks[0] * 2), canvas.left + inset, canvas.end - inset)
    y = linear(0, end, canvas.floor, canvas.top)
    canvas.y_axis([(y(t), percent0(t)) for t in linear_ticks(0, end)], "pass@k")
    canvas.x_axis([(x(k), str(k)) for k in ks], "k, logarithmic", grid=False)
    spread = min(3.0, 2 * inset / max(1, len(names)))
    ends: list[tuple[float, str]] = []
    for number, name in enumerate(names):
        rows = sorted((int(k), row) for k, row in arms[name]["pass_at"].items())
        shift = (number - (len(names) - 1) / 2) * spread
        canvas.add(group(_kind(arms[name]), _pass_text(name, arms[name])))
        path = "L".join(f"{x(k) + shift:.1f} {y(row['value'])}" for k, row in rows)
        canvas.add(f'<path class="line" d="M{path}"/>')
        for k, row in rows:
            canvas.upright(round(x(k) + shift, 1), y(row["low"]), y(min(row["high"], end)))
            canvas.mark(round(x(k) + shift, 1), y(row["value"]), list(arms).index(name), 4.0)
        canvas.add("</g>")
        ends.append((y(rows[-1][1]["value"]), name))
    for at, (wanted, name) in zip(apart([one for one, _ in sorted(ends)]), sorted(ends), strict=True):
        canvas.add(group(_kind(arms[name]), name))
        canvas.add(f'<line class="lead" x1="{canvas.end - 2}" y1="{wanted:.1f}" x2="{canvas.end + 6}" y2="{at:.1f}"/>')
        canvas.text(canvas.end + 9, at + 4.3, _short(name))
        canvas.add("</g>")
    return canvas.render()


def _pass_text(name: str, arm: ArmRow) -> str:
    return f"{name}: " + ", ".join(f"pass@{k} {interval_text(row)}" for k, row in arm["pass_at"].items())
