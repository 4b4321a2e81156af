"""Load and save models, and read a model folder's config and fingerprint without loading it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from distill import machine
from distill.errors import DataError
from distill.files import cache_home, file_hash
from distill.models.checkpoint_folder import check_loaded
from distill.models.shape import text_part
from distill.records import UserError, stable_hash

LEARNED_POSITIONS = frozenset({"gpt2", "gpt_neo", "gpt_bigcode", "opt", "openai-gpt", "biogpt", "imagegpt", "gpt-sw3"})
"""Model types with a table of positions, which a longer trace would leave."""


def load(folder: str | Path, *, dtype: str = "bfloat16", trust_remote_code: bool = False, **options: Any) -> Any:
    """Load a causal language model from a local folder, safetensors only. `options` go to from_pretrained."""
    import torch

    model, info = model_class(folder, trust_remote_code).from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        local_files_only=True,
        output_loading_info=True,
        **options,
    )
    check_loaded(folder, info)
    return model


def model_class(folder: str | Path, trust_remote_code: bool = False) -> Any:
    """Return transformers' class that loads a model: causal, or one that also sees images and is used for text alone.

    Raises UserError for a model of any other type.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto as types

    model_type = config_of(folder).get("model_type")
    if trust_remote_code or model_type in types.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForCausalLM
    if model_type in types.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return AutoModelForImageTextToText
    raise UserError(
        f"{folder}: transformers has no causal language model of type {model_type!r}. Name a language model."
    )


def save(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """Save weights (safetensors), config, tokenizer and chat template, which transformers and vLLM load directly."""
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def copy_weights(model: Any, weights: Iterable[tuple[str, Any]]) -> None:
    """Copy weights into a model, by their names in the checkpoint or in memory. Raises ValueError for unknown or missing names.

    Names and shapes that differ from those in memory (experts, for one) are converted as from_pretrained converts them.
    """
    mine = model.state_dict()
    needed = {name for name, _ in model.named_parameters()}
    others = {}
    for name, tensor in weights:
        if name in mine and mine[name].shape == tensor.shape:
            mine[name].copy_(tensor.detach())
            needed.discard(name)
        else:
            others[name] = tensor.detach()
    needed -= _convert_into(model, others) if others else set()
    if needed:
        raise ValueError(f"weights are missing: {', '.join(sorted(needed)[:5])}.")


def _convert_into(model: Any, weights: dict[str, Any]) -> set[str]:
    """Convert weights into a model's own form and put them in; return their names in memory."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    device, before = next(model.parameters()).device, set(model.state_dict())
    options = LoadStateDictConfig(
        device_map={"": device},
        dtype=model.dtype,
        dtype_plan=model._get_dtype_plan(model.dtype),
        weight_mapping=get_model_conversion_mapping(model),
    )
    info, _ = convert_and_load_state_dict_in_model(model, weights, options, None)
    if wrong := sorted(info.unexpected_keys) + sorted(str(key) for key in info.mismatched_keys):
        raise ValueError(f"the model has no weight called {wrong[0]!r} of this shape.")
    model.tie_weights()
    return before - set(info.missing_keys)


def auto_dtype(folder: str | Path, purpose: Literal["training", "engine"] = "engine") -> Literal["bfloat16", "float32"]:
    """Return the dtype in which this machine runs, or trains, a local model fastest, as measured (see `machine`)."""
    width = machine.width_of(config_of(folder))
    measured = machine.measured([width], cache_home() / "machine")
    return machine.choose(measured, width, "auto", purpose).dtype


def without_dropout(model: Any) -> None:
    """Turn a model's dropout off in place: modules, and the rates that attention layers hold as numbers."""
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)


def learned_positions(config: Mapping[str, Any]) -> int | None:
    """Return the number of positions that a model has learned embeddings for; None for rotary or relative positions."""
    config = text_part(config)
    if any(key.startswith(("rope", "rotary", "alibi", "attn_config")) for key in config):
        return None
    limit = config.get("n_positions") or config.get("n_ctx") or config.get("max_position_embeddings")
    return int(limit) if config.get("model_type") in LEARNED_POSITIONS and limit else None


def config_of(folder: str | Path) -> dict[str, Any]:
    """Read config.json of a local model folder. Raises DataError if it is damaged."""
    path = Path(folder) / "config.json"
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            f"{path}: damaged: no JSON ({error}). Copy it from where the model comes from, or make the model again."
        ) from None
    if not isinstance(loaded, dict):
        raise DataError(
            f"{path}: damaged: holds no mapping. Copy it from where the model comes from, or make the model again."
        )
    return loaded


def weights_fingerprint(folder: str | Path) -> str:
    """Return a hash over the names and SHA-256 of a folder's safetensors files and its config."""
    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    return stable_hash(*[f"{file.name}:{file_hash(file)}" for file in (*files, folder / "config.json")])
