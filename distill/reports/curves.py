"""Training curves: one small SVG panel for each quantity that a stage has logged.

Input: a stage's curves, read from metrics.jsonl. Long curves are drawn faintly with a running mean over them; each named
reward is a grey line beside the total.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from distill.printable import printable
from distill.reports.run_report import StageRow
from distill.reports.svg import Canvas, Scale, apart, group, linear, linear_ticks
from distill.reports.wording import minus

WIDTH, HEIGHT = 300, 196
TOP, BOTTOM = 44, 36
"""Margins: above the plot are two lines of text, the title and the last values; below it the steps and their name."""
REWARD = "reward/"
MAX_NAME, QUIET_CHAR = 14, 6.4
"""Of a reward's name beside its line: its greatest length, and the width of a character in pixels."""
LONG = 40
"""Number of values from which a running mean is drawn."""
NEGLIGIBLE = 1e-5
"""A curve that never exceeds this is not drawn: it is rounding noise, such as GRPO's loss, which is 0 where every rollout is used once."""
SAME = 1e-3
"""Two curves whose values differ by less than this share are one: with forward KL, the loss is the KL to the teacher."""

Values = Sequence[float | None]

PANELS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("reward", "reward", ("reward",)),
    ("loss", "loss", ("loss",)),
    ("nll", "label NLL (nats)", ("label_nll",)),
    ("teacher", "KL to the teacher (nats)", ("kl",)),
    ("agreement", "same top token as the teacher (share)", ("agreement",)),
    ("gap", "entropy, teacher − student (nats)", ("entropy_gap",)),
    ("length", "completion tokens", ("length",)),
    ("kl", "KL to the reference (nats)", ("kl_ref",)),
    ("entropy", "entropy (nats)", ("entropy",)),
    ("truncated", "share truncated", ("clipped_ratio",)),
    ("equal", "groups with equal rewards", ("frac_reward_zero_std",)),
    ("clip", "share clipped", ("clip_fraction",)),
    ("mismatch", "KL, engine to trainer (nats)", ("kl_engine",)),
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
    found: list[tuple[str, str, list[str]]] = []
    for stem, title, keys in PANELS:
        wanted = [*keys, *(key for key in curves if stem == "reward" and key.startswith(REWARD))]
        known = [key for key in wanted if (_known if key.startswith(REWARD) else _tells)(curves.get(key, []))]
        if not known or all(key.startswith(REWARD) for key in known):
            continue
        same = next((n for n, (_, _, shown) in enumerate(found) if _same(curves[shown[0]], curves[known[0]])), None)
        if same is None:
            found.append((stem, title, known))
        else:
            first = found[same]
            found[same] = (first[0], f"{first[1]} = {title}", first[2])
    return found


def left_out(stage: StageRow) -> list[str]:
    """The quantities that have a panel but are not drawn, each with its value: those that are 0, or the same, throughout."""
    curves = stage.get("curves", {})
    found = []
    for _, title, keys in PANELS:
        values = _known(curves.get(keys[0], []))
        if len(values) > 1 and not _tells(values):
            largest = max(abs(value) for value in values)
            at = (
                "0"
                if not largest
                else f"{values[0]:.4g}".replace("e-0", "e-")
                if min(values) == max(values)
                else f"at most {_tick(largest)}"
            )
            found.append(f"{title} {minus(at)}")
    return found


def _tells(values: Values) -> bool:
    """Whether a curve is worth a panel: it has values beyond rounding noise that are not all the same."""
    known = _known(values)
    if not known or max(abs(value) for value in known) < NEGLIGIBLE:
        return False
    return len(known) == 1 or min(known) != max(known)


def _same(a: Values, b: Values) -> bool:
    """Whether two curves show the same values."""
    if len(a) != len(b):
        return False
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    return bool(pairs) and all(math.isclose(x, y, rel_tol=SAME, abs_tol=NEGLIGIBLE) for x, y in pairs)


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
    canvas = Canvas(WIDTH, HEIGHT, described, left=42, right=12, top=TOP, bottom=BOTTOM)
    low, high = _range([value for values in known.values() for value in values])
    at = sorted({step for steps, _ in lines.values() for step in steps})
    x = linear(at[0], at[-1] if at[-1] > at[0] else at[0] + 1, canvas.left + 2, canvas.end)
    y = linear(low, high, canvas.floor, canvas.top)
    canvas.text(0, 12, title, bold=True)
    mean = sum(values[-1] for values in known.values()) / len(known)
    canvas.text(0, 28, f"{len(known)} seeds; mean of the last {_value(mean)}", kind="quiet")
    canvas.y_axis([(y(t), _tick(t)) for t in linear_ticks(low, high, 5)])
    x_ticks = [t for t in linear_ticks(at[0], at[-1], 5) if t == int(t)]
    canvas.x_axis([(x(t), f"{t:.0f}") for t in x_ticks], "step", grid=False, title_drop=28)
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
    named = [printable(key.removeprefix(REWARD))[:MAX_NAME] for key in lines if key.startswith(REWARD)]
    right = 12 + (QUIET_CHAR * max(map(len, named)) if named else 0)
    canvas = Canvas(WIDTH, HEIGHT, described, left=42, right=right, top=TOP, bottom=BOTTOM)
    low, high = _range(known)
    num = max(len(values) for values in lines.values())
    at = list(steps) if steps and len(steps) == num else list(range(1, num + 1))
    x = linear(at[0], at[-1] if at[-1] > at[0] else at[0] + 1, canvas.left + 2, canvas.end)
    y = linear(low, high, canvas.floor, canvas.top)
    canvas.text(0, 12, title, bold=True)
    first = _known(next(iter(lines.values())))
    change = f"from {_value(first[0])} to {_value(first[-1])}" if len(first) > 1 else _value(first[0])
    canvas.text(0, 28, change, kind="quiet")
    canvas.y_axis([(y(t), _tick(t)) for t in linear_ticks(low, high, 5)])
    x_ticks = [t for t in linear_ticks(at[0], at[-1], 5) if t == int(t)]
    canvas.x_axis([(x(t), f"{t:.0f}") for t in x_ticks], "step", grid=False, title_drop=28)
    for key, values in reversed(list(lines.items())):
        main = not key.startswith(REWARD)
        canvas.add(group("arm" if main else "arm other", ends[key]))
        if main and len(values) >= LONG:
            canvas.add(f'<path class="faint" d="{_path(at, values, x, y)}"/>')
        line = smooth(values, len(values) // 20 | 1) if len(values) >= LONG else values
        canvas.add(f'<path class="line" d="{_path(at, line, x, y)}"/>')
        canvas.add("</g>")
    last = sorted((y(_known(values)[-1]), key) for key, values in lines.items() if key.startswith(REWARD))
    for at_y, (_, key) in zip(apart([one for one, _ in last], 12.0), last, strict=True):
        canvas.text(canvas.end + 4, at_y + 4, printable(key.removeprefix(REWARD))[:MAX_NAME], kind="quiet")
    return canvas.render()


def _tick(value: float) -> str:
    return minus(f"{value:.4g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.0e}".replace("e-0", "e-"))


def _value(value: float) -> str:
    return minus(f"{value:.3g}".replace("e-0", "e-"))


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
        parts.append(f"{pen}{x(step)} {max(float(TOP - 6), y(value))}")
        pen = "L"
    return "".join(parts)
