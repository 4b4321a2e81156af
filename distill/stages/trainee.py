"""The model that a stage trains: how it is loaded, and how it is kept."""

from __future__ import annotations

from typing import Any

from distill import models
from distill.recipe import GrpoStage, OnPolicyStage, TrainStage
from distill.reports.flops import ModelShape
from distill.stages.context import Context, save_model


def load_trainee(config: TrainStage | GrpoStage | OnPolicyStage, context: Context) -> Any:
    """The stage's model in its dtype, with an adapter where the stage asks for one."""
    folder, trust = context.model_dir(config.model), context.trusts(config.model)
    model = models.load(folder, dtype=config.dtype, trust_remote_code=trust)
    return model if config.lora is None else models.add_lora(model, config.lora)


def keep_trainee(
    model: Any, tokenizer: Any, config: TrainStage | GrpoStage | OnPolicyStage, context: Context
) -> tuple[str, ModelShape]:
    """Write the trained model, its adapter merged; returns the weights' fingerprint and the model's shape."""
    if config.lora is not None:
        model = model.merge_and_unload()
    fingerprint = save_model(model, tokenizer, context.folder)
    return fingerprint, ModelShape.from_config(models.config_of(context.folder / "model"))
