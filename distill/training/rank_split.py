"""Divide one step's examples over processes, by compute."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from distill.training.prefix_sharing import ExampleWithPrefix, assign_prefixes

if TYPE_CHECKING:
    from distill.training.packing import Example

ATTENTION = 1 / (12 * 1024)
"""Half the compute of a token's attention to one position, in tokens of the rest of a Llama-like model 1,024 wide."""
PIECES = 8
"""Parts of an even share of a step's work: examples of one prompt that take more are divided over processes."""


def split(examples: Sequence[Example], world: int, attention: float = ATTENTION) -> list[list[Example]]:
    """Split one step's examples into `world` shares of about the same compute, each in the examples' order.

    Compute is counted after prompts are shared, attention included. Examples of one prompt stay together while they take
    less than a PIECES-th of an even share; the pieces go, the largest first, to the process with the least so far. The
    result depends on the arguments only, so every process finds the same.
    """
    pieces: list[tuple[float, list[ExampleWithPrefix]]] = []
    placed = assign_prefixes(examples)
    runs = [
        list(run) for _, run in itertools.groupby(placed, key=lambda p: id(p.prefix if p.prefix is not None else p))
    ]
    limit = sum(_work(run, attention) for run in runs) / (world * PIECES)
    for run in runs:
        piece: list[ExampleWithPrefix] = []
        for each in run:
            if piece and _work([*piece, each], attention) > limit:
                pieces.append((_work(piece, attention), piece))
                piece = []
            piece.append(each)
        pieces.append((_work(piece, attention), piece))
    place = {id(example): n for n, example in enumerate(examples)}
    loads = [(0.0, rank) for rank in range(world)]
    shares: list[list[Example]] = [[] for _ in range(world)]
    for work, piece in sorted(pieces, key=lambda p: p[0], reverse=True):
        load, rank = heapq.heappop(loads)
        shares[rank] += [each.example for each in piece]
        heapq.heappush(loads, (load + work, rank))
    return [sorted(share, key=lambda example: place[id(example)]) for share in shares]


def _work(piece: Sequence[ExampleWithPrefix], attention: float) -> float:
    """Return the compute of examples that share one prefix, in tokens; the prefix is counted once."""
    parts = [(len(each.example) - each.prefix_length, each.prefix_length) for each in piece]
    if (prefix := piece[0].prefix) is not None:
        parts.append((len(prefix.ids), prefix.end - len(prefix.ids)))
    return sum(own + attention * (own**2 + 2 * own * before) for own, before in parts)
