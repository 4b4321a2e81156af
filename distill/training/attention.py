"""Causal attention over packed traces that never crosses from one into another, and builds no [T, T] mask.

Traces of similar length are gathered into one padded [B, L] block and attended to there; causal masking keeps
the padding at the end out of sight. Registered with transformers as the attention implementation "packed":
`model.set_attn_implementation(PACKED)`, then `model(..., layout=Layout.of(doc_offsets))`.

On a CPU below SHORT tokens two plain batched products beat the fused kernel, whose backward is several times slower
there. Left out on purpose: sliding windows shorter than a trace and attention soft-capping, which are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

PACKED = "packed"
SHORT = 256
SMALLEST = 16


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each packed token lies in the padded blocks; made once a micro-batch, used by every layer.

    blocks: (traces, length) of each block. gather [padded tokens]: the packed token there (0 at padding).
    padding: the padded positions that hold none. scatter [T]: each packed token's padded position.
    """

    blocks: tuple[tuple[int, int], ...]
    gather: Tensor
    padding: Tensor
    scatter: Tensor

    @staticmethod
    def of(doc_offsets: Tensor) -> Layout:
        """From trace boundaries [N+1]; traces share a block when their lengths round up to the same power of two."""
        device = doc_offsets.device
        offsets = doc_offsets.cpu()
        starts, lengths = offsets[:-1], offsets.diff()
        sizes = [max(SMALLEST, 1 << (int(n) - 1).bit_length()) for n in lengths]
        blocks, parts = [], []
        for size in sorted(set(sizes)):
            chosen = torch.tensor([i for i, s in enumerate(sizes) if s == size])
            longest = int(lengths[chosen].max())
            within = torch.arange(longest)[None]
            index = torch.where(within < lengths[chosen, None], starts[chosen, None] + within, -1)
            blocks.append((len(chosen), longest))
            parts.append(index.flatten())
        gather = torch.cat(parts)
        real = gather >= 0
        scatter = torch.empty(int(offsets[-1]), dtype=torch.long)
        scatter[gather[real]] = real.nonzero()[:, 0]
        padding = (~real).nonzero()[:, 0]
        return Layout(
            tuple(blocks), gather.clamp(min=0).to(device), padding.to(device), scatter.to(device)
        )


class _Move(torch.autograd.Function):
    """Rows of x by index, some set to zero; backward is a gather by the inverse index, not a scatter-add."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, zero: Tensor, inverse: Tensor, inverse_zero: Tensor
    ) -> Tensor:
        ctx.save_for_backward(inverse, inverse_zero)
        return x.index_select(0, index).index_fill_(0, zero, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        inverse, inverse_zero = ctx.saved_tensors
        return (
            gradients[0].index_select(0, inverse).index_fill_(0, inverse_zero, 0),
            None,
            None,
            None,
            None,
        )


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function for query [1, H, T, d] and key, value [1, G, T, d]; gives [1, T, H, d]."""
    longest = max(length for _, length in layout.blocks)
    if sliding_window is not None and longest > sliding_window:
        raise ValueError(
            f"a trace of {longest} tokens is longer than the model's attention window of {sliding_window}"
        )
    if softcap is not None:
        raise ValueError("packed attention does not support attention soft-capping")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    nowhere = layout.padding[:0]
    widths = [x.shape[1] * x.shape[3] for x in (query, key, value)]
    rows = [x[0].transpose(0, 1).reshape(x.shape[2], -1) for x in (query, key, value)]
    padded = _Move.apply(torch.cat(rows, 1), layout.gather, layout.padding, layout.scatter, nowhere)  # type: ignore[no-untyped-call]
    outputs = []
    for part, (batch, length) in zip(
        padded.split([b * n for b, n in layout.blocks]), layout.blocks, strict=True
    ):
        q, k, v = (
            x.view(batch, length, -1, full.shape[3]).transpose(1, 2)
            for x, full in zip(part.split(widths, 1), (query, key, value), strict=True)
        )
        if length <= SHORT and not q.is_cuda and dropout == 0.0:
            out = _short(q, k, v, scale)
        else:
            grouped = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, scale=scale, is_causal=True, enable_gqa=grouped
            )
        outputs.append(out.transpose(1, 2).reshape(batch * length, -1))
    packed = _Move.apply(torch.cat(outputs), layout.scatter, nowhere, layout.gather, layout.padding)  # type: ignore[no-untyped-call]
    return packed.view(1, len(packed), -1, value.shape[3]), None


def _short(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention [B, H, L, d] by plain products; the query heads of a group share their key head."""
    B, H, L, d = q.shape
    G = k.shape[1]
    products = torch.bmm(q.reshape(B * G, H // G * L, d), k.reshape(B * G, L, d).transpose(1, 2))
    scores = products.view(B * G, H // G, L, L).float() * scale
    future = torch.ones(L, L, dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1).to(q.dtype)
    return torch.bmm(weights.view(B * G, H // G * L, L), v.reshape(B * G, L, d)).view(B, H, L, d)


AttentionInterface.register(
    PACKED, packed_attention
)  # and no mask function: transformers then builds no mask
