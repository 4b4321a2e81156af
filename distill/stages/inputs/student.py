"""Load the model that a stage trains, and save it."""

from __future__ import annotations

import importlib.util
import shutil
from typing import TYPE_CHECKING, Any

from distill import models, world
from distill.compute.flops import ModelShape
from distill.files import free_space
from distill.recipe import GrpoStage, OnPolicyStage, TrainStage
from distill.records import UserError, draw_seed
from distill.stages.context import Context, save_model
from distill.training import parallel

if TYPE_CHECKING:
    from distill.progress import Live
    from distill.training.step import Budget, Length


def load_student(config: TrainStage | GrpoStage | OnPolicyStage, context: Context) -> Any:
    """Load the stage's model in its dtype, with an adapter if the stage has one. The model's own dropout is turned off.

    Raises UserError if a required package or device is missing.
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
    models.without_dropout(model)
    _prepare_to_save(model, config, context)
    if config.lora is None:
        return model
    if (
        not isinstance(config, TrainStage)
        and models.ties_ends(model)
        and (ends := models.touched_ends(model, config.lora))
    ):
        raise UserError(
            f"{where}.lora: {', '.join(ends)} is one matrix with the other end of this model, and the engine that samples keeps it "
            "so: leave it out of target_modules and modules_to_save, or train without lora."
        )
    import torch

    # The adapter's start and its dropout: the same for the same recipe. Every process drops other values.
    torch.manual_seed(draw_seed(context.seed, context.name, "adapter"))
    adapted = models.add_lora(model, config.lora)
    if world.rank():
        torch.manual_seed(draw_seed(context.seed, context.name, "dropout", world.rank()))
    if config.lora.quantised is None and world.is_main():
        models.rehearse_merge(adapted)
    return adapted


def save_student(
    model: Any, tokenizer: Any, config: TrainStage | GrpoStage | OnPolicyStage, context: Context
) -> tuple[str, ModelShape]:
    """Save the trained model with its adapter merged; return the weights' fingerprint and the model's shape.

    The main process saves; the others send it their shards and wait.
    """
    context.phase("saving the model")
    trust = context.trusts(config.model)
    if parallel.has_shards(model):
        model = _gathered(model, config, context)
    fingerprint = ""
    if world.is_main():
        if config.lora is not None:
            if config.lora.quantised is not None:
                model = _on_whole_base(model, config, context)
            trained_T = models.label_logps(model)
            model = model.merge_and_unload()
            models.check_merged(model, trained_T)
        fingerprint = save_model(model, tokenizer, context, config.saved_in, trust_remote_code=trust)
        if config.keep_checkpoints == 0:
            shutil.rmtree(context.folder / "checkpoints", ignore_errors=True)
    fingerprint = world.broadcast(fingerprint)
    return fingerprint, ModelShape.from_config(models.config_of(context.folder / "model"))


def _gathered(model: Any, config: TrainStage | GrpoStage | OnPolicyStage, context: Context) -> Any:
    """Gather a sharded model, a weight at a time, into a whole one in its dtype on the main process; None on the others."""
    import torch

    whole = None
    if world.is_main():
        folder, trust = context.model_dir(config.model), context.trusts(config.model)
        whole = models.load(folder, dtype=config.dtype, trust_remote_code=trust)
        models.mend_generation_config(whole)
        if config.lora is not None:
            whole = models.add_lora(whole, config.lora)
    into = dict(whole.named_parameters()) if whole is not None else {}
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            gathered = world.whole(tensor)
            if whole is not None:
                into[name].copy_(gathered)
    return whole


def _prepare_to_save(model: Any, config: TrainStage | GrpoStage | OnPolicyStage, context: Context) -> None:
    """Find now what would make the save fail after training, and mend what can be. Raises UserError."""
    if changed := models.mend_generation_config(model):
        context.say(changed)
    trust = context.trusts(config.model)
    tokenizer = models.load_tokenizer(context.model_dir(config.model), trust_remote_code=trust)
    if world.is_main() and (config.lora is None or config.lora.quantised is None):
        models.rehearse_save(model, tokenizer, config.model)
    ModelShape.from_config(model.config.to_dict())
    size = sum(p.numel() for p in model.parameters()) * (4 if config.saved_in == "float32" else 2)
    if size > (free := free_space(context.folder)):
        raise UserError(
            f"{context.folder}: {free / 1e9:.1f} GB are free, and the trained model takes {size / 1e9:.1f} GB. Make room, or name "
            "another folder with --runs."
        )


def live_steps(context: Context, length: Length | Budget) -> Live:
    """Start the live line of a stage's optimiser steps, from the step of its newest checkpoint."""
    from distill.training import checkpoint
    from distill.training.step import WorkCounts

    done = checkpoint.newest_step(context.folder / "checkpoints")
    return context.live(max(length.steps(WorkCounts()), done), "steps", done)


def _quantisation(kind: str, dtype: str, where: str) -> dict[str, Any]:
    """Return from_pretrained's options for a quantised base. The lm_head is not quantised: the loss reads it."""
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
    """Return the trained adapter on the unquantised base."""
    import peft

    assert config.lora is not None
    folder, trust = context.model_dir(config.model), context.trusts(config.model)
    base = models.load(folder, dtype=config.dtype, trust_remote_code=trust)
    whole = models.add_lora(base, config.lora)
    peft.set_peft_model_state_dict(whole, peft.get_peft_model_state_dict(model))
    return whole


def _use_liger(model: Any, where: str) -> None:
    """Use liger-kernel for norms, rotary embedding and MLP; its losses are not used."""
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
