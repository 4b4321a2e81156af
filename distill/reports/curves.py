"""Training curves: one small SVG panel for each quantity that a stage has logged.

Input: a stage's curves, read from metrics.jsonl. Long curves are drawn faintly with a running mean over them; each named
reward is a grey line beside the total.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from distill.printable import printable
from distill.reports.run_report import StageRow
from distill.reports.svg import Canvas, Scale, group, linear, linear_ticks

WIDTH, HEIGHT = 300, 168
REWARD = "reward/"
LONG = 40
"""Number of values from which a running mean is drawn."""

Values = Sequence[float | None]

PANELS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("reward", "reward", ("reward",)),
    ("loss", "loss", ("loss",)),
    ("nll", "label NLL (nats)", ("label_nll",)),
    ("teacher", "KL to the teacher (nats)", ("kl",)),
    ("agreement", "share of tokens with the same top choice", ("agreement",)),
    ("gap", "entropy, teacher minus student (nats)", ("entropy_gap",)),
    ("length", "completion tokens", ("length",)),
    ("kl", "KL to the reference (nats)", ("kl_ref",)),
    ("entropy", "entropy (nats)", ("entropy",)),
    ("truncated", "share truncated", ("clipped_ratio",)),
    ("equal", "groups with equal rewards", ("frac_reward_zero_std",)),
    ("clip", "share clipped", ("clip_fraction",)),
    ("mismatch", "KL between engine and trainer (nats)", ("kl_engine",)),
    ("norm", "gradient norm", ("grad_norm",)),
)
"""File name, title and metric keys of each panel, in the order of the report."""


def panels(stage: StageRow) -> list[tuple[str, str, str]]:
    """(file stem, description, SVG) of each panel of a stage."""
    curves = stage.get("curves", {})
    found = []
    for stem, title, keys in _shown(stage):
        label = f"{printable(stage['name'])}: {title}"
        lines = {key: curves[key] for key in keys}
        found.append((stem, label, _panel(label, title, lines, stage.get("curve_steps"))))
    return found


def seed_panels(copies: Sequence[StageRow]) -> list[tuple[str, str, str]]:
    """(file stem, description, SVG) of each panel of a stage with several training seeds: one line per seed."""
    found = []
    for stem, title, keys in _shown(copies[0]):
        lines = {
            stage["name"].partition("@")[2]: (stage["curve_steps"], stage["curves"][keys[0]])
            for stage in copies
            if _known(stage.get("curves", {}).get(keys[0], []))
        }
        label = f"{printable(copies[0]['name'].partition('@')[0])}: {title}"
        found.append((stem, label, _seeds_panel(label, title, lines)))
    return found


def by_stage(stages: Sequence[StageRow]) -> list[list[StageRow]]:
    """Group stages, in order, so that the seed copies of one stage (`kl@1`, `kl@2`) are together."""
    found: dict[str, list[StageRow]] = {}
    for stage in stages:
        found.setdefault(stage["name"].partition("@")[0], []).append(stage)
    return list(found.values())


def shown_keys(stage: StageRow) -> list[str]:
    """The metric keys that have a panel, in the order of the panels."""
    return [key for _, _, keys in _shown(stage) for key in keys]


def _shown(stage: StageRow) -> list[tuple[str, str, list[str]]]:
    """(file name, title, keys) of the panels that have values; named rewards are added to the reward panel."""
    curves = stage.get("curves", {})
    found = []
    for stem, title, keys in PANELS:
        wanted = [*keys, *(key for key in curves if stem == "reward" and key.startswith(REWARD))]
        known = [key for key in wanted if _known(curves.get(key, []))]
        # With cross-entropy, the label NLL is the loss, which has its panel already.
        if known and not (stem == "nll" and curves["label_nll"] == curves.get("loss")):
            found.append((stem, title, known))
    return found


def _known(values: Values) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def smooth(values: Values, window: int) -> list[float | None]:
    """Centred running mean over `window` values (fewer at the ends), without unknown values."""
    half, found = window // 2, []
    for i in range(len(values)):
        near = _known(values[max(0, i - half) : i + half + 1])
        found.append(sum(near) / len(near) if near else None)
    return found


def _seeds_panel(label: str, title: str, lines: Mapping[str, tuple[Sequence[float], Values]]) -> str:
    """One panel with a line per seed. lines: (steps, values) by seed; the axis fits the longest run."""
    known = {seed: _known(values) for seed, (_, values) in lines.items()}
    described = f"{label}; " + ", ".join(
        f"seed {seed} from {values[0]:.3g} to {values[-1]:.3g}" for seed, values in known.items()
    )
    canvas = Canvas(WIDTH, HEIGHT, described, left=40, right=12, top=28, bottom=24)
    low, high = _range([value for values in known.values() for value in values])
    at = sorted({step for steps, _ in lines.values() for step in steps})
    x = linear(at[0], at[-1] if at[-1] > at[0] else at[0] + 1, canvas.left + 2, canvas.end)
    y = linear(low, high, canvas.floor, canvas.top)
    canvas.text(0, 12, title, bold=True)
    mean = sum(values[-1] for values in known.values()) / len(known)
    canvas.text(canvas.end, 12, f"mean {mean:.3g}", "end", "quiet")
    canvas.y_axis([(y(t), _tick(t)) for t in linear_ticks(low, high, 3)])
    x_ticks = [t for t in linear_ticks(at[0], at[-1], 4) if t == int(t)]
    canvas.x_axis([(x(t), f"{t:.0f}") for t in x_ticks], "", grid=False)
    for seed, (steps, values) in lines.items():
        canvas.add(group("arm", f"seed {seed}: {known[seed][-1]:.3g}"))
        line = smooth(values, len(values) // 20 | 1) if len(values) >= LONG else values
        canvas.add(f'<path class="line seed" d="{_path(steps, line, x, y)}"/></g>')
    return canvas.render()


def _panel(label: str, title: str, lines: Mapping[str, Values], steps: Sequence[float] | None) -> str:
    known = [value for values in lines.values() for value in _known(values)]
    ends = {key: f"{key.removeprefix(REWARD)} {_known(values)[-1]:.3g}" for key, values in lines.items()}
    described = f"{label}; " + ", ".join(
        f"{key} from {_known(values)[0]:.3g} to {_known(values)[-1]:.3g}" for key, values in lines.items()
    )
    canvas = Canvas(WIDTH, HEIGHT, described, left=40, right=12, top=28, bottom=24)
    low, high = _range(known)
    num = max(len(values) for values in lines.values())
    at = list(steps) if steps and len(steps) == num else list(range(1, num + 1))
    x = linear(at[0], at[-1] if at[-1] > at[0] else at[0] + 1, canvas.left + 2, canvas.end)
    y = linear(low, high, canvas.floor, canvas.top)
    canvas.text(0, 12, title, bold=True)
    last = next(iter(ends.values())).split(" ")[-1]
    canvas.text(canvas.end, 12, last, "end", "quiet")
    canvas.y_axis([(y(t), _tick(t)) for t in linear_ticks(low, high, 3)])
    x_ticks = [t for t in linear_ticks(at[0], at[-1], 4) if t == int(t)]
    canvas.x_axis([(x(t), f"{t:.0f}") for t in x_ticks], "", grid=False)
    for key, values in reversed(list(lines.items())):
        main = not key.startswith(REWARD)
        canvas.add(group("arm" if main else "arm other", ends[key]))
        if main and len(values) >= LONG:
            canvas.add(f'<path class="faint" d="{_path(at, values, x, y)}"/>')
        line = smooth(values, len(values) // 20 | 1) if len(values) >= LONG else values
        canvas.add(f'<path class="line" d="{_path(at, line, x, y)}"/>')
        if not main:
            name = key.removeprefix(REWARD)
            canvas.text(canvas.end, y(_known(line)[-1]) - 5, printable(name)[:24], "end", "quiet")
        canvas.add("</g>")
    return canvas.render()


def _tick(value: float) -> str:
    return f"{value:.4g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


def _range(known: Sequence[float]) -> tuple[float, float]:
    """The range of the value axis, with 5% margin: from 0 if the values come near 0; spikes above the 98th percentile of
    long curves are cut off."""
    ordered = sorted(known)
    high = ordered[-1] if len(ordered) < 50 else ordered[int(0.98 * (len(ordered) - 1))]
    low = ordered[0]
    if low >= 0 and low < 0.5 * high:
        low = 0.0
    if high <= low:
        high = low + (abs(low) or 1.0)
    return low, high + 0.05 * (high - low)


def _path(at: Sequence[float], values: Values, x: Scale, y: Scale) -> str:
    parts, pen = [], "M"
    for step, value in zip(at, values, strict=False):
        if value is None or not math.isfinite(value):
            pen = "M"
            continue
        parts.append(f"{pen}{x(step)} {max(20.0, y(value))}")
        pen = "L"
    return "".join(parts)
