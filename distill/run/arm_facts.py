"""How the models of a report's arms were made, in words: loss, data, steps, start, size. From the recipe and the stages' records.

Nothing is loaded: sizes come from config.json files that lie in the run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill import run_folder
from distill.models.integrity import verify_but_weights
from distill.models.shape import ModelShape
from distill.recipe import GrpoStage, OnPolicyStage, PruneStage, Recipe, StageConfig, TrainStage, base_name, data_of
from distill.recipe.lineage import origin, training_line, upstream_stages, writers_of_first_data
from distill.reports.context_rows import AboutRow
from distill.reports.wording import scaled

TEXT = "cross_entropy"


def about(recipe: Recipe, run: Path, models: Sequence[str], arms: Mapping[str, str]) -> AboutRow:
    """Describe an arm. models: its model of each training seed. arms: the model of every arm, by name."""
    model = models[0]
    stage = recipe.stages.get(model)
    above = {base_name(name) for name in (*upstream_stages(recipe, model), *_whole_line(recipe, model))}
    line = [base_name(name) for name in _whole_line(recipe, model)[1:]]
    teachers = {base_name(name) for name in writers_of_first_data(recipe, model)} if stage and stage.trains else set()
    named = {name: base_name(other) for name, other in arms.items()}
    row = AboutRow(
        training="",
        data="",
        steps="",
        start=base_name(next(iter(stage.reads("model")), "")) if stage else "",
        size=_size(recipe, run, model),
        base=_source(recipe, origin(recipe, model)),
        method="",
        builds_on=[name for name, other in named.items() if other in above and other != base_name(model)],
        teachers=[name for name, other in named.items() if other in teachers],
        begins_with=[name for one in line for name, other in named.items() if other == one],
    )
    if stage is None:
        row["training"] = "as it comes"
    elif isinstance(stage, PruneStage):
        row["training"], row["method"] = "pruned, not trained", "pruned"
    elif stage.trains:
        row["training"], row["data"], row["method"] = _training(recipe, run, model, stage)
        row["steps"] = _steps(run, models)
    return row


def _training(recipe: Recipe, run: Path, model: str, stage: StageConfig) -> tuple[str, str, str]:
    """Return (loss or objective, data, way of training in a few words)."""
    if isinstance(stage, GrpoStage):
        rewards = ", ".join(f"{one.fn} × {one.weight:g}" if one.weight != 1 else one.fn for one in stage.rewards)
        data = f"its own completions, {stage.prompts} problems × {stage.group_size} a step"
        return f"RL ({stage.objective.fn}); rewards {rewards}", data, "rewards"
    if isinstance(stage, OnPolicyStage):
        names = " and ".join(dict.fromkeys(base_name(name) for name in stage.reads("teacher")))
        data = f"its own completions, {stage.prompts} problems × {stage.group_size} a step, scored by {names}"
        return stage.loss.fn, data, "on-policy"
    if not isinstance(stage, TrainStage):
        return stage.kind, "", ""
    sets = list(data_of(stage.data))
    known = run_folder.read(run / model)
    learned = known.metrics.get("examples") if known else None
    count = f"{min(int(learned), stage.max_traces or int(learned)):,} " if learned else ""
    teachers = stage.reads("teacher") or [name for one in sets for name in _writers(recipe, one)]
    own = [name for name in _samplers(recipe, sets) if name in training_line(recipe, model)]
    names = " and ".join(dict.fromkeys(base_name(name) for name in teachers))
    if not any(one in recipe.stages for one in sets) and not stage.reads("teacher"):
        return stage.loss.fn, f"{count}rows of {', '.join(Path(one).name for one in sets)}", "given text"
    if own:
        return stage.loss.fn, f"{count}completions of its own, scored by {names}", "its own completions, scored"
    methods = {TEXT: "text", "ce_kl": "text and distributions"}
    return (
        stage.loss.fn,
        f"{count}traces of {names}" if names else f"{count}traces",
        methods.get(stage.loss.fn, "distributions"),
    )


def _writers(recipe: Recipe, data: str) -> list[str]:
    """The models that a set of traces has its distributions from: its own stage's, or through filters that of the stage below."""
    while data in recipe.stages:
        stage = recipe.stages[data]
        if models := stage.reads("model"):
            return models
        data = next(iter(stage.reads("data")), "")
    return []


def _samplers(recipe: Recipe, sets: Sequence[str]) -> list[str]:
    """The models that wrote the text of sets of traces: those of the earliest stage below each."""
    found: list[str] = []
    for data in sets:
        last: list[str] = []
        while data in recipe.stages:
            stage = recipe.stages[data]
            last = stage.reads("model") or last
            data = next(iter(stage.reads("data")), "")
        found += last
    return found


def _steps(run: Path, models: Sequence[str]) -> str:
    """The number of optimiser steps; of several training seeds the range."""
    known = [run_folder.read(run / model) for model in models]
    steps = sorted(
        {int(one.metrics["steps"]) for one in known if one and isinstance(one.metrics.get("steps"), int | float)}
    )
    if not steps:
        return ""
    return f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,}–{steps[-1]:,}"


def _whole_line(recipe: Recipe, model: str) -> list[str]:
    """A model, the one that it was trained or pruned from, and so on to the first."""
    found = [model]
    while found[-1] in recipe.stages and (before := recipe.stages[found[-1]].reads("model")):
        found.append(before[0])
    return found


def _size(recipe: Recipe, run: Path, model: str) -> str:
    """Parameters of a model of the run, and the layers that pruning has left of it; "" if unknown. Raises DataError if it is damaged."""
    parts = []
    verify_but_weights(run / model / "model", f"Make it again with --redo {model}.")
    try:
        config: dict[str, Any] = json.loads((run / model / "model" / "config.json").read_text(encoding="utf-8"))
        parts.append(scaled(ModelShape.from_config(config).params_total))
    except (OSError, ValueError, KeyError):
        pass
    pruned = next((name for name in _whole_line(recipe, model) if _is_pruned(recipe, name)), None)
    if pruned and (known := run_folder.read(run / pruned)) and "layers_kept" in known.metrics:
        parts.append(f"{len(known.metrics['layers_kept'])} of {known.metrics['layers_before']} layers")
    return ", ".join(parts)


def _is_pruned(recipe: Recipe, name: str) -> bool:
    return isinstance(recipe.stages.get(name), PruneStage)


def _source(recipe: Recipe, model: str) -> str:
    """The name of a model of the recipe without folders and file endings."""
    source = recipe.models[model].source if model in recipe.models else model
    return source.rstrip("/").rpartition("/")[2].removesuffix(".gguf") if "/" in source else source
