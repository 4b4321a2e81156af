"""A run's folders as one report: stages, arms with what they cost, comparisons, predictions beside measurements."""

from __future__ import annotations

import itertools
import json
import math
import time
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import yaml

from distill.recipe import CompareStage, EvalStage, GrpoStage, Recipe, validate
from distill.records import Cost
from distill.reports.ledger import ArmCost, StageCost, arm_cost
from distill.reports.schema import ArmRow, RunReport, StageRow, view
from distill.stages import state

MAX_POINTS = 240
"""Of a curve: longer ones are thinned to means of stretches."""


def collect(recipe: Recipe, run: Path, names: list[str], source: Path) -> RunReport:
    """Everything the run holds by now. names: of its nodes, in order."""
    states = {name: standing for name in names if (standing := state.read(run / name)) is not None}
    comparisons, examples = [], []
    for standing in states.values():
        if standing.kind == "compare":
            comparisons += standing.metrics.get("comparisons", [])
            examples += standing.metrics.get("examples", [])
    environment = run / "environment.json"
    arms = _arms(recipe, states)
    return RunReport(
        name=recipe.name,
        description=recipe.description,
        created=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        seed=recipe.seed,
        task=", ".join(f"{name} ({task.fn})" for name, task in recipe.tasks.items()),
        environment=json.loads(environment.read_text(encoding="utf-8"))
        if environment.is_file()
        else {},
        stages=[_stage_row(name, states.get(name), recipe, run) for name in names],
        arms=arms,
        comparisons=comparisons,
        examples=examples,
        recipe=yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        reproduce=[f"distill run {source}"],
        notes=[*_notes(states), *_sandboxes(recipe)],
    )


def collect_run(run: Path) -> RunReport:
    """What a run's folder holds, finished or half way."""
    resolved = yaml.safe_load((run / "resolved.yaml").read_text(encoding="utf-8"))
    recipe = validate(resolved, str(run / "resolved.yaml"))
    names = [name for stage in recipe.stages for name in (*_children(recipe, stage), stage)]
    return collect(recipe, run, names, run / "recipe.yaml")


def _children(recipe: Recipe, stage: str) -> list[str]:
    """The evaluations that a compare stage expands into, by their folders."""
    config = recipe.stages[stage]
    return [f"{stage}.{arm}" for arm in config.arms] if isinstance(config, CompareStage) else []


def _stage_row(name: str, standing: state.State | None, recipe: Recipe, run: Path) -> StageRow:
    if standing is None:
        config = recipe.stages[name.split(".")[0]]
        kind = "eval" if "." in name and isinstance(config, CompareStage) else config.kind
        return StageRow(name=name, kind=kind, status="pending", seconds=0.0, cost={})
    row = StageRow(
        name=name,
        kind=standing.kind,
        status=standing.status,
        seconds=standing.seconds,
        cost=standing.cost,
        metrics={
            key: value
            for key, value in standing.metrics.items()
            if isinstance(value, int | float | str)
        },
    )
    if standing.predicted:
        row["predicted"] = {
            key: standing.predicted[key] for key in ("tokens", "bytes", "flops", "seconds")
        }  # type: ignore[typeddict-item]
    lines = run / name / "metrics.jsonl"
    if lines.is_file():
        row["curve_steps"], row["curves"] = read_curves(lines)
    return row


def read_curves(lines: Path) -> tuple[list[float], dict[str, list[float | None]]]:
    """(steps, values by key) of a metrics.jsonl: whatever numbers its lines hold; None where one was not logged.

    A line that a kill cut short is left out. Long curves are thinned to `MAX_POINTS` means.
    """
    records = [
        json.loads(line)
        for line in lines.read_text(encoding="utf-8").splitlines()
        if line.endswith("}")
    ]
    records = [record for record in records if "step" in record]
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


def _arms(recipe: Recipe, states: dict[str, state.State]) -> dict[str, ArmRow]:
    costs = {
        name: StageCost(standing.kind, _cost(standing.cost), _cost(standing.teacher_cost))
        for name, standing in states.items()
        if "." not in name
    }
    parents = {name: list(config.inputs()) for name, config in recipe.stages.items()}
    found: list[tuple[str, str, str]] = []
    for name, config in recipe.stages.items():
        if isinstance(config, CompareStage):
            found += [(arm, f"{name}.{arm}", model) for arm, model in config.arms.items()]
        elif isinstance(config, EvalStage):
            found.append((name, name, config.model))
    # A teacher that was trained once has as many students as there are to share its cost.
    taught = {
        model
        for _, _, model in found
        if role_of(recipe, model) == "student" and arm_cost(model, costs, parents).stages["teacher"]
    }
    arms: dict[str, ArmRow] = {}
    for arm, node, model in found:
        if node in states and states[node].status == "done":
            cost = arm_cost(model, costs, parents, students=max(1, len(taught)))
            arms[arm if arm not in arms else node] = _arm(recipe, model, states[node].metrics, cost)
    return arms


def _arm(recipe: Recipe, model: str, metrics: dict[str, Any], cost: ArmCost) -> ArmRow:
    scores = {
        key: metrics[key]
        for key in (
            "accuracy",
            "pass_at",
            "maj_at",
            "truncation",
            "mean_length",
            "problems",
            "samples",
            "unjudged",
        )
    }
    row: dict[str, Any] = dict(
        stage=model,
        role=role_of(recipe, model),
        **scores,
        seeds=1,
        **view(cost.student),
        cost={
            "student": view(cost.student),
            "with_inference": view(cost.with_inference),
            "with_teacher": view(cost.with_teacher),
        },
        cost_stages=cost.stages,
    )
    return cast(ArmRow, row)


def role_of(recipe: Recipe, model: str) -> Any:
    """A model that teaches another is a teacher; of the others, one that nothing was trained into is a start.

    To teach is to be an input called `teacher`, or to have written the traces of a stage whose model is not of its own
    line: what a model learns from its own completions is its own doing.
    """
    for name, config in recipe.stages.items():
        inputs = list(config.inputs())
        if any(key.startswith("teacher") and value == model for key, value in inputs):
            return "teacher"
        writers = {
            value
            for stage in _data_above(recipe, name)
            for key, value in recipe.stages[stage].inputs()
            if key == "model"
        }
        if model in writers and model not in line(recipe, name):
            return "teacher"
    trained = model in recipe.stages and recipe.stages[model].kind != "prune"
    return "student" if trained else "start"


def line(recipe: Recipe, model: str) -> list[str]:
    """A model and those that it was trained from, the last one first; a pruned model begins a line."""
    found = [model]
    while found[-1] in recipe.stages and recipe.stages[found[-1]].kind != "prune":
        before = dict(recipe.stages[found[-1]].inputs()).get("model")
        if before is None:
            break
        found.append(before)
    return found


def _data_above(recipe: Recipe, name: str) -> list[str]:
    """The stages that the data of a stage comes from."""
    found: list[str] = []
    frontier = [name]
    while frontier:
        for key, value in recipe.stages[frontier.pop()].inputs():
            if key == "data" and value in recipe.stages and value not in found:
                found.append(value)
                frontier.append(value)
    return found


def _cost(tree: dict[str, Any]) -> Cost:
    return Cost(**{f.name: tree[f.name] for f in fields(Cost) if f.name in tree})


def _notes(states: dict[str, state.State]) -> list[str]:
    notes = []
    for name, standing in states.items():
        if skipped := standing.metrics.get("prompts_too_long"):
            notes.append(f"{name}: {skipped} prompts were longer than the context and skipped")
        if bad := standing.metrics.get("bad_steps"):
            notes.append(
                f"{name}: {bad} steps were skipped because loss or gradient was not finite"
            )
    return notes


def _sandboxes(recipe: Recipe) -> list[str]:
    """Where the programs that the recipe's tasks and rewards judge are run, in words."""
    from distill.tasks import sandbox

    rewards = [
        r for stage in recipe.stages.values() if isinstance(stage, GrpoStage) for r in stage.rewards
    ]
    options = [plug.options for plug in recipe.tasks.values() if plug.fn == "humaneval"]
    options += [reward.options for reward in rewards if reward.fn == "code"]
    levels = {
        sandbox.describe(bool(o.get("unsafe", False)), o.get("sandbox_command")) for o in options
    }
    return [f"programs run in: {level}" for level in sorted(levels)]
