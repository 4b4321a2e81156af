"""The accuracy plot: a dot and its interval for each arm, as one small SVG that needs nothing else.

Hand-written, because a dot, a line and a label need no plotting library; colours follow the reader's light or
dark scheme. Every name is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape

from distill.reports.schema import ArmRow

WIDTH, ROW, TOP, BOTTOM, RIGHT = 480, 30, 12, 38, 56
MAX_NAME = 18

STYLE = """
.ap{font:13px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;font-variant-numeric:tabular-nums}
.ap text{fill:#333}.ap .quiet{fill:#767676;font-size:11px}.ap .grid{stroke:#e4e4e4}.ap .axis{stroke:#bbb}
.ap .bar{stroke:#2563a8;stroke-width:2}.ap .dot{fill:#2563a8}
.ap .other .bar{stroke:#8a8a8a}.ap .other .dot{fill:#8a8a8a}
@media (prefers-color-scheme:dark){.ap text{fill:#ddd}.ap .quiet{fill:#999}.ap .grid{stroke:#333}
.ap .axis{stroke:#555}.ap .bar{stroke:#7cb3ec}.ap .dot{fill:#7cb3ec}}
"""


def accuracy_svg(arms: dict[str, ArmRow], level_text: str = "95% intervals over problems") -> str:
    """A horizontal dot plot of accuracy, best arm first; students in the accent colour, the others grey."""
    order = sorted(arms, key=lambda name: -arms[name]["accuracy"]["value"])
    left = 14 + 7.3 * min(MAX_NAME, max((len(name) for name in order), default=4))
    top_value = max((arms[name]["accuracy"]["high"] for name in order), default=1.0)
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25) if top_value / s <= 5 or s == 0.25)
    end = min(1.0, math.ceil(round(top_value / step, 9)) * step) or step
    height = TOP + ROW * len(order) + BOTTOM
    floor = TOP + ROW * len(order)

    def x(share: float) -> float:
        return round(left + (WIDTH - RIGHT - left) * min(share / end, 1.0), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="ap" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" role="img" aria-label="{escape(describe(arms))}">',
        f"<style>{STYLE}</style>",
    ]
    for i in range(round(end / step) + 1):
        at = x(i * step)
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{TOP}" y2="{floor}"/>')
        label = f"{100 * i * step:.0f}%"
        parts.append(
            f'<text class="quiet" x="{at}" y="{floor + 15}" text-anchor="middle">{label}</text>'
        )
    parts.append(
        f'<line class="axis" x1="{x(0)}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>'
        f'<text class="quiet" x="{x(0)}" y="{floor + 31}">accuracy, {escape(level_text)}</text>'
    )
    for i, name in enumerate(order):
        parts.append(_arm(name, arms[name], TOP + ROW * (i + 0.5), left, x))
    return "\n".join([*parts, "</svg>\n"])


def _arm(name: str, arm: ArmRow, y: float, left: float, x: Callable[[float], float]) -> str:
    interval = arm["accuracy"]
    low, value, high = x(interval["low"]), x(interval["value"]), x(interval["high"])
    shown = name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…"
    caps = "".join(
        f'<line class="bar" x1="{end}" x2="{end}" y1="{y - 4}" y2="{y + 4}"/>'
        for end in (low, high)
    )
    return (
        f'<g class="{"arm" if arm["role"] == "student" else "other"}">'
        f'<text x="{left - 10}" y="{y + 4.5}" text-anchor="end">{escape(shown)}</text>'
        f'<line class="bar" x1="{low}" x2="{high}" y1="{y}" y2="{y}"/>{caps}'
        f'<circle class="dot" cx="{value}" cy="{y}" r="4.5"/>'
        f'<text x="{WIDTH - 6}" y="{y + 4.5}" text-anchor="end">{100 * interval["value"]:.1f}%</text></g>'
    )


def describe(arms: dict[str, ArmRow]) -> str:
    """The plot in words, for those who do not see it."""
    return "Accuracy: " + "; ".join(
        f"{name} {100 * arm['accuracy']['value']:.1f}% "
        f"({100 * arm['accuracy']['low']:.1f} to {100 * arm['accuracy']['high']:.1f})"
        for name, arm in arms.items()
    )
