"""Keep what some of a model's decoder layers return while its forward pass runs.

In: a model's layers and the indices of the wanted ones. Out: their outputs, with their gradients' history.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(slots=True)
class LayerOutputs:
    """The outputs of some of a model's decoder layers, as its forward pass computes them.

    layers: their indices. rows: what the forward plan selects of the outputs, [R, D] each, in the order of `layers`.
    """

    layers: Sequence[int]
    rows: list[Tensor] = field(default_factory=list)

    @contextmanager
    def recorded(self, modules: Sequence[Any]) -> Iterator[list[Tensor]]:
        """Record one call of the decoder, whose layers are `modules`; gives a list, which then holds the outputs
        ([1, T, D] or [B, L, D] each), in the order of `layers`.

        Hooks only keep what a layer returns: under gradient checkpointing they run inside the recomputed part, where anything
        computed would have to be computed again.
        """
        found: dict[int, Tensor] = {}

        def keep(layer: int) -> Callable[..., None]:
            def hook(module: Any, args: Any, out: Any) -> None:
                found[layer] = out[0] if isinstance(out, tuple) else out

            return hook

        handles = [modules[layer].register_forward_hook(keep(layer)) for layer in self.layers]
        outputs: list[Tensor] = []
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()
        outputs += [found[layer] for layer in self.layers]
