"""Checks of a recipe's models before the run: each one that is on this machine loads whole, and suits the stages that name it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill import models
from distill.errors import in_a_line
from distill.models import gguf, prune_width
from distill.recipe import ModelConfig, OnPolicyStage, OptimStage, PruneStage, Recipe, served_models
from distill.recipe.lineage import origin
from distill.records import UserError


def check_models(recipe: Recipe) -> None:
    """Check every model of a recipe that is a folder or lies in the hub's cache, and that this machine runs. Raises UserError."""
    served = served_models(recipe)
    for name, model in recipe.models.items():
        folder = None if name in served else local_folder(model)
        if folder is not None:
            models.check_model(folder, trust_remote_code=model.trust_remote_code)
            _check_quantised(name, folder, recipe)
    _check_widths(recipe)


def local_folder(model: ModelConfig) -> Path | None:
    """Return a model's folder if its weights are on this machine; None for a GGUF file and for what is on the hub alone."""
    if model.source.startswith(models.PACKAGE):
        return None
    folder = Path(model.source).expanduser()
    if folder.is_dir():
        return folder
    found = models.cached_folder(model.source, model.revision)
    # A download that was cut goes on when the model is needed.
    return found if found is not None and models.is_whole(found) else None


def _check_quantised(name: str, folder: Path, recipe: Recipe) -> None:
    """Refuse a quantised checkpoint where all its weights are trained, and in the trainer without the library that reads it."""
    method = models.quantised_as(models.config_of(folder))
    if not method:
        return
    for stage, each in recipe.stages.items():
        where = f"stages.{stage}"
        if isinstance(each, PruneStage) and each.model == name:
            raise UserError(
                f"{where}.model: {name} has quantised weights ({method}): prune the model that it was made from."
            )
        if not isinstance(each, OptimStage):
            continue
        is_student = name in each.reads("model")
        if is_student and each.lora is None:
            raise UserError(
                f"{where}.model: {name} has quantised weights ({method}), which cannot be trained: name the model that it was "
                "made from, or train an adapter (lora)."
            )
        in_engine = isinstance(each, OnPolicyStage) and each.scoring == "engine"
        in_trainer = is_student or (name in each.reads("teacher") and not in_engine)
        if in_trainer and (reason := _unreadable(models.config_of(folder))):
            raise UserError(
                f"{where}: the trainer cannot read the quantised weights of {name} ({method}: {reason}): install what is "
                "missing, or name the model that it was made from."
            )


def _check_widths(recipe: Recipe) -> None:
    """Refuse to cut the width of a model of a type whose parts are not known. Models that are not here are checked when they run."""
    for stage, each in recipe.stages.items():
        if not isinstance(each, PruneStage) or not each.narrows:
            continue
        model = recipe.models.get(origin(recipe, each.model))
        if model is not None and (found := _model_type(model)):
            try:
                prune_width.check_family(found)
            except UserError as error:
                raise error.within(f"stages.{stage}.{error}") from None


def _model_type(model: ModelConfig) -> str:
    """Return the type of a model that is on this machine; "" of one that is not."""
    if model.source.startswith(models.PACKAGE):
        return str(gguf.header(models.package_file(model.source)[1])[0].get("general.architecture", ""))
    folder = local_folder(model)
    return "" if folder is None else str(models.text_part(models.config_of(folder)).get("model_type", ""))


def _unreadable(config: dict[str, Any]) -> str:
    """Return why transformers cannot read a quantised model's weights on this machine; "" if it can."""
    from transformers.quantizers import AutoHfQuantizer

    stored = config.get("quantization_config") or models.text_part(config)["quantization_config"]
    try:
        quantizer = AutoHfQuantizer.from_config(dict(stored), pre_quantized=True)
        quantizer.validate_environment(device_map=None, weights_only=True)
    except (ImportError, RuntimeError, ValueError, TypeError, KeyError) as error:
        return in_a_line(error)
    return ""
