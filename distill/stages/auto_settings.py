"""Decide the engine and dtypes that a recipe sets to "auto", before anything loads.

A resumed stage keeps its decisions, also on another machine: stage.json stores each decision and its reason.
"""

from __future__ import annotations

from typing import Any, Literal

from distill import engines, machine, models, run_folder
from distill.recipe import EngineConfig, OptimStage
from distill.stages.context import Context


def settle(config: Any, context: Context) -> Any:
    """Return the stage's config with every "auto" replaced; print each decision and its reason."""
    model = next(iter(config.reads("model")), None)
    if isinstance(config, OptimStage) and model is not None:
        dtype = _dtype("dtype", config.dtype, "training", model, context)
        config = config.model_copy(update={"save_dtype": config.saved_in, "dtype": dtype})
    engine = getattr(config, "engine", None)
    if isinstance(engine, EngineConfig) and model is not None and not config.children():
        engine = settle_engine(engine, model, context)
        if engine.is_served:
            return config
        wish = "float32" if engine.fn == "reference" else engine.dtype
        dtype = _dtype("engine.dtype", wish, "engine", model, context)
        config = config.model_copy(update={"engine": engine.model_copy(update={"dtype": dtype})})
    return config


def settle_engine(config: EngineConfig, model: str, context: Context) -> EngineConfig:
    """Return the engine section with "auto" replaced; print the engine and the reason if it is not vLLM.

    model: a model of the recipe, or the stage that made it. A resumed stage keeps its engine, unless that was vLLM.
    """
    before = _before("engine.fn", context)
    if config.fn == engines.AUTO and before is not None and before["value"] != "vllm":
        context.say(f"engine {before['value']}: as this stage began ({before['why']})")
        return config.model_copy(update={"fn": before["value"]})
    choice = engines.choose(config, context.model_dir(model))
    if config.fn == engines.AUTO and choice.fn != "vllm":
        began = "" if before is None else f"this stage began with {before['value']}, but "
        context.say(f"engine {choice.fn}: {began}{choice.why}")
    keep("engine.fn", {"value": choice.fn, "why": choice.why}, context)
    return config.model_copy(update={"fn": choice.fn})


def _dtype(key: str, wish: str, purpose: Literal["training", "engine"], model: str, context: Context) -> str:
    """Return the dtype of the stage's first attempt, unless the recipe names another; else that of `machine.choose`."""
    before = _before(key, context)
    if before is not None and wish in ("auto", before["value"]):
        context.say(f"{key} {before['value']}: as this stage began ({before['why']})")
        return before["value"]
    width = machine.width_of(models.config_of(context.model_dir(model)))
    choice = machine.choose(context.machine(width), width, wish, purpose)
    decided: run_folder.Decided = {"value": choice.dtype, "why": choice.why}
    if not _said_by_another_stage(key, decided, context):
        context.say(f"{key} {choice.dtype}: {choice.why}")
    keep(key, decided, context)
    return choice.dtype


def _state(context: Context) -> run_folder.State:
    standing = run_folder.read(context.folder)
    assert standing is not None, "the pipeline writes stage.json before it starts a stage"
    return standing


def _before(key: str, context: Context) -> run_folder.Decided | None:
    """Return the decision of the stage's first attempt; None at the first attempt."""
    return _state(context).decided.get(key)


def keep(key: str, decided: run_folder.Decided, context: Context) -> None:
    """Store a decision in the stage's stage.json."""
    standing = _state(context)
    standing.decided[key] = decided
    run_folder.write(context.folder, standing)


def _said_by_another_stage(key: str, decided: run_folder.Decided, context: Context) -> bool:
    """Return whether another stage of the run printed the same decision and reason: once a run is enough."""
    others = [file.parent for file in context.run.glob(f"*/{run_folder.FILE}")]
    states = [run_folder.read(folder) for folder in others if folder != context.folder]
    return any(one is not None and one.decided.get(key) == decided for one in states)
