"""Collect a run's folders into one report: stages, arms with their costs, comparisons, predictions and measurements."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from distill import run_folder
from distill.compute.ledger import ArmCost, arm_cost, mean_cost
from distill.recipe import Recipe, RewardConfig, StageConfig, base_name
from distill.recipe.lineage import parents_of, role_of, roles_of, traces_learned
from distill.reports.run_report import ArmRow, RunReport, SeedRow, SnapshotRow, StageRow, TracesRow, view
from distill.run.weak_teachers import weak_teachers
from distill.stages.budget import stage_costs

MAX_POINTS = 240
"""The largest number of points of a curve; longer curves are thinned by averaging."""


def collect(recipe: Recipe, run: Path, names: list[str], command: str) -> RunReport:
    """Collect everything that the run holds so far. names: of its nodes, in order. command: the one that repeats the run."""
    states = {name: standing for name in names if (standing := run_folder.read(run / name)) is not None}
    comparisons, examples, divergence_pairs, trace_ratios = [], [], [], []
    for standing in states.values():
        if "comparisons" in standing.metrics:
            comparisons += standing.metrics["comparisons"]
            examples += standing.metrics.get("examples", [])
            divergence_pairs += standing.metrics.get("divergence_pairs", [])
            trace_ratios += standing.metrics.get("trace_ratios", [])
    arms = _arms(recipe, run, states)
    return RunReport(
        name=recipe.name,
        description=recipe.description,
        created=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        seed=recipe.seed,
        task=", ".join(f"{name} ({task.fn})" for name, task in recipe.tasks.items()),
        environment=run_folder.environment(run),
        stages=[_stage_row(name, states.get(name), recipe, run) for name in names],
        arms=arms,
        comparisons=comparisons,
        divergence_pairs=divergence_pairs,
        trace_ratios=trace_ratios,
        examples=examples,
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
    row = StageRow(
        name=name,
        kind=standing.kind,
        status=standing.status,
        seconds=standing.seconds,
        cost=standing.cost,
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
    return row


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


def _arms(recipe: Recipe, run: Path, states: dict[str, run_folder.State]) -> dict[str, ArmRow]:
    costs = stage_costs(recipe, run)
    parents = parents_of(recipe)
    found: list[_Found] = []
    for name, config in recipe.stages.items():
        for arm, runs in config.evaluations().items():
            nodes = {seed: f"{name}.{child}" if child else name for seed, (child, _) in runs.items()}
            found.append(_Found(arm or name, name, nodes, [model for _, model in runs.values()]))
    # A teacher's training cost is shared by all its students; the training seeds of one arm are one student.
    taught = {
        base_name(model)
        for one in found
        for model in one.models
        if role_of(recipe, model) == "student" and arm_cost(model, costs, parents).stages["teacher"]
    }
    roles = roles_of(recipe, [one.models[0] for one in found])
    arms: dict[str, ArmRow] = {}
    for one in found:
        metrics = one.metrics(states)
        if metrics is not None:
            students = max(1, len(taught))
            spent = [arm_cost(m, costs, parents, students=students) for m in one.models]
            cost = spent[0] if len(spent) == 1 else mean_cost(spent)
            last = [costs[m].cost.flops for m in one.models if m in costs]
            before = cost.student.flops - sum(last) / max(len(last), 1)
            key = one.arm if one.arm not in arms else f"{one.stage}.{one.arm}"
            arms[key] = _arm(one, roles[one.models[0]], metrics, cost, before)
            compared = states.get(one.stage)
            if compared is not None and (row := compared.metrics.get("divergence", {}).get(one.arm)) is not None:
                arms[key]["divergence"] = row
            if (learned := traces_learned(recipe, one.models[0])) is not None:
                way = one.arm.removesuffix(f"-{learned[1]}")
                arms[key]["traces"] = TracesRow(comparison=one.stage, way=way, number=learned[1])
    return arms


@dataclass(frozen=True, slots=True)
class _Found:
    """An arm: the stage that evaluates it, the evaluation node of each training seed, and their models."""

    arm: str
    stage: str
    nodes: dict[int, str]
    models: list[str]

    def metrics(self, states: dict[str, run_folder.State]) -> dict[str, Any] | None:
        """Return the arm's scores, over its training seeds if there are several; None before they exist."""
        if any(node not in states or states[node].status != "done" for node in self.nodes.values()):
            return None
        if len(self.nodes) == 1:
            return states[next(iter(self.nodes.values()))].metrics
        standing = states.get(self.stage)
        if standing is None or standing.status != "done":
            return None
        found: dict[str, Any] | None = standing.metrics["arms"].get(self.arm)
        return found


def _arm(found: _Found, role: Any, metrics: dict[str, Any], cost: ArmCost, before: float) -> ArmRow:
    """Describe one arm. before: the student's FLOPs up to the stage that was evaluated."""
    model = found.models[0]
    scores = {
        key: metrics[key]
        for key in (
            "accuracy",
            "pass_at",
            "maj_at",
            "clipped_ratio",
            "mean_length",
            "problems",
            "samples",
            "unjudged",
        )
    }
    row: dict[str, Any] = dict(
        stage=model if len(found.models) == 1 else base_name(model),
        role=role,
        **scores,
        seeds=len(found.models),
        **view(cost.student),
        cost={
            "student": view(cost.student),
            "with_inference": view(cost.with_inference),
            "with_teacher": view(cost.with_teacher),
        },
        cost_stages=cost.stages,
    )
    if snapshots := metrics.get("snapshots"):
        row["snapshots"] = [
            SnapshotRow(
                flops=before + snapshot["flops"],
                accuracy=snapshot["accuracy"]["value"],
                low=snapshot["accuracy"]["low"],
                high=snapshot["accuracy"]["high"],
            )
            for snapshot in snapshots
        ]
    if len(found.models) > 1:
        by_seed = {one["seed"]: one["accuracy"] for one in metrics["by_seed"]}
        row["by_seed"] = [
            SeedRow(seed=seed, stage=model, accuracy=by_seed[seed])
            for seed, model in zip(found.nodes, found.models, strict=True)
        ]
    return cast(ArmRow, row)


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
