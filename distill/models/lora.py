"""LoRA adapters, and a model's weights by their names in its checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from distill.records import UserError

if TYPE_CHECKING:
    from distill.recipe import LoraConfig


def add_lora(model: Any, lora: LoraConfig) -> Any:
    """Wrap the model with peft; only the adapter (and modules_to_save) is trained."""
    import peft

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


def effective_weight(layer: Any) -> Any:
    """Return a linear layer's weight [V, D]; with the differentiable part of its LoRA adapters added, if it has any."""
    from peft.tuners.lora import LoraLayer

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
