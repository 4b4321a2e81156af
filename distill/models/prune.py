"""Keep some of a model's decoder layers."""

from __future__ import annotations

from typing import Any

import numpy as np

from distill.records import UserError


def prune_layers(model: Any, layers: int) -> list[int]:
    """Keep `layers` decoder layers in place, evenly spaced, first and last among them; returns their indices.

    Raises UserError when the model has fewer.
    """
    import torch

    total = model.config.num_hidden_layers
    if not 2 <= layers <= total:
        raise UserError(f"layers: the model has {total} layers; keep between 2 and {total}, not {layers}.")
    kept = kept_layers(total, layers)
    decoder = model.get_decoder()
    decoder.layers = torch.nn.ModuleList(decoder.layers[index] for index in kept)
    for index, layer in enumerate(decoder.layers):
        if hasattr(layer, "self_attn") and hasattr(layer.self_attn, "layer_idx"):
            layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[index] for index in kept]
    return kept


def kept_layers(total: int, layers: int) -> list[int]:
    """Indices of `layers` evenly spaced layers of `total`, 0 and total - 1 included."""
    return [int(index) for index in np.round(np.linspace(0, total - 1, layers))]
