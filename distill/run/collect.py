"""Collect a run's folders into one report: stages, arms with their costs, comparisons, predictions and measurements."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import yaml

from distill import run_folder
from distill.recipe import Recipe, RewardConfig, StageConfig
from distill.reports.context_rows import ProgressRow
from distill.reports.run_report import DivergenceRow, RunReport, StageRow
from distill.run.collect_arms import collect_arms
from distill.run.weak_teachers import weak_teachers

MAX_POINTS = 240
"""The largest number of points of a curve; longer curves are thinned by averaging."""


def collect(recipe: Recipe, run: Path, names: list[str], command: str) -> RunReport:
    """Collect everything that the run holds so far. names: of its nodes, in order. command: the one that repeats the run."""
    states = {name: standing for name in names if (standing := run_folder.read(run / name)) is not None}
    found = collect_arms(recipe, run, states)
    return RunReport(
        name=recipe.name,
        description=recipe.description,
        created=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        seed=recipe.seed,
        task=", ".join(f"{name} ({task.fn})" for name, task in recipe.tasks.items()),
        environment=run_folder.environment(run),
        stages=[_stage_row(name, states.get(name), recipe, run) for name in names],
        arms=found.arms,
        comparisons=found.comparisons,
        divergence_pairs=found.divergence_pairs,
        trace_ratios=found.trace_ratios,
        evaluations=found.evaluations,
        measurements=found.measurements,
        ledger=found.ledger,
        examples=found.examples,
        recipe=yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        reproduce=[command],
        notes=[*weak_teachers(recipe, states), *_notes(states, run), *_sandboxes(recipe)],
    )


def collect_run(run: Path) -> RunReport:
    """Collect a run from its folder, finished or not."""
    recipe = run_folder.recipe(run)
    names = [name for stage in recipe.stages for name in (*_children(recipe, stage), stage)]
    return collect(recipe, run, names, f"distill run {run / run_folder.RESOLVED}")


def _children(recipe: Recipe, stage: str) -> list[str]:
    """Return the child stages of a stage, by their folders."""
    return [f"{stage}.{below}" for below in recipe.stages[stage].children()]


def _stage_row(name: str, standing: run_folder.State | None, recipe: Recipe, run: Path) -> StageRow:
    if standing is None:
        stage, _, below = name.partition(".")
        config = recipe.stages[stage]
        kind = config.children()[below].kind if below else config.kind
        return StageRow(name=name, kind=kind, status="pending", seconds=0.0, cost={})
    run_folder.add_killed_time(run / name, standing)  # of a running attempt: up to the newest file that it wrote
    row = StageRow(
        name=name,
        kind=standing.kind,
        status=standing.status,
        seconds=standing.seconds,
        cost={**standing.cost, **_written(run / name)},
        metrics={key: value for key, value in standing.metrics.items() if isinstance(value, int | float | str)},
    )
    if standing.dtypes:
        row["dtype"] = standing.dtypes
    if standing.predicted:
        row["predicted"] = {key: standing.predicted[key] for key in ("tokens", "bytes", "flops", "seconds", "memory")}  # type: ignore[typeddict-item]
        if dollars := standing.predicted.get("dollars"):
            row["predicted"]["dollars"] = dollars
    lines, _ = run_folder.log_of(run / name, standing)
    if lines is not None:
        row["curve_steps"], row["curves"] = read_curves(lines)
    if standing.status in ("running", "failed"):
        row["progress"] = _progress(standing, row.get("curve_steps", []))
    if standing.kind == "divergence" and standing.status == "done" and "." not in name:
        row["divergence"] = {key: standing.metrics[key] for key in DivergenceRow.__required_keys__}  # type: ignore[typeddict-item]
    message = run / name / "error.txt"
    if standing.status == "failed" and message.is_file():
        row["error"] = message.read_text(encoding="utf-8", errors="replace").strip()
    return row


def _written(folder: Path) -> dict[str, int]:
    """The bytes of a model that a stage has written; its cost, as its prediction, counts traces only."""
    model = folder / "model"
    if not model.is_dir():
        return {}
    return {"model_bytes": sum(file.stat().st_size for file in model.rglob("*") if file.is_file())}


def _progress(standing: run_folder.State, logged: list[float]) -> ProgressRow:
    """How far an unfinished stage is: the newest step of its log, and the number of steps if the recipe says it."""
    progress = ProgressRow()
    if logged:
        progress["step"] = logged[-1]
    if steps := standing.config.get("steps"):
        progress["steps"] = float(steps)
    return progress


def read_curves(lines: Path) -> tuple[list[float], dict[str, list[float | None]]]:
    """Return (steps, values by key) of a metrics.jsonl: all its numbers; None at steps without a value.

    A line that a kill cut short, or that is damaged, is skipped. Long curves are thinned to `MAX_POINTS` means.
    """
    records = []
    for line in lines.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and _is_number(record.get("step")):
                records.append(record)
    keys = {key: None for record in records for key, value in record.items() if _is_number(value)}
    stretches = min(MAX_POINTS, len(records))
    edges = [n * len(records) // max(1, stretches) for n in range(stretches + 1)]
    parts = [records[a:b] for a, b in itertools.pairwise(edges)]
    curves = {
        key: [_mean([r[key] for r in part if _is_number(r.get(key))]) for part in parts]
        for key in keys
        if key != "step"
    }
    return [float(part[-1]["step"]) for part in parts], curves


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _mean(values: list[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def _notes(states: dict[str, run_folder.State], run: Path) -> list[str]:
    decided: dict[str, list[str]] = {}
    for name, standing in states.items():
        for key, one in standing.decided.items():
            decided.setdefault(f"{key} {one['value']} ({one['why']})", []).append(name)
    notes = [f"{what}: {', '.join(names)}" for what, names in decided.items()]
    for name, standing in states.items():
        if skipped := standing.metrics.get("prompts_too_long"):
            notes.append(f"{name}: {skipped} prompts were longer than the context and skipped")
        if (unjudged := standing.metrics.get("unjudged")) and "accuracy" in standing.metrics:
            notes.append(f"{name}: {unjudged} completions could not be judged and count as wrong")
        if bad := standing.metrics.get("bad_steps"):
            notes.append(f"{name}: {bad} steps were skipped because loss or gradient was not finite")
        if not run_folder.log_of(run / name, standing)[1]:
            notes.append(f"{name}: {run_folder.LOGGED} is not as the stage wrote it, so its curves are left out")
    return notes


def _sandboxes(recipe: Recipe) -> list[str]:
    """Describe the sandboxes in which the recipe's tasks and rewards run programs."""
    from distill.tasks import sandbox

    options = [plug.options for plug in recipe.tasks.values() if plug.fn == "humaneval"]
    options += [reward.options for stage in recipe.stages.values() for reward in _rewards(stage) if reward.fn == "code"]
    levels = {sandbox.describe(bool(o.get("unsafe", False)), o.get("sandbox_command")) for o in options}
    return [f"programs run in: {level}" for level in sorted(levels)]


def _rewards(stage: StageConfig) -> list[RewardConfig]:
    """Return the rewards that a stage names, in any of its fields."""
    lists = [value for _, value in stage if isinstance(value, list)]
    return [one for value in lists for one in value if isinstance(one, RewardConfig)]
