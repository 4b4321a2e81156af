"""The dtype of a stage's trainer and of its engine: what the recipe leaves to the machine, settled before anything loads.

A stage goes on in the dtype that it began with, also on another machine: stage.json keeps it.
"""

from __future__ import annotations

from typing import Any, Literal

from distill import machine, models, run_folder
from distill.recipe import EngineConfig, OptimStage
from distill.stages.context import Context
from distill.stages.engine_choice import settle_engine


def settle(config: Any, context: Context) -> Any:
    """The stage's config with an engine and a dtype in place of every "auto"; says which and why, and writes both to stage.json."""
    if isinstance(config, OptimStage):
        dtype = _settled("dtype", config.dtype, "training", config, context)
        config = config.model_copy(update={"save_dtype": config.saved_in, "dtype": dtype})
    engine = getattr(config, "engine", None)
    if isinstance(engine, EngineConfig) and not config.children():
        engine = settle_engine(engine, config.model, context)
        wish = "float32" if engine.fn == "reference" else engine.dtype
        dtype = _settled("engine.dtype", wish, "engine", config, context)
        config = config.model_copy(update={"engine": engine.model_copy(update={"dtype": dtype})})
    return config


def _settled(key: str, wish: str, purpose: Literal["training", "engine"], config: Any, context: Context) -> str:
    standing = run_folder.read(context.folder)
    assert standing is not None, "the pipeline writes stage.json before it starts a stage"
    before = standing.decided.get(key)
    if before is not None and wish in ("auto", before["value"]):
        context.say(f"{key} {before['value']}: as this stage began ({before['why']})")
        return before["value"]
    width = machine.width_of(models.config_of(context.model_dir(config.model)))
    choice = machine.choose(context.machine(width), width, wish, purpose)
    decided: run_folder.Decided = {"value": choice.dtype, "why": choice.why}
    if not _said_before(context, key, decided):
        context.say(f"{key} {choice.dtype}: {choice.why}")
    standing.decided[key] = decided
    run_folder.write(context.folder, standing)
    return choice.dtype


def _said_before(context: Context, key: str, decided: run_folder.Decided) -> bool:
    """Whether another stage of the run came to the same for the same reason: once a run is enough."""
    others = [file.parent for file in context.run.glob(f"*/{run_folder.FILE}")]
    states = [run_folder.read(folder) for folder in others if folder != context.folder]
    return any(one is not None and one.decided.get(key) == decided for one in states)
