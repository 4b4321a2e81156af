"""LoRA adapters, and a model's weights by their names in its checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from distill.records import UserError

if TYPE_CHECKING:
    from distill.recipe import LoraConfig


def add_lora(model: Any, lora: LoraConfig) -> Any:
    """Wrap the model with peft; only the adapter (and modules_to_save) is trained.

    If an adapter or a module to save is the embedding or the output head of a model that ties the two, they are untied
    first: what is trained is then what is saved, with a matrix more.
    """
    import peft

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

    Merging in place and unmerging would leave rounding errors in bf16 weights each time.
    """
    if not hasattr(model, "get_base_model"):
        yield from ((name, p.detach()) for name, p in model.named_parameters())
        return
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper
    from torch import nn

    deltas, saved = {}, {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            deltas[f"{name}.base_layer.weight"] = module
        elif isinstance(module, ModulesToSaveWrapper):
            saved[f"{name}.original_module."] = f"{name}.modules_to_save.{module.active_adapters[0]}."
            if model.config.tie_word_embeddings and isinstance(module.original_module, nn.Embedding | nn.Linear):
                raise UserError(
                    f"lora.modules_to_save: {name} is tied to the other end of the model, which an engine keeps as one matrix; "
                    "leave it out, or train without lora."
                )
    parameters = dict(model.get_base_model().named_parameters())
    for name, parameter in parameters.items():
        if "lora_" in name or ".modules_to_save." in name:
            continue
        tensor = parameter.detach()
        if (layer := deltas.get(name)) is not None:
            for adapter in layer.active_adapters:
                tensor = tensor + layer.get_delta_weight(adapter).detach().to(tensor.dtype)
        for original, trained in saved.items():
            if name.startswith(original):
                tensor = parameters[trained + name[len(original) :]].detach()
        yield name.replace(".base_layer.", ".").replace(".original_module.", "."), tensor
