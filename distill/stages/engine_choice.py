"""The engine of a stage: what `engine: auto` comes to, settled before anything loads.

A stage goes on with the engine that it began with where it can; stage.json keeps it.
"""

from __future__ import annotations

from distill import engines, run_folder
from distill.recipe import EngineConfig
from distill.stages.context import Context

KEY = "engine.fn"


def settle_engine(config: EngineConfig, model: str, context: Context) -> EngineConfig:
    """The engine section with a name in place of "auto"; says which and why where it is not vLLM.

    model: a model of the recipe, or the stage that made it. The name is written to stage.json.
    """
    standing = run_folder.read(context.folder)
    assert standing is not None, "the pipeline writes stage.json before it starts a stage"
    before = standing.decided.get(KEY)
    if config.fn == engines.AUTO and before is not None and before["value"] != "vllm":
        context.say(f"engine {before['value']}: as this stage began ({before['why']})")
        return config.model_copy(update={"fn": before["value"]})
    choice = engines.choose(config, context.model_dir(model))
    if config.fn == engines.AUTO and choice.fn != "vllm":
        began = "" if before is None else f"this stage began with {before['value']}, but "
        context.say(f"engine {choice.fn}: {began}{choice.why}")
    standing.decided[KEY] = {"value": choice.fn, "why": choice.why}
    run_folder.write(context.folder, standing)
    return config.model_copy(update={"fn": choice.fn})
