"""The arms of a report: scores, costs and facts of every evaluated model, grouped by how they were evaluated.

Evaluations with the same task, problems and sampling can be compared: they are the arms. An evaluation under other conditions, such
as a measurement of pass@8 before RL, is listed beside them as a measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from distill import run_folder
from distill.compute.ledger import ArmCost, StageCost, arm_cost, mean_cost, shares
from distill.recipe import CompareStage, EvalStage, Recipe, SamplingConfig, base_name
from distill.recipe.lineage import parents_of, roles_of, traces_learned
from distill.records import Cost
from distill.reports.context_rows import EvaluationRow, LedgerRow
from distill.reports.run_report import (
    ArmRow,
    ComparisonRow,
    DivergencePairRow,
    ExampleRow,
    SeedRow,
    SnapshotRow,
    TraceRatioRow,
    TracesRow,
    view,
)
from distill.run import arm_facts
from distill.stages.budget import stage_costs

SCORES = ("accuracy", "pass_at", "maj_at", "clipped_ratio", "mean_length", "problems", "samples", "unjudged")


@dataclass(slots=True)
class Collected:
    """The parts of a report that are about arms; see `RunReport`."""

    arms: dict[str, ArmRow] = field(default_factory=dict)
    measurements: dict[str, ArmRow] = field(default_factory=dict)
    evaluations: dict[str, EvaluationRow] = field(default_factory=dict)
    comparisons: list[ComparisonRow] = field(default_factory=list)
    divergence_pairs: list[DivergencePairRow] = field(default_factory=list)
    trace_ratios: list[TraceRatioRow] = field(default_factory=list)
    examples: list[ExampleRow] = field(default_factory=list)
    ledger: list[LedgerRow] = field(default_factory=list)


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


def collect_arms(recipe: Recipe, run: Path, states: dict[str, run_folder.State]) -> Collected:
    """Collect all arms that have been evaluated, what was compared, and the ledger."""
    found = [
        _Found(
            arm or name,
            name,
            {seed: f"{name}.{child}" if child else name for seed, (child, _) in runs.items()},
            [model for _, model in runs.values()],
        )
        for name, config in recipe.stages.items()
        for arm, runs in config.evaluations().items()
    ]
    collected = Collected(evaluations=evaluations_of(recipe))
    named: dict[str, list[ArmCost]] = {}
    costs, parents = stage_costs(recipe, run), parents_of(recipe)
    spent = {(one.stage, one.arm): [arm_cost(m, costs, parents) for m in one.models] for one in found}
    for evaluation, conditions in collected.evaluations.items():
        group = [one for one in found if one.stage in conditions["stages"]]
        rows = collected.arms if conditions["main"] else collected.measurements
        roles = roles_of(recipe, [one.models[0] for one in group])
        keys: dict[tuple[str, str], str] = {}
        for one in group:
            taken = {*rows, *keys.values(), *named}
            key = keys[one.stage, one.arm] = one.arm if one.arm not in taken else f"{one.stage}.{one.arm}"
            if conditions["main"]:
                named[key] = spent[one.stage, one.arm]
            if (metrics := one.metrics(states)) is not None:
                cost = mean_cost(spent[one.stage, one.arm])
                last = [costs[m].cost.flops for m in one.models if m in costs]
                row = _arm(one, roles[one.models[0]], metrics, cost, cost.student.flops - sum(last) / max(len(last), 1))
                _add_measures(row, one, recipe, states)
                row["evaluation"] = evaluation
                rows[key] = row
        together = {key: one for one in group if (key := keys[one.stage, one.arm]) in rows}
        models = {key: one.models[0] for key, one in together.items()}
        for key, one in together.items():
            rows[key]["about"] = arm_facts.about(recipe, run, one.models, models)
        _add_comparisons(collected, states, keys)
    collected.ledger = _ledger(costs, states, named)
    return collected


def evaluations_of(recipe: Recipe) -> dict[str, EvaluationRow]:
    """Group the stages that evaluate by what their numbers are of: task, split, problems, samples and sampling.

    The main groups are those of comparisons; without any, for each task the group with the most models, of equal ones the last.
    """
    found: dict[str, EvaluationRow] = {}
    by_conditions: dict[tuple[Any, ...], str] = {}
    for name, stage in recipe.stages.items():
        if not stage.evaluations():
            continue
        options = stage.model_dump()
        sampling = stage.sampling if isinstance(stage, CompareStage | EvalStage) else SamplingConfig()
        conditions = (options.get("task", ""), options.get("problems", 0), options.get("samples", 1), sampling)
        key = by_conditions.setdefault(conditions, name)
        if key in found:
            found[key]["stages"].append(name)
            continue
        task, problems, samples, _ = conditions
        found[key] = EvaluationRow(
            stages=[name],
            task=task,
            split="held_out",
            problems=problems,
            samples=samples,
            sampling=_sampling(sampling),
            main=False,
        )
    compares = {name for name, stage in recipe.stages.items() if isinstance(stage, CompareStage)}
    main = [key for key, row in found.items() if compares & {*row["stages"]}]
    if not main:
        tasks = dict.fromkeys(row["task"] for row in found.values())
        main = [
            max((key for key, row in found.items() if row["task"] == task), key=lambda one: _rank(found, one))
            for task in tasks
        ]
    for key in main:
        found[key]["main"] = True
    return found


def _rank(found: Mapping[str, EvaluationRow], key: str) -> tuple[int, int]:
    return len(found[key]["stages"]), list(found).index(key)


def _sampling(sampling: SamplingConfig) -> str:
    heat = "greedy" if not sampling.temperature else f"temperature {sampling.temperature:g}"
    nucleus = f", top_p {sampling.top_p:g}" if sampling.top_p != 1 else ""
    return f"{heat}{nucleus}, at most {sampling.max_tokens:,} tokens"


def _add_measures(row: ArmRow, found: _Found, recipe: Recipe, states: Mapping[str, run_folder.State]) -> None:
    """Add what a comparison measured beside accuracy, and the arm's place on a curve over numbers of traces."""
    compared = states.get(found.stage)
    if compared is not None and (divergence := compared.metrics.get("divergence", {}).get(found.arm)) is not None:
        row["divergence"] = divergence
    if (learned := traces_learned(recipe, found.models[0])) is not None:
        way = found.arm.removesuffix(f"-{learned[1]}")
        row["traces"] = TracesRow(comparison=found.stage, way=way, number=learned[1])


def _add_comparisons(
    collected: Collected, states: Mapping[str, run_folder.State], keys: Mapping[tuple[str, str], str]
) -> None:
    """Add what the comparisons of a group found, with the names that its arms have in the report."""
    for stage in dict.fromkeys(stage for stage, _ in keys):
        metrics = states[stage].metrics if stage in states else {}
        names = {arm: key for (where, arm), key in keys.items() if where == stage}
        collected.comparisons += [_renamed(row, names, "a", "b") for row in metrics.get("comparisons", [])]
        collected.divergence_pairs += [_renamed(row, names, "a", "b") for row in metrics.get("divergence_pairs", [])]
        collected.trace_ratios += metrics.get("trace_ratios", [])
        for example in metrics.get("examples", []):
            answers = [_renamed(one, names, "arm") for one in example["answers"]]
            collected.examples.append(_renamed({**example, "answers": answers}, names, "won_by", "lost_by"))


def _renamed(row: Mapping[str, Any], names: Mapping[str, str], *fields: str) -> Any:
    """The row with other names of arms in some of its fields."""
    return {**row, **{key: names.get(row[key], row[key]) for key in fields}}


def _ledger(
    costs: Mapping[str, StageCost], states: Mapping[str, run_folder.State], arms: Mapping[str, list[ArmCost]]
) -> list[LedgerRow]:
    """What the run spent, each stage once: shared by arms, used by none, and the evaluations."""
    evaluating = [
        name
        for name, state in states.items()
        if state.kind in ("eval", "divergence", "compare") or state.config.get("split") == "held_out"
    ]
    working = {name: one for name, one in costs.items() if name not in evaluating}
    rows = [
        LedgerRow(
            what="stages" if one.arms else "unused",
            stages=list(dict.fromkeys(base_name(name) for name in one.stages)),
            arms=one.arms,
            flops=one.cost.flops,
            seconds=one.cost.wall_seconds,
            dollars=one.cost.dollars,
        )
        for one in shares(working, arms)
    ]
    if evaluating:
        total = sum((Cost.of(states[name].cost) for name in evaluating), Cost())
        names = list(dict.fromkeys(base_name(name).partition(".")[0] for name in evaluating))
        rows.append(
            LedgerRow(
                what="evaluation",
                stages=names,
                arms=[],
                flops=total.flops,
                seconds=total.wall_seconds,
                dollars=total.dollars,
            )
        )
    return rows


def _arm(found: _Found, role: Any, metrics: dict[str, Any], cost: ArmCost, before: float) -> ArmRow:
    """Describe one arm. before: the student's FLOPs up to the stage that was evaluated."""
    model = found.models[0]
    row: dict[str, Any] = dict(
        stage=model if len(found.models) == 1 else base_name(model),
        role=role,
        **{key: metrics[key] for key in SCORES},
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
