"""Weights on their way to engines in other processes: a part at a time, so that no whole copy of them is held on the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PART_BYTES = 512 << 20
"""Weights that are on their way at a time, about."""


def parts(weights: Iterable[tuple[str, torch.Tensor]], *, copy: bool = False) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the weights in their order, in main memory, at most PART_BYTES at a time unless one tensor is more.

    copy: also those that are there already, so that no two share memory.
    """
    part: dict[str, torch.Tensor] = {}
    held = 0
    for name, tensor in weights:
        if part and held + tensor.nbytes > PART_BYTES:
            yield part
            part, held = {}, 0
        part[name] = tensor.detach().to("cpu", copy=copy)
        held += tensor.nbytes
    if part:
        yield part
