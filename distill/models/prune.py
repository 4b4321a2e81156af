"""Keep some of a model's decoder layers."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from distill.records import UserError

NUM_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
COUNTED = ("first_k_dense_replace", "num_dense_layers", "max_window_layers", "n_dense_layers", "num_hash_layers")
"""Config keys that count layers from the first one."""
INDEXED = re.compile(r"(layers|layer_idx|idxs|indices|layer_ids|_ids)$")
"""Names of config keys that hold indices of layers."""


def num_layers(model: Any) -> int:
    """Return the number of a model's decoder layers."""
    return len(_layers(model))


def prune_layers(model: Any, layers: int) -> list[int]:
    """Keep `layers` decoder layers in place, evenly spaced, first and last among them; return their indices.

    Every list, count and index of layers in the config follows. Raises UserError if the model has fewer layers. A config
    that cannot say what is left (a period of layer kinds, for example) shows when the saved model is compared.
    """
    import torch

    modules = _layers(model)
    total = len(modules)
    if not 2 <= layers <= total:
        raise UserError(f"layers: the model has {total} layers; keep between 2 and {total}, not {layers}.")
    kept = kept_layers(total, layers)
    owner, name = _owner(model, modules)
    setattr(owner, name, torch.nn.ModuleList(modules[index] for index in kept))
    for new, old in enumerate(kept):
        for module in getattr(owner, name)[new].modules():
            for key, value in vars(module).items():
                if key in ("layer_idx", "layer_id", "layer_number", "layer_index") and value == old:
                    setattr(module, key, new)
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        _prune_config(config, kept, total)
    return kept


def _layers(model: Any) -> Any:
    """Return the list of decoder layers: the longest ModuleList of the model."""
    import torch

    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module)]
    if not lists:
        raise UserError(f"layers: {type(model).__name__} has no list of layers to prune.")
    return max(lists, key=len)


def _owner(model: Any, modules: Any) -> tuple[Any, str]:
    for owner in model.modules():
        for name, child in owner.named_children():
            if child is modules:
                return owner, name
    raise AssertionError("the list is one of the model's modules")


def _prune_config(config: Any, kept: list[int], total: int) -> None:
    """Adapt every number, list and text of a config that is about its layers, one entry a layer or by index."""
    for key, value in config.to_dict().items():
        new: Any = None
        if key in NUM_LAYERS and value == total:
            new = len(kept)
        elif key in COUNTED and isinstance(value, int) and not isinstance(value, bool):
            new = sum(index < value for index in kept)
        elif isinstance(value, list | tuple | str) and len(value) == total and (isinstance(value, str) or total > 1):
            if isinstance(value, str) and "pattern" not in key:
                continue
            chosen = [value[index] for index in kept]
            new = "".join(chosen) if isinstance(value, str) else chosen
        elif (
            isinstance(value, list)
            and INDEXED.search(key)
            and all(isinstance(i, int) and 0 <= i < total for i in value)
        ):
            new = [kept.index(index) for index in value if index in kept]
        if new is not None:
            setattr(config, key, new)


def kept_layers(total: int, layers: int) -> list[int]:
    """Return the indices of `layers` evenly spaced layers of `total`, 0 and total - 1 included."""
    return [int(index) for index in np.round(np.linspace(0, total - 1, layers))]
