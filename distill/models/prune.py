"""Keep some of a model's decoder layers, and prove that the rest of the model is as it was.

Every list, count and index of layers in the config follows. The pruned model must compute what the whole one computes with
the other layers skipped; a model whose layers depend on each other or on their number is refused.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from distill.models.saving import EXACT, ROUNDED, label_logps
from distill.records import UserError

NUM_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
COUNTED = re.compile(
    r"^(first_k_dense_replace|(num|n)_dense_layers|max_window_layers|num_hash_layers|moe_layer_start_index|global_attn_start)$"
)
"""Config keys that count layers from the first one."""
COUNTED_BACK = ("num_kv_shared_layers",)
"""Config keys that count layers from the last one."""
LAST = ("moe_layer_end_index",)
"""Config keys that hold the index of the last layer of a kind; -1 is the last of all."""
INDEXED = re.compile(r"(layers|layer_idx|idxs|indices|layer_ids|_ids)$")
"""Names of config keys that hold indices of layers."""
NOT_LAYERS = re.compile(r"token_id|architectures|multiplier|time_step|limit|section|factor|label")
"""Names of config keys whose lists are of other things, however long."""
RULE = re.compile(r"sparse_step|freq|period|interval")
"""Names of config keys that give every so many layers something of their own."""
INDEX_OF_A_LAYER = re.compile(r"^(layer|block)_(idx|id|number|index)$")
"""Attributes by which modules know their layer."""


def decoder_layers(model: Any) -> Any:
    """Return a model's list of decoder layers: of its lists of modules, the one with the most parameters."""
    import torch

    def lists(part: Any) -> list[Any]:
        return [module for module in part.modules() if isinstance(module, torch.nn.ModuleList)]

    found = max(
        lists(model.get_decoder()) or lists(model),
        key=lambda each: sum(p.numel() for p in each.parameters()),
        default=None,
    )
    if found is None or not len(found):
        raise UserError(f"layers: {type(model).__name__} has no list of layers to prune.")
    return found


def num_layers(model: Any) -> int:
    """Return the number of a model's decoder layers."""
    return len(decoder_layers(model))


def prune_layers(model: Any, layers: int | Sequence[int]) -> list[int]:
    """Keep some of the decoder layers in place; return their indices.

    layers: the indices to keep, ascending; or their number, then evenly spaced with the first and the last. Raises UserError
    if the model has fewer layers, or is not the same model without the others.
    """
    import torch

    modules = decoder_layers(model)
    total = len(modules)
    check_layers(layers if isinstance(layers, int) else len(layers), total)
    kept = kept_layers(total, layers) if isinstance(layers, int) else list(layers)
    with _skipped([modules[index] for index in range(total) if index not in kept]):
        wanted_T = label_logps(model)
    owner, name = _owner(model, modules)
    setattr(owner, name, torch.nn.ModuleList(modules[index] for index in kept))
    for new, old in enumerate(kept):
        for module in modules[old].modules():
            for key, value in vars(module).items():
                if INDEX_OF_A_LAYER.match(key) and value == old:
                    setattr(module, key, new)
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        _prune_config(config, kept, total)
    _check_structure(model, kept)
    gap = float((label_logps(model) - wanted_T).abs().median())
    if not gap <= (EXACT if next(model.parameters()).dtype == torch.float32 else ROUNDED):
        raise UserError(
            f"layers: with the layers {kept} alone, {type(model).__name__} does not compute what it computes with the others "
            f"skipped ({gap:.2g} nats apart): its layers depend on each other or on their number. It cannot be pruned; use a "
            "smaller model."
        )
    return kept


def check_layers(layers: int, total: int) -> None:
    """Raise UserError unless a model of `total` layers can keep `layers` of them."""
    if not 2 <= layers <= total:
        raise UserError(f"layers: the model has {total} layers; keep between 2 and {total}, not {layers}.")


@contextlib.contextmanager
def _skipped(layers: Sequence[Any]) -> Iterator[None]:
    """Let layers return what they get, inside the context."""

    def identity(module: Any, args: Any, options: Any, out: Any) -> Any:
        hidden = args[0] if args else options["hidden_states"]
        return type(out)([hidden, *out[1:]]) if isinstance(out, tuple | list) else hidden

    hooks = [layer.register_forward_hook(identity, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_structure(model: Any, kept: list[int]) -> None:
    """Build the pruned config without weights, and compare the names and shapes of its weights with the model's."""
    import torch

    try:
        with torch.device("meta"):
            built = type(model)(model.config).state_dict()
    # Config classes and models check their layers in their own ways.
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        raise UserError(
            f"layers: {type(model).__name__} cannot be built with the layers {kept} alone ({error}). Keep another number of "
            "layers, or use another model."
        ) from error
    mine = model.state_dict()
    differ = [name for name in mine if name not in built or built[name].shape != mine[name].shape]
    if differ := differ + [name for name in built if name not in mine]:
        rules = sorted(key for key in model.config.get_text_config().to_dict() if RULE.search(key))
        said = f" ({', '.join(rules)})" if rules else ""
        raise UserError(
            f"layers: no config of {type(model).__name__} says that the layers {kept} are left ({differ[0]} is in only one of "
            f"the two models): its layers follow a rule{said}. Keep another number of layers, or use another model."
        )


def _owner(model: Any, modules: Any) -> tuple[Any, str]:
    for owner in model.modules():
        for name, child in owner.named_children():
            if child is modules:
                return owner, name
    raise AssertionError("the list is one of the model's modules")


def _prune_config(config: Any, kept: list[int], total: int) -> None:
    """Adapt every number, list and text of a config that is about its layers, one entry a layer or by index."""
    values = config.to_dict()
    for key, value in values.items():
        if (new := _pruned(key, value, kept, total)) is not None:
            setattr(config, key, new)
    if values.get("decoder_sparse_step", 1) > 1:
        dense = set(values["mlp_only_layers"])
        step = values["decoder_sparse_step"]
        config.mlp_only_layers = [n for n, old in enumerate(kept) if old in dense or (old + 1) % step]
        config.decoder_sparse_step = 1
    if "scale_depth" in values:
        # Each layer's output is scaled by scale_depth / sqrt(number of layers).
        config.scale_depth = values["scale_depth"] * (len(kept) / total) ** 0.5
    if "attention_types" in values:
        config.attention_types = [[[values["attention_layers"][index]], 1] for index in kept]


def _pruned(key: str, value: Any, kept: list[int], total: int) -> Any:
    """Return a config's value for the kept layers; None if it is not about layers."""
    number = isinstance(value, int) and not isinstance(value, bool)
    if number and key in NUM_LAYERS:
        return len(kept) if value == total else None
    if number and COUNTED.match(key):
        return sum(index < value for index in kept)
    if number and key in COUNTED_BACK:
        return sum(index >= total - value for index in kept)
    if number and key in LAST:
        return value if value < 0 else max(sum(index <= value for index in kept) - 1, 0)
    if isinstance(value, str):
        return "".join(value[i] for i in kept) if "pattern" in key and len(value) == total else None
    if isinstance(value, dict) and value and all(str(name).isdigit() for name in value):
        places = {type(name)(kept.index(int(name))): entry for name, entry in value.items() if int(name) in kept}
        return places if all(int(name) < total for name in value) else None
    if key == "block_types":
        return [value[index % len(value)] for index in kept]
    if not isinstance(value, list | tuple) or NOT_LAYERS.search(key):
        return None
    if INDEXED.search(key) and _indices(value, total):
        return [kept.index(index) for index in value if index in kept]
    return [value[index] for index in kept] if len(value) == total else None


def _indices(values: Sequence[Any], total: int) -> bool:
    """Return whether a list holds indices of layers: whole numbers that rise."""
    whole = all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < total for i in values)
    return whole and all(a < b for a, b in itertools.pairwise(values))


def kept_layers(total: int, layers: int) -> list[int]:
    """Return the indices of `layers` evenly spaced layers of `total`, 0 and total - 1 included."""
    return [int(index) for index in np.round(np.linspace(0, total - 1, layers))]
