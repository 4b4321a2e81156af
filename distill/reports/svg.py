"""SVG drawing for the report's plots: scales, ticks, axes, marks and labels that do not overlap.

Written without a plotting library: a plot is a few kilobytes and follows the reader's light or dark colour scheme. All text
is escaped. A mark's `<title>` is its tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

STYLE = """
.dp{font:12.5px system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;font-variant-numeric:tabular-nums}
.dp text{fill:#33363a}.dp .quiet{fill:#6c7075;font-size:11.5px}.dp .grid{stroke:#ececee}.dp .axis{stroke:#b9bcc0}
.dp .line{stroke:#2b62c0;fill:none;stroke-width:1.8;stroke-linejoin:round}.dp .bar{stroke:#2b62c0;stroke-width:1.6}
.dp .mark{fill:#2b62c0;stroke:#fff;stroke-width:1.2}.dp .faint{stroke:#2b62c0;fill:none;opacity:.28}.dp .seed{stroke-width:1.3;opacity:.62}
.dp .other .line,.dp .other .bar{stroke:#9a9ea4}.dp .other .mark{fill:#9a9ea4}.dp .lead{stroke:#b9bcc0}
.dp .other text{fill:#6c7075}.dp .level{stroke:#9a9ea4;stroke-dasharray:3 3}
.dp .small{opacity:.4}
.dp:has(.arm:hover) .arm:not(:hover){opacity:.22}
@media screen and (prefers-color-scheme:dark){.dp text{fill:#d0d3d7}.dp .quiet{fill:#8b9096}.dp .grid{stroke:#26292d}.dp .axis{stroke:#4a4e54}
.dp .line,.dp .bar,.dp .faint{stroke:#82b0ff}.dp .mark{fill:#82b0ff;stroke:#141517}.dp .other .line,.dp .other .bar{stroke:#71767d}
.dp .other .mark{fill:#71767d}.dp .other text{fill:#8b9096}.dp .lead{stroke:#4a4e54}.dp .level{stroke:#71767d}}
"""
CHAR = 7.3
"""Approximate width of a character of a label, in pixels."""

Scale = Callable[[float], float]
Box = tuple[float, float, float, float]


def linear(low: float, high: float, start: float, end: float) -> Scale:
    """A linear scale from values low..high to pixels start..end."""
    span = (high - low) or 1.0
    return lambda value: round(start + (value - low) / span * (end - start), 1)


def logarithmic(low: float, high: float, start: float, end: float) -> Scale:
    """A logarithmic scale from values low..high to pixels start..end."""
    inner = linear(math.log(low), math.log(high), start, end)
    return lambda value: inner(math.log(value))


def linear_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers from low to high, at most `most` steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from low to high for a logarithmic axis, at most `most` of them."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    best: list[float] = []
    for mantissas in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = [m * 10.0**d for d in decades for m in mantissas]
        inside = [t for t in ticks if low * 0.999 <= t <= high * 1.001]
        if len(inside) <= most:
            best = inside if len(inside) >= len(best) else best
    return best


@dataclass(slots=True)
class Canvas:
    """An SVG drawing of width x height with margins around the plot area.

    label: alternative text. parts: SVG elements. taken, labels: boxes of marks and labels, which later labels avoid.
    """

    width: int
    height: int
    label: str
    left: float = 44.0
    right: float = 16.0
    top: float = 12.0
    bottom: float = 34.0
    parts: list[str] = field(default_factory=list)
    taken: list[Box] = field(default_factory=list)
    labels: list[Box] = field(default_factory=list)

    @property
    def end(self) -> float:
        return self.width - self.right

    @property
    def floor(self) -> float:
        return self.height - self.bottom

    def add(self, part: str) -> None:
        self.parts.append(part)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        anchor: str = "start",
        kind: str = "",
        bold: bool = False,
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        css = f' class="{kind}"' if kind else ""
        self.add(f'<text{css}{weight} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

    def x_axis(
        self, ticks: Sequence[tuple[float, str]], title: str, grid: bool = True, title_drop: float = 30.0
    ) -> None:
        """Draw the horizontal axis. ticks: (pixel, label) pairs. The title is `title_drop` pixels below its right end."""
        for x, text in ticks:
            if grid:
                self.add(f'<line class="grid" x1="{x}" x2="{x}" y1="{self.top}" y2="{self.floor}"/>')
            self.text(x, self.floor + 15, text, "middle", "quiet")
        self.add(f'<line class="axis" x1="{self.left}" x2="{self.end}" y1="{self.floor}" y2="{self.floor}"/>')
        if title:
            self.text(self.end, self.floor + title_drop, title, "end", "quiet")

    def y_axis(self, ticks: Sequence[tuple[float, str]], title: str = "") -> None:
        for y, text in ticks:
            self.add(f'<line class="grid" x1="{self.left}" x2="{self.end}" y1="{y}" y2="{y}"/>')
            self.text(self.left - 7, y + 4, text, "end", "quiet")
        if title:
            self.text(0, self.top - 13, title, "start", "quiet")

    def upright(self, x: float, low: float, high: float, kind: str = "bar") -> None:
        """Draw a vertical error bar with caps."""
        self.add(f'<path class="{kind}" d="M{x} {low}V{high}M{x - 3.5} {low}h7M{x - 3.5} {high}h7" fill="none"/>')

    def mark(self, x: float, y: float, shape: int, size: float = 4.5) -> None:
        """Draw a marker: circle, square, triangle, diamond or inverted triangle, by number."""
        s = size
        paths = (
            f"M{x - s} {y}a{s} {s} 0 1 0 {2 * s} 0a{s} {s} 0 1 0 {-2 * s} 0Z",
            f"M{x - s} {y - s}h{2 * s}v{2 * s}h{-2 * s}Z",
            f"M{x} {y - s * 1.15:.1f}L{x + s * 1.1:.1f} {y + s * 0.85:.1f}H{x - s * 1.1:.1f}Z",
            f"M{x} {y - s * 1.3:.1f}L{x + s * 1.2:.1f} {y}L{x} {y + s * 1.3:.1f}L{x - s * 1.2:.1f} {y}Z",
            f"M{x} {y + s * 1.15:.1f}L{x + s * 1.1:.1f} {y - s * 0.85:.1f}H{x - s * 1.1:.1f}Z",
        )
        self.add(f'<path class="mark" d="{paths[shape % len(paths)]}"/>')
        self.taken.append((x - s, y - s, x + s, y + s))

    def place(self, x: float, y: float, text: str) -> None:
        """Draw a label near a point where it covers nothing drawn before; a line connects it if it is far away.

        If there is no free place it may cover bars and marks, but never another label; else it is left out.
        """
        wide, tall = len(text) * CHAR, 13.0
        boxes = [
            (x + dx, y + dy - tall / 2, x + dx + wide, y + dy + tall / 2)
            for far in (0.0, 13.0, 26.0, 39.0, 52.0, 65.0)
            for dy in (far, -far)
            for dx in (9, -9 - wide)
        ]
        inside = [box for box in boxes if box[0] >= 0 and box[2] <= self.width and box[1] >= 0 and box[3] <= self.floor]
        apart = [box for box in inside if not any(_meet(box, other) for other in self.labels)]
        free = [box for box in apart if not any(_meet(box, other) for other in self.taken)]
        if not apart:
            return
        box = (free or apart)[0]
        self.labels.append(box)
        middle = (box[1] + box[3]) / 2
        if abs(middle - y) > 8:
            near = box[0] if box[0] > x else box[2]
            self.add(f'<line class="lead" x1="{x:.1f}" y1="{y:.1f}" x2="{near:.1f}" y2="{middle:.1f}"/>')
        self.text(box[0], middle + 4.3, text)

    def along(self, level: float, text: str) -> None:
        """Draw the label of a horizontal line above or below it, at the left or right end: the first place that is free."""
        wide = len(text) * CHAR
        boxes = [
            (x, y - 16, x + wide, y)
            for y in (level, level + 16)
            for x in (self.left + 6, self.end - wide)
            if y <= self.floor and y - 16 >= 0
        ]
        free = [box for box in boxes if not any(_meet(box, other) for other in (*self.taken, *self.labels))]
        box = (free or boxes)[0]
        self.labels.append(box)
        self.text(box[0], box[3] - 5, text)

    def render(self) -> str:
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" class="dp" viewBox="0 0 {self.width} {self.height}" '
                f'width="{self.width}" height="{self.height}" role="img" aria-label="{escape(self.label)}">',
                f"<style>{STYLE}</style>",
                *self.parts,
                "</svg>\n",
            ]
        )


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def group(kind: str, title: str) -> str:
    """The start tag of a group of marks, with its tooltip."""
    return f'<g class="{kind}"><title>{escape(title)}</title>'


def apart(wanted: list[float], least: float = 15.0) -> list[float]:
    """Ascending positions near `wanted`, at least `least` pixels apart: each is moved down as needed, then all up."""
    placed: list[float] = []
    for position in wanted:
        placed.append(max(position, placed[-1] + least) if placed else position)
    overrun = (placed[-1] - wanted[-1]) / 2 if placed else 0.0
    return [position - overrun for position in placed]
