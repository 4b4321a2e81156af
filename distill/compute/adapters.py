"""Trained parameters of LoRA adapters, from a model's shape and the recipe's `lora` section; no model is loaded."""

from __future__ import annotations

import re

from distill.models.shape import ModelShape
from distill.recipe import LoraConfig


def linear_layers(shape: ModelShape) -> dict[str, int]:
    """Return the inputs and outputs, added, of a layer's modules that PEFT's all-linear puts an adapter on, by name.

    Of experts, PEFT adapts the two stacked matrices, gate and up with twice the rank, and the router.
    """
    hidden, inner = shape.hidden, shape.intermediate
    query, value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = {"self_attn.o_proj": hidden + query}
    if shape.fused:
        sizes |= {"self_attn.qkv_proj": hidden + query + 2 * value, "mlp.gate_up_proj": hidden + 2 * inner}
        return sizes | {"mlp.down_proj": hidden + inner}
    sizes |= {f"self_attn.{name}_proj": hidden + width for name, width in (("q", query), ("k", value), ("v", value))}
    if shape.experts:
        stacked = shape.experts * 3 * hidden + 5 * shape.stored
        return sizes | {"mlp.experts": stacked, "mlp.gate": hidden + shape.experts}
    names = ("gate_proj", "up_proj", "down_proj") if shape.gated else ("fc1", "fc2")
    return sizes | {f"mlp.{name}": hidden + inner for name in names}


def lora_params(shape: ModelShape, lora: LoraConfig) -> float:
    """Trained parameters of the adapters: rank x (inputs + outputs) of each target module (Hu et al. 2021, section 4.1).

    Targets whose names are unknown here count as all linear modules.
    """
    named = linear_layers(shape)
    chosen = [size for name, size in named.items() if is_target(lora.target_modules, name)]
    ends = [shape.hidden + shape.vocab for name in ("embed_tokens", "lm_head") if is_target(lora.target_modules, name)]
    if lora.target_modules == "all-linear" or not (chosen or ends):
        chosen = list(named.values())
    return float(lora.rank * (shape.layers * sum(chosen) + sum(ends)))


def saved_params(shape: ModelShape, lora: LoraConfig) -> float:
    """Trained parameters of the embedding and the head if they are in `modules_to_save`."""
    ends = [name for name in ("embed_tokens", "lm_head") if is_target(lora.modules_to_save or [], name)]
    return float(len(ends) * shape.params_head)


def is_target(targets: str | list[str], module: str) -> bool:
    """Return whether PEFT's rules choose a module: a pattern of the whole name, or a list of last parts."""
    if isinstance(targets, str):
        whole = f"model.layers.0.{module}" if "." in module else module
        return re.fullmatch(targets, whole) is not None or re.fullmatch(targets, f"model.{whole}") is not None
    return any(module == each or module.endswith(f".{each.rpartition('.')[2]}") for each in targets)
