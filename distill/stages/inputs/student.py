"""The model that a stage trains: how it is loaded, and how it is kept."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from distill import models
from distill.compute.flops import ModelShape
from distill.recipe import GrpoStage, OnPolicyStage, TrainStage
from distill.records import UserError
from distill.stages.context import Context, save_model

if TYPE_CHECKING:
    from distill.progress import Live
    from distill.training.loop import Budget, Length


def load_student(config: TrainStage | GrpoStage | OnPolicyStage, context: Context) -> Any:
    """The stage's model in its dtype, with an adapter where the stage asks for one.

    Raises UserError for what needs a package or a device that is not there.
    """
    where = f"stages.{context.name}"
    folder, trust = context.model_dir(config.model), context.trusts(config.model)
    context.phase(f"loading {config.model}")
    options = {}
    if config.lora is not None and config.lora.quantised is not None:
        options = _quantisation(config.lora.quantised, config.dtype, where)
    model = models.load(folder, dtype=config.dtype, trust_remote_code=trust, **options)
    if config.liger:
        _use_liger(model, where)
    return model if config.lora is None else models.add_lora(model, config.lora)


def save_student(
    model: Any, tokenizer: Any, config: TrainStage | GrpoStage | OnPolicyStage, context: Context
) -> tuple[str, ModelShape]:
    """Write the trained model, its adapter merged; returns the weights' fingerprint and the model's shape."""
    context.phase("saving the model")
    if config.lora is not None:
        if config.lora.quantised is not None:
            model = _on_whole_base(model, config, context)
        model = model.merge_and_unload()
    fingerprint = save_model(model, tokenizer, context.folder, config.saved_in)
    return fingerprint, ModelShape.from_config(models.config_of(context.folder / "model"))


def live_steps(context: Context, length: Length | Budget) -> Live:
    """The live line of a stage's optimiser steps, from the step that its newest checkpoint holds."""
    from distill.training import checkpoint
    from distill.training.loop import WorkCounts

    done = checkpoint.newest_step(context.folder / "checkpoints")
    return context.live(max(length.steps(WorkCounts()), done), "steps", done)


def _quantisation(kind: str, dtype: str, where: str) -> dict[str, Any]:
    """What from_pretrained needs for a quantised base. The lm_head stays as it is: the loss reads it."""
    import torch
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"{where}.lora.quantised: {kind} needs bitsandbytes, which is not installed: pip install bitsandbytes. Without "
            f"the key the base is kept in {dtype}."
        )
    config = (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
        if kind == "nf4"
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": config, "device_map": {"": device}}


def _on_whole_base(model: Any, config: TrainStage | GrpoStage | OnPolicyStage, context: Context) -> Any:
    """The trained adapter on the base as it was before it was quantised."""
    import peft

    assert config.lora is not None
    folder, trust = context.model_dir(config.model), context.trusts(config.model)
    base = models.load(folder, dtype=config.dtype, trust_remote_code=trust)
    whole = models.add_lora(base, config.lora)
    peft.set_peft_model_state_dict(whole, peft.get_peft_model_state_dict(model))
    return whole


def _use_liger(model: Any, where: str) -> None:
    """Norms, rotary embedding and MLP by liger-kernel; its losses are left out."""
    import torch
    from transformers.integrations.liger import apply_liger_kernel

    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError(f"{where}.liger: liger-kernel is not installed: pip install liger-kernel, or remove the key.")
    if not torch.cuda.is_available():
        raise UserError(f"{where}.liger: liger-kernel's kernels run on a GPU, and there is none here; remove the key.")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(
            f"{where}.liger: liger-kernel has no kernels for models of type {model.config.model_type}; remove the key."
        )
    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
