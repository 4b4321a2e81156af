"""A transformers key-value cache whose rows can be removed and added while a batch is decoded.

The library's own cache copies all keys and values at every token; this one writes them into buffers with spare room. It
supports only models in which every layer attends to all earlier positions; `growing` returns None for others.

Shapes: B rows of the batch, H heads, P positions, D head size. Rows are aligned at the right; positions to the left of a
row's first one are masked.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

ROOM = 64
"""Spare positions when a buffer is allocated."""


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values [B, H, P, D] of one layer, as views of larger buffers."""

    keys: torch.Tensor
    values: torch.Tensor
    is_initialized: bool
    _buffers: list[torch.Tensor]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start = self.get_seq_length()
        self._reserve(key_states, value_states, start, start + key_states.shape[2])
        self.keys[:, :, start:] = key_states
        self.values[:, :, start:] = value_states
        return self.keys, self.values

    def _reserve(self, keys: torch.Tensor, values: torch.Tensor, start: int, end: int) -> None:
        """Make the views `end` positions long; positions before `start` keep their content."""
        if not self.is_initialized or end > self._buffers[0].shape[2]:
            wider = [like.new_empty(like.shape[0], like.shape[1], end + ROOM, like.shape[3]) for like in (keys, values)]
            if start:
                wider[0][:, :, :start], wider[1][:, :, :start] = self.keys, self.values
            self._buffers = wider
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._view(len(keys), end)

    def _view(self, num: int, end: int) -> None:
        self._buffers = [buffer[:num] for buffer in self._buffers]
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)

    @torch.inference_mode()
    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows `indices`, in that order; copies only rows that change their place."""
        num, end = len(indices), self.get_seq_length()
        if num > len(self.keys):
            self._buffers = [buffer[indices] for buffer in self._buffers]
        else:
            to = (indices != torch.arange(num, device=indices.device)).nonzero()[:, 0]
            for buffer in self._buffers:
                buffer[to] = buffer[indices[to]]
        self._view(num, end)

    @torch.inference_mode()
    def join(self, other: GrowingLayer, skip: int) -> None:
        """Append the rows of another layer; drop the first `skip` positions of the own rows."""
        mine, theirs = self.get_seq_length() - skip, other.get_seq_length()
        end, num = max(mine, theirs), len(self.keys)
        rows = num + len(other.keys)
        joined = []
        for own, new in ((self.keys, other.keys), (self.values, other.values)):
            # Zeros, because attention multiplies masked positions by 0, and 0 * NaN is NaN.
            buffer = own.new_zeros(rows, own.shape[1], end + ROOM, own.shape[3])
            buffer[:num, :, end - mine : end] = own[:, :, skip:]
            buffer[num:, :, end - theirs : end] = new
            joined.append(buffer)
        self._buffers = joined
        self._view(rows, end)


class GrowingCache(DynamicCache):  # type: ignore[misc]
    """A DynamicCache of growing layers."""

    def join(self, other: GrowingCache, skip: int) -> None:
        """Append the rows of another cache; drop the first `skip` positions of the own rows."""
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.join(theirs, skip)


class Replay:
    """In place of a cache, for models without one that can be trusted: the ids so far, which are computed again."""

    def __init__(self, ids_BP: torch.Tensor) -> None:
        self.ids_BP = ids_BP

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows of `indices`, in that order."""
        self.ids_BP = self.ids_BP[indices]


def growing(config: Any) -> GrowingCache | None:
    """Return an empty cache for a model config; None if a layer does not keep all positions (sliding window, state)."""
    cache = GrowingCache(config=config)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.layers = [GrowingLayer() for _ in cache.layers]
    return cache
