"""Choose the decoder layers that a pruned model keeps.

In: a model and a `Probe`. Out: indices, and a record of what each removal did. Evenly spaced layers are `prune.kept_layers`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distill.models.prune import check_layers, num_layers
from distill.models.prune_probe import Probe, hidden_states, mean_kl

CANDIDATES = 8
"""Layers that are tried in each round after the first: those whose removal did least in the round before."""


@dataclass(frozen=True, slots=True)
class Removal:
    """The removal of one layer: its index in the original model, and the KL (nats a position) of the model without it and
    without those removed before it."""

    layer: int
    kl: float


def greedy_layers(
    model: Any,
    probe: Probe,
    layers: int,
    candidates: int = CANDIDATES,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[int], list[Removal]]:
    """Remove layers one at a time, each the one without which the KL to the targets is smallest; return those that are left.

    The first round tries every layer. Each later round tries the `candidates` layers that did least when they were last tried
    (the order changes little from round to round), and at least the neighbours of the layer that was removed. A model without
    layer i runs from layer i + 1 on: the hidden states before every layer are kept from one pass of each round. progress: is
    called with the number of layers removed so far.
    """
    total = num_layers(model)
    check_layers(layers, total)
    removed: list[Removal] = []
    gone: set[int] = set()
    last_tried = dict.fromkeys(range(total), 0.0)
    while total - len(gone) > layers:
        given = hidden_states(model, probe, gone)
        tried = _to_try(last_tried, removed, candidates)
        for layer in tried:
            last_tried[layer] = mean_kl(model, probe, gone | {layer}, layer + 1, given[layer])
        best = min(tried, key=lambda layer: (last_tried[layer], layer))
        removed.append(Removal(best, last_tried.pop(best)))
        gone.add(best)
        progress(len(gone))
    return [layer for layer in range(total) if layer not in gone], removed


def _to_try(last_tried: dict[int, float], removed: list[Removal], candidates: int) -> list[int]:
    """Return the layers that this round tries, ascending."""
    if not removed:
        return list(last_tried)
    place = removed[-1].layer
    beside = {
        max((n for n in last_tried if n < place), default=None),
        min((n for n in last_tried if n > place), default=None),
    }
    likely = sorted(last_tried, key=lambda layer: (last_tried[layer], layer))[:candidates]
    return sorted({*likely, *(n for n in beside if n is not None)})


def least_influence(model: Any, probe: Probe, layers: int) -> tuple[list[int], list[float]]:
    """Keep the `layers` layers of the largest block influence; return them, and the influence of every layer.

    Block influence is 1 - cos(hidden state before the layer, hidden state after it), the mean over positions (ShortGPT,
    arXiv:2403.03853, equation 1). It costs one forward pass and needs no targets.
    """
    import torch

    total = num_layers(model)
    check_layers(layers, total)
    states = hidden_states(model, probe)
    influence = []
    for before, after in itertools.pairwise(states):
        angles = [
            torch.nn.functional.cosine_similarity(x_NTH.double(), y_NTH.double(), dim=-1)[batch.valid_NT]
            for x_NTH, y_NTH, batch in zip(before, after, probe.batches, strict=True)
        ]
        influence.append(1.0 - float(torch.cat(angles).mean()))
    strongest = sorted(range(total), key=lambda layer: (-influence[layer], layer))[:layers]
    return sorted(strongest), influence
