"""Cut the width of a model: its hidden channels, MLP neurons and groups of attention heads, by their activations.

In: a model and a `Probe`. Out: a new, narrower model of the same architecture, with the same width in every layer, so that
plain transformers and vLLM load it. The neurons and head groups that are kept differ from layer to layer; hidden channels are
the same everywhere, because all layers read and write one residual stream. After Minitron (arXiv:2408.11796, section 2.2),
which ranks by activations on a small set of texts; neurons and head groups are ranked here by what they add to the stream, so
that a factor moved from one matrix to the next changes nothing.

The proof: without its removed channels the model must compute what the whole one computes with those channels set to zero.
For hidden channels this needs sqrt(h / h') on every norm's weight, because RMSNorm divides by a mean over fewer channels. The
removed channels' share of the stream's energy is then lost to the norm; each weight is multiplied by the mean of the square
root of the share that is left. That is right on average over positions, not at each.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill.models.prune import decoder_layers
from distill.models.prune_probe import Probe, hidden_states, prepare
from distill.models.saving import EXACT, label_logps
from distill.records import UserError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose widths can be cut: plain decoders whose parts are those of WEIGHTS."""
HEAD_SIZE_DERIVED = ("qwen2",)
"""Model types for which vLLM takes hidden / heads as the size of a head, whatever the config says."""
MULTIPLE = 8
"""Hidden size and MLP width are multiples of this: kernels load 16 bytes at once."""
WEIGHTS: Mapping[str, tuple[str, ...]] = {
    "self_attn.q_proj": ("heads", "hidden"),
    "self_attn.k_proj": ("groups", "hidden"),
    "self_attn.v_proj": ("groups", "hidden"),
    "self_attn.o_proj": ("hidden", "heads"),
    "self_attn.q_norm": ("",),
    "self_attn.k_norm": ("",),
    "mlp.gate_proj": ("ffn", "hidden"),
    "mlp.up_proj": ("ffn", "hidden"),
    "mlp.down_proj": ("hidden", "ffn"),
    "input_layernorm": ("hidden",),
    "post_attention_layernorm": ("hidden",),
    "embed_tokens": ("", "hidden"),
    "norm": ("hidden",),
    "lm_head": ("", "hidden"),
}
"""What the rows and columns of each matrix are; "" is not cut. A bias has the rows of its matrix."""
NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
NAME = re.compile(r"^(?:model\.)?(?:layers\.(?P<layer>\d+)\.)?(?P<module>.+)\.(?P<kind>weight|bias)$")


@dataclass(frozen=True, slots=True)
class Widths:
    """Sizes of a decoder: hidden channels, MLP neurons, query heads, and key-value heads (head groups)."""

    hidden: int
    ffn: int
    heads: int
    groups: int

    def cut(self, hidden: int | None, ffn: int | None, heads: int | None) -> Widths:
        """Return the sizes after the cut; None keeps a size. Raises UserError for sizes that cannot be had or loaded."""
        wanted = {"hidden": hidden, "ffn": ffn, "heads": heads}
        for key, size in wanted.items():
            if size is not None and not size <= getattr(self, key):
                raise UserError(f"{key}: the model has {getattr(self, key)}; keep that many or fewer, not {size}.")
        for key in ("hidden", "ffn"):
            if (size := wanted[key]) is not None and size % MULTIPLE:
                raise UserError(
                    f"{key}: {size} is not a multiple of {MULTIPLE}, which vLLM's kernels need; take {near(size, MULTIPLE)}."
                )
        each = self.heads // max(self.groups, 1)
        if heads is not None and heads % each:
            raise UserError(
                f"heads: {heads} query heads do not divide into groups of {each}, which share a key-value head in this model "
                f"({self.heads} heads, {self.groups} key-value heads); take {near(heads, each)}."
            )
        new_heads = heads or self.heads
        new = Widths(hidden or self.hidden, ffn or self.ffn, new_heads, new_heads // each)
        if (new.hidden, new.heads) != (self.hidden, self.heads) and new.hidden % new.heads:
            raise UserError(
                f"{'hidden' if hidden else 'heads'}: a hidden size of {new.hidden} is not divisible by {new.heads} heads, which "
                f"transformers refuses; take hidden: {near(new.hidden, new.heads * MULTIPLE)}."
            )
        return new


def near(size: int, step: int) -> int:
    """Return the largest multiple of `step` that is at most `size`, and at least one step."""
    return max(size // step, 1) * step


@dataclass(frozen=True, slots=True)
class Channels:
    """The channels that are kept, ascending. hidden: None = all; ffn, groups: of each layer; None = all."""

    hidden: list[int] | None
    ffn: list[list[int]] | None
    groups: list[list[int]] | None


def check_family(model_type: str) -> None:
    """Raise UserError for a model type whose widths cannot be cut."""
    if model_type not in FAMILIES:
        raise UserError(
            f"hidden, ffn, heads: the widths of a {model_type} model cannot be cut, only those of {', '.join(FAMILIES)}; "
            "prune its layers instead."
        )


def widths_of(config: Any) -> Widths:
    """Read the sizes from a transformers config. Raises UserError for a model whose widths cannot be cut."""
    check_family(config.model_type)
    return Widths(config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads)


def new_widths(config: Any, hidden: int | None, ffn: int | None, heads: int | None) -> Widths:
    """Return the sizes after a cut. Raises UserError for sizes that transformers or vLLM refuses."""
    old = widths_of(config)
    new = old.cut(hidden, ffn, heads)
    head_dim = getattr(config, "head_dim", None) or old.hidden // old.heads
    if config.model_type in HEAD_SIZE_DERIVED and new.hidden != new.heads * head_dim:
        raise UserError(
            f"hidden, heads: vLLM takes hidden / heads as the size of a {config.model_type} model's heads, which is {head_dim}; with "
            f"heads: {new.heads} take hidden: {new.heads * head_dim}, or cut ffn alone."
        )
    return new


def rank_channels(model: Any, probe: Probe, new: Widths) -> tuple[Channels, dict[str, float]]:
    """Rank channels by their activations on a probe; return the channels to keep, and the share of energy left in each norm.

    A neuron's rank is the root mean square of what it adds to the stream: of its activation, times the norm of its column in
    down_proj. A head group's is that of its part of o_proj's output. A hidden channel's is its mean share of the energy of all
    norms' outputs. The share of energy is the mean over positions of the root of sum over kept x^2 / sum x^2, by norm's name.
    """
    import torch

    old = widths_of(model.config)
    layers = decoder_layers(model)
    taken = [layer.mlp.down_proj for layer in layers] + [layer.self_attn.o_proj for layer in layers]
    norms = {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in NORMS}
    prepare(model, probe)
    with _inputs(probe, [*taken, *norms.values()]) as seen:
        hidden_states(model, probe)
    with torch.no_grad():
        return _ranked(old, new, layers, norms, seen)


def _ranked(
    old: Widths, new: Widths, layers: Sequence[Any], norms: Mapping[str, Any], seen: Sequence[Any]
) -> tuple[Channels, dict[str, float]]:
    """See rank_channels. seen: the inputs [M, I] of each layer's down_proj, then of each o_proj, then of each norm."""
    import torch

    ffn = groups = hidden = None
    if new.ffn < old.ffn:
        ffn = [
            _largest((_rms(x_MI) * layer.mlp.down_proj.weight.norm(dim=0)), new.ffn)
            for layer, x_MI in zip(layers, seen[: len(layers)], strict=True)
        ]
    if new.groups < old.groups:
        groups = []
        for layer, x_MI in zip(layers, seen[len(layers) : 2 * len(layers)], strict=True):
            x_MGD = x_MI.unflatten(-1, (old.groups, -1))
            w_HGD = layer.self_attn.o_proj.weight.unflatten(-1, (old.groups, -1))
            added_G = torch.stack([_rms((x_MGD[:, g] @ w_HGD[:, g].T).norm(dim=-1)) for g in range(old.groups)])
            groups.append(_largest(added_G, new.groups))
    shares: dict[str, float] = {}
    if new.hidden < old.hidden:
        inputs = seen[2 * len(layers) :]
        rank_H = torch.zeros(old.hidden, device=inputs[0].device)
        for module, x_MH in zip(norms.values(), inputs, strict=True):
            energy_H = _rms(module(x_MH)).square()
            rank_H += energy_H / energy_H.sum()
        hidden = _largest(rank_H, new.hidden)
        for name, x_MH in zip(norms, inputs, strict=True):
            left_M = x_MH[:, hidden].square().sum(-1) / x_MH.square().sum(-1)
            shares[name] = float(left_M.sqrt().mean())
    return Channels(hidden, ffn, groups), shares


def cut_width(model: Any, channels: Channels, shares: Mapping[str, float]) -> Any:
    """Return a new model with the kept channels alone, and prove it (see the module). The given model's weights are changed.

    shares: of the norms, as `rank_channels` returns them. Raises UserError for an unknown weight, or if the proof fails.
    """
    old = widths_of(model.config)
    index = _index(channels, old, model.config)
    state = model.state_dict()
    cut = {name: _take(name, tensor, index, keep=True) for name, tensor in state.items()}
    if channels.hidden is not None:
        factor = (old.hidden / len(channels.hidden)) ** 0.5
        cut = {name: tensor * factor if _module(name)[1] in NORMS else tensor for name, tensor in cut.items()}
    for name, tensor in state.items():
        _take(name, tensor, index, keep=False)
    masked_T = label_logps(model)
    narrow = _rebuilt(model, channels, old, cut)
    gap = float((label_logps(narrow) - masked_T).abs().median())
    if not gap <= EXACT:
        raise UserError(
            f"hidden, ffn, heads: without the removed channels {type(model).__name__} does not compute what it computes with these set "
            f"to zero ({gap:.2g} nats apart), so its widths cannot be cut; prune its layers instead."
        )
    for name, share in shares.items():
        narrow.get_submodule(name).weight.data.mul_(share)
    return narrow


def _rebuilt(model: Any, channels: Channels, old: Widths, weights: Mapping[str, Any]) -> Any:
    """Make a model from the config of the new sizes, and load the weights."""
    import copy

    config = copy.deepcopy(model.config)
    config.head_dim = getattr(config, "head_dim", None) or old.hidden // old.heads
    if channels.groups is not None:
        kept = len(channels.groups[0])
        config.num_key_value_heads, config.num_attention_heads = kept, kept * (old.heads // old.groups)
    if channels.ffn is not None:
        config.intermediate_size = len(channels.ffn[0])
    if channels.hidden is not None:
        config.hidden_size = len(channels.hidden)
        # A norm's epsilon is added to a mean, here of fewer channels; scaled, both norms are the same but for a factor.
        config.rms_norm_eps *= old.hidden / len(channels.hidden)
    narrow = type(model)(config).to(model.dtype)
    narrow.load_state_dict(weights)
    narrow.tie_weights()
    narrow.generation_config = model.generation_config
    return narrow.to(model.device).eval()


def _index(channels: Channels, old: Widths, config: Any) -> Any:
    """Return a function of (layer, what an axis is) to the indices that are kept of it; None = all."""
    head_dim = getattr(config, "head_dim", None) or old.hidden // old.heads
    each = old.heads // old.groups

    def index(layer: int, axis: str) -> list[int] | None:
        if axis == "hidden":
            return channels.hidden
        if axis == "ffn":
            return None if channels.ffn is None else channels.ffn[layer]
        if axis in ("heads", "groups") and channels.groups is not None:
            size = head_dim * (each if axis == "heads" else 1)
            return [group * size + n for group in channels.groups[layer] for n in range(size)]
        return None

    return index


def _module(name: str) -> tuple[int, str, str]:
    """Return (layer, module, weight or bias) of a weight's name. Raises UserError if it is not known."""
    found = NAME.match(name)
    if found is None or found["module"] not in WEIGHTS:
        raise UserError(
            f"hidden, ffn, heads: the model has a weight {name!r} of an unknown kind; prune its layers instead."
        )
    return int(found["layer"] or 0), found["module"], found["kind"]


def _take(name: str, tensor: Any, index: Any, *, keep: bool) -> Any:
    """Return a weight's kept rows and columns, or (keep=False) set the others to zero in place."""
    layer, module, kind = _module(name)
    axes = WEIGHTS[module][:1] if kind == "bias" else WEIGHTS[module]
    for place, axis in enumerate(axes):
        if (kept := index(layer, axis)) is None:
            continue
        if keep:
            tensor = tensor[kept] if place == 0 else tensor[:, kept]
        elif module not in NORMS:
            gone = sorted(set(range(tensor.shape[place])) - set(kept))
            tensor[(slice(None),) * place + (gone,)] = 0
    return tensor.clone() if keep else tensor


@contextlib.contextmanager
def _inputs(probe: Probe, modules: Sequence[Any]) -> Iterator[list[Any]]:
    """Collect the inputs of modules on a probe, without padding, [M, I] each; they are there when the context ends."""
    import torch

    parts: list[list[Any]] = [[] for _ in modules]

    def keep(number: int) -> Any:
        return lambda module, args: parts[number].append(args[0])

    hooks = [module.register_forward_pre_hook(keep(number)) for number, module in enumerate(modules)]
    seen: list[Any] = []
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
    valid = [batch.valid_NT for batch in probe.batches]
    seen += [torch.cat([x[v] for x, v in zip(each, valid, strict=True)]) for each in parts]


def _rms(x: Any) -> Any:
    return x.square().mean(0).sqrt()


def _largest(rank: Any, size: int) -> list[int]:
    """Return the indices of the `size` largest, ascending; of equal ones the first."""
    values = rank.tolist()
    return sorted(sorted(range(len(values)), key=lambda n: (-values[n], n))[:size])
