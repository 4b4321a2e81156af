"""The advice of `distill check` below its table: the machine, the dtypes, stages that take long or do not fit, and
remedies."""

from __future__ import annotations

from collections.abc import Sequence

from distill.errors import MachineError
from distill.machine import Machine
from distill.recipe import (
    Recipe,
    base_name,
)
from distill.reports.wording import duration
from distill.run.predictions.row import Part, Row

LONG = 3600.0
"""Seconds beyond which a recipe counts as long."""
GIB = 2.0**30
WORTH = 0.05
"""The least share of the total time that a saving must have to be mentioned."""


def machine_lines(rows: Sequence[Row], machine: Machine) -> list[str]:
    """Describe the machine and, once each, the dtypes used on it with their reasons."""
    first = f"this machine: {machine.name}, {machine.cores} cores, {machine.memory / GIB:.3g} GiB"
    if machine.device == "cuda":
        first += " on the GPU"
    stages: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        for part in row.parts:
            key = (part.purpose, part.choice.dtype, part.choice.why)
            stages.setdefault(key, []).append(row.name)
    uses: dict[tuple[str, str], list[str]] = {}
    for (purpose, dtype, why), names in stages.items():
        alone = sum(each[0] == purpose for each in stages) == 1
        what = {"training": "training", "engine": "engines"}[purpose]
        uses.setdefault((dtype, why), []).append(what if alone else f"{what} ({short_list(names)})")
    return [first, *(f"  {' and '.join(u)}: {dtype}; {why}" for (dtype, why), u in uses.items())]


def too_large(rows: Sequence[Row], machine: Machine) -> list[str]:
    """Return the stages whose weights, masters and moments alone exceed the machine's memory, and those whose trainer and engine
    do not fit a GPU together, with remedies."""
    found = []
    for row in rows:
        if row.least <= machine.memory:
            shared = row.shared(machine.memory)
            if shared is not None and shared.short:
                sleep = "" if row.engine is None or row.engine.sleep else "engine.sleep: true, "
                found.append(
                    f"stages.{row.name}: trainer and engine do not fit the GPU {shared.when}: {shared.short / GIB:.3g} GiB more than its "
                    f"{machine.memory / GIB:.3g} GiB are needed. What helps: {sleep}a smaller micro_tokens, gradient_checkpointing: true, "
                    "lora, or distributed: {strategy: fsdp2} over several GPUs."
                )
            continue
        trains = any(part.purpose == "training" for part in row.parts)
        held = "weights, fp32 masters and moments" if trains else "weights"
        ways = "lora (then only the adapter has masters and moments), " if trains else ""
        found.append(
            f"stages.{row.name}: its {held} alone take {row.least / GIB:.3g} GiB, and this machine has "
            f"{machine.memory / GIB:.3g} GiB. What helps: {ways}a smaller model, or a machine with more memory."
        )
    return found


def refuse(rows: Sequence[Row], machine: Machine) -> None:
    """Raise UserError if a stage cannot fit the machine's memory."""
    if lines := too_large(rows, machine):
        raise MachineError(lines[0])


def memory_lines(rows: Sequence[Row], machine: Machine) -> list[str]:
    """Warn about stages that probably need more memory than there is, grouped by remedy."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.beside is None and row.least <= machine.memory < row.amounts["memory"]:
            found.setdefault(_memory_settings(row), []).append(row)
    return [
        f"warning: {short_list([row.name for row in each])}: estimated to need up to "
        f"{max(row.amounts['memory'] for row in each) / GIB:.3g} GiB at the peak, and this machine has "
        f"{machine.memory / GIB:.3g} GiB. Lower {settings}."
        for settings, each in found.items()
    ]


def _memory_settings(row: Row) -> str:
    settings = []
    if any(part.purpose == "training" for part in row.parts):
        settings.append("micro_tokens, or set gradient_checkpointing: true or lora")
    if any(part.purpose == "engine" for part in row.parts):
        settings.append("engine.kv_cache_gib and engine.batch_size")
    return "; ".join(settings)


def short_lines(rows: Sequence[Row]) -> list[str]:
    """Return one line for a run that takes long, shown before its first stage."""
    seconds = _seconds(rows)
    if seconds <= LONG:
        return []
    return [
        f"this will take about {duration(seconds)} on this machine, most of it in {_longest_shares(rows)}; `distill check` says what "
        "would change that"
    ]


def long_lines(recipe: Recipe, rows: Sequence[Row], machine: Machine) -> list[str]:
    """For `check`: return the longest stages of a recipe that takes long, and how much each remedy would save."""
    seconds = _seconds(rows)
    if seconds <= LONG:
        return []
    lines = [
        f"warning: this takes about {duration(seconds)} on this machine, most of it in {_longest_shares(rows)}. What would change that:"
    ]
    parts = [(row, part) for row in rows for part in row.parts]
    slow = {row.name: part for row, part in parts if part.slower > 0}
    gained = sum(part.slower for _, part in parts)
    if gained > WORTH * seconds:
        lines.append(f"  dtype: auto in {short_list(list(slow))}: about {duration(gained)} less")
    lines += _without_vllm(parts, machine, seconds)
    lines += [line for each in _longest(rows).items() if (line := _halving_line(recipe, *each))]
    if machine.device == "cpu":
        lines.append("  a GPU: the recipe runs there as it is, and `distill check` there says how long it takes")
    return lines


def _without_vllm(parts: Sequence[tuple[Row, Part]], machine: Machine, seconds: float) -> list[str]:
    found = {
        row.name: part.seconds - part.by_vllm
        for row, part in parts
        if part.by_vllm is not None and part.by_vllm < part.seconds
    }
    gained = sum(found.values())
    if gained <= WORTH * seconds:
        return []
    return [f"  the engine vllm in {short_list(list(found))} instead of transformers: about {duration(gained)} less"]


def _stages(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group rows by stage, seed copies and a comparison's evaluations together; the longest first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(base_name(row.name.partition(".")[0]), []).append(row)
    return dict(sorted(found.items(), key=lambda item: -_seconds(item[1])))


def _longest(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the longest stages, at most three, each at least a tenth of the total."""
    first, *others = list(_stages(rows).items())[:3]
    whole = _seconds(rows)
    return dict([first, *(each for each in others if _seconds(each[1]) > 0.1 * whole)])


def _halving_line(recipe: Recipe, stage: str, rows: Sequence[Row]) -> str:
    """Return how to halve a stage's work with its own keys, and the time saved; "" if it has no such key."""
    config = recipe.stages[rows[0].name.partition(".")[0]]
    start = sum(row.start for row in rows)
    what = config.half_the_work(stage)
    return f"  {what}: about {duration((_seconds(rows) - start) / 2)} less" if what else ""


def _longest_shares(rows: Sequence[Row]) -> str:
    whole = _seconds(rows)
    return ", ".join(f"{name} ({_seconds(e) / whole:.0%})" for name, e in _longest(rows).items())


def _seconds(rows: Sequence[Row]) -> float:
    return sum(row.amounts["seconds"] for row in rows)


def short_list(names: Sequence[str]) -> str:
    """Return distinct names without training seeds, at most four, and the number of the others."""
    distinct = list(dict.fromkeys(base_name(name) for name in names))
    more = f" and {len(distinct) - 4} more" if len(distinct) > 4 else ""
    return ", ".join(distinct[:4]) + more
