"""Flash attention over docs of unequal length in plain torch: takes what `aten._flash_attention_forward` takes, refuses what
it refuses, and gives its numbers."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def flash_attention_forward(
    query: Tensor, key: Tensor, value: Tensor, cum_seq_q: Tensor, cum_seq_k: Tensor, max_q: int, max_k: int,
    dropout_p: float, is_causal: bool, return_debug_mask: bool, *,
    scale: float, window_size_left: int | None = None, window_size_right: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """query [Tq, H, d], key and value [Tk, G, d]; cum_seq int32 [N+1]. Query i of a doc stands at i + (keys - queries): it
    sees the keys from `left` before to `right` after its place, None = all."""
    assert query.shape[2] == key.shape[2] == value.shape[2] <= 256
    assert query.shape[2] % 8 == 0
    assert key.shape[:2] == value.shape[:2]
    assert cum_seq_q.dtype == cum_seq_k.dtype == torch.int32
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    assert (len(query), len(key)) == (cum_seq_q[-1], cum_seq_k[-1])
    assert (max_q, max_k) == (cum_seq_q.diff().max(), cum_seq_k.diff().max())
    assert dropout_p == 0.0
    assert not return_debug_mask
    right = 0 if is_causal else window_size_right
    rows = []
    for (q0, q1), (k0, k1) in zip(_pairs(cum_seq_q), _pairs(cum_seq_k), strict=True):
        group = query.shape[1] // key.shape[1]
        q, k, v = (x.transpose(0, 1) for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
        scores = q @ k.repeat_interleave(group, 0).transpose(1, 2) * scale
        place = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
        gap = place - torch.arange(k1 - k0)
        hidden = torch.zeros_like(gap, dtype=torch.bool)
        if right is not None:
            hidden |= gap < -right
        if window_size_left is not None:
            hidden |= gap > window_size_left
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        rows.append((weights @ v.repeat_interleave(group, 0)).transpose(0, 1))
    return (torch.cat(rows),)


def _pairs(offsets: Tensor) -> list[tuple[int, int]]:
    bounds = offsets.tolist()
    return list(itertools.pairwise(bounds))
