"""LoRA adapters, and a model's weights by their names in its checkpoint."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from distill import plug, world
from distill.records import UserError

if TYPE_CHECKING:
    from distill.recipe import LoraConfig


def add_lora(model: Any, lora: LoraConfig) -> Any:
    """Wrap the model with peft; only the adapter (and modules_to_save) is trained.

    If an adapter or a module to save is the embedding or the output head of a model that ties the two, they are untied
    first: what is trained is then what is saved, with a matrix more.
    """
    import peft

    _check_names(model, lora)
    if ties_ends(model) and touched_ends(model, lora):
        untie(model)
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save,
        task_type="CAUSAL_LM",
    )
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"lora.target_modules: {error}") from None


def _check_names(model: Any, lora: LoraConfig) -> None:
    """Refuse a module's name in a list that no module has. Raises UserError."""
    modules = [name for name, _ in model.named_modules()]
    for key, names in (("target_modules", lora.target_modules), ("modules_to_save", lora.modules_to_save or [])):
        for name in [] if isinstance(names, str) else names:
            if not any(_matches([name], module) for module in modules):
                ends = {module.rpartition(".")[2] for module in modules} - {""}
                there = sorted(end for end in ends if not end.isdigit())
                raise UserError(f"lora.{key}: the model has no module {name!r}.{plug.nearest(name, there)}")


def ties_ends(model: Any) -> bool:
    """Return whether a model's embedding and output head are one matrix."""
    head = model.get_output_embeddings()
    return head is not None and model.get_input_embeddings().weight is head.weight


def touched_ends(model: Any, lora: LoraConfig) -> list[str]:
    """Return the names of the embedding and the output head, as far as an adapter is trained there or they are trained whole."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if any(module is end for end in ends)]
    return [name for name in names if _matches(lora.target_modules, name) or _matches(lora.modules_to_save or [], name)]


def _matches(modules: Any, name: str) -> bool:
    """Return whether PEFT's rules choose a module: a pattern of the whole name, or a list of last parts."""
    if isinstance(modules, str):
        return modules != "all-linear" and re.fullmatch(modules, name) is not None
    return any(name == each or name.endswith(f".{each}") for each in modules)


def untie(model: Any) -> None:
    """Give a model's output head a matrix of its own, a copy of the embedding's, in place."""
    from torch import nn

    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model._tied_weights_keys = None
    model.all_tied_weights_keys = {}


def effective_weight(layer: Any) -> Any:
    """Return a linear layer's weight [V, D]; with the differentiable part of its LoRA adapters added, if it has any."""
    if "peft" not in sys.modules:
        # Nothing has made an adapter. Its import takes seconds, because it imports torch's compiler.
        return layer.weight
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    if isinstance(layer, ModulesToSaveWrapper):
        layer = layer.modules_to_save[layer.active_adapters[0]]
    if not isinstance(layer, LoraLayer):
        return layer.weight
    weight = layer.get_base_layer().weight
    for name in layer.active_adapters:
        weight = weight + layer.get_delta_weight(name).to(weight.dtype)
    return weight


def exported_weights(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield (name in the checkpoint, tensor) of every weight, with LoRA adapters merged in; the model is not changed.

    Merging in place and unmerging would leave rounding errors in bf16 weights each time. A tied weight comes once, by the
    name that the model's state dict has first. Weights are renamed and reshaped a layer at a time, so that few exist twice.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    named = _merged(base) if base is not model else _different(base.state_dict(keep_vars=True))
    for _, layer in itertools.groupby(named, key=lambda pair: _LAYER.match(pair[0] + ".")[0]):  # type: ignore[index]
        yield from checkpoint_weights({name: world.whole(tensor) for name, tensor in layer}, base).items()


_LAYER = re.compile(r".*?\.\d+\.|")
"""The start of a weight's name, up to its layer's number; empty outside of layers."""


def checkpoint_weights(weights: dict[str, Any], model: Any) -> dict[str, Any]:
    """Return weights by their names and in their shapes in the checkpoint, from names in memory."""
    from transformers.core_model_loading import revert_weight_conversion

    reverted: dict[str, Any] = revert_weight_conversion(model, weights)
    return reverted


def _different(tensors: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (name, tensor), each tensor under its first name only."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor.detach()


def _merged(base: Any) -> Iterator[tuple[str, Any]]:
    """Yield (name without the adapter, tensor) of a model's weights, with its adapters merged in."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper
    from peft.utils.other import ModulesToSaveWrapper

    layers: dict[str, Any] = {}
    trained: dict[str, str] = {}
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer):
            parameter = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
            layers[f"{_plain(name)}.{parameter}"] = module
        elif isinstance(module, ModulesToSaveWrapper):
            trained[f"{name}.original_module."] = f"{name}.modules_to_save.{module.active_adapters[0]}."
    tensors = base.state_dict(keep_vars=True)
    for name, tensor in _different(tensors):
        if "lora_" in name or ".modules_to_save." in name:
            continue
        merged = tensor
        if (layer := layers.get(_plain(name))) is not None:
            for adapter in layer.active_adapters:
                merged = merged + layer.get_delta_weight(adapter).detach().to(merged.dtype)
        for original, whole in trained.items():
            if name.startswith(original):
                merged = tensors[whole + name[len(original) :]].detach()
        yield _plain(name), merged


def _plain(name: str) -> str:
    """Return a weight's or module's name without the parts that peft's wrappers add."""
    return name.replace(".base_layer", "").replace(".original_module", "")
