"""Causal attention over packed traces that never crosses from one into another, and builds no [T, T] mask.

Traces of similar length are gathered into one padded [B, L] block and attended to there; causal masking keeps
the padding at the end out of sight. Short completions of one prompt see it before them, computed once for all. Registered with transformers as the attention implementation "packed":
`model.set_attn_implementation(PACKED)`, then `model(..., layout=Layout.of(doc_offsets))`.

On a CPU below SHORT tokens two plain batched products beat the fused kernel, whose backward is several times slower
there. Left out on purpose: sliding windows shorter than a trace and attention soft-capping, which are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from distill.records import SHORT

PACKED = "packed"
SMALLEST = 16


class Block(NamedTuple):
    """Traces of similar length, padded to `length` tokens.

    prefix [traces x prefix length]: the packed tokens before each trace's own; seen [traces, length, prefix + length]:
    which of both a token attends to. None where every trace starts with its own first token.
    """

    traces: int
    length: int
    prefix: Tensor | None = None
    seen: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each packed token lies in the padded blocks; made once a micro-batch, used by every layer.

    gather [padded tokens]: the packed token there (0 at padding). padding: the padded positions that hold none.
    scatter [T]: each packed token's padded position. longest: tokens that the longest trace sees.
    """

    blocks: tuple[Block, ...]
    gather: Tensor
    padding: Tensor
    scatter: Tensor
    longest: int

    @staticmethod
    def of(doc_offsets: Tensor, parent: Tensor | None = None) -> Layout:
        """From trace boundaries [N+1]; traces share a block when their lengths round up to the same power of two."""
        device = doc_offsets.device
        offsets = doc_offsets.cpu()
        starts, lengths = offsets[:-1], offsets.diff()
        parents = torch.full_like(lengths, -1) if parent is None else parent.cpu()
        before = torch.where(parents < 0, 0, lengths[parents])
        kinds = [
            (int(p) >= 0, max(SMALLEST, 1 << (int(n) - 1).bit_length()))
            for n, p in zip(lengths, parents, strict=True)
        ]
        blocks, parts = [], []
        for kind in sorted(set(kinds)):
            chosen = torch.tensor([i for i, k in enumerate(kinds) if k == kind])
            own = lengths[chosen, None]
            within = torch.arange(int(own.max()))[None]
            parts.append(torch.where(within < own, starts[chosen, None] + within, -1).flatten())
            prefix = seen = None
            if kind[0]:
                ahead = before[chosen, None]
                place = torch.arange(int(ahead.max()))[None]
                first = starts[parents[chosen]][:, None]
                prefix = torch.where(place < ahead, first + place, 0).flatten().to(device)
                seen = _seen(ahead, place, within).to(device)
            blocks.append(Block(len(chosen), within.shape[1], prefix, seen))
        gather = torch.cat(parts)
        real = gather >= 0
        scatter = torch.empty(int(offsets[-1]), dtype=torch.long)
        scatter[gather[real]] = real.nonzero()[:, 0]
        padding = (~real).nonzero()[:, 0]
        return Layout(
            tuple(blocks),
            gather.clamp(min=0).to(device),
            padding.to(device),
            scatter.to(device),
            int((lengths + before).max()),
        )


def _seen(ahead_B1: Tensor, place_1P: Tensor, within_1L: Tensor) -> Tensor:
    """[B, L, P + L]: all of the prefix and, causally, the own tokens."""
    prefix_BP = place_1P < ahead_B1
    own_LL = within_1L <= within_1L.T
    B, L = len(ahead_B1), within_1L.shape[1]
    return torch.cat([prefix_BP[:, None].expand(B, L, -1), own_LL.expand(B, L, L)], dim=2)


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
    if sliding_window is not None and layout.longest > sliding_window:
        raise ValueError(
            f"a trace of {layout.longest} tokens is longer than the model's attention window of {sliding_window}"
        )
    if softcap is not None:
        raise ValueError("packed attention does not support attention soft-capping")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    nowhere = layout.padding[:0]
    widths = [x.shape[1] * x.shape[3] for x in (query, key, value)]
    rows = [x[0].transpose(0, 1).reshape(x.shape[2], -1) for x in (query, key, value)]
    flat = torch.cat(rows, 1)
    padded = _Move.apply(flat, layout.gather, layout.padding, layout.scatter, nowhere)  # type: ignore[no-untyped-call]
    shared = flat[:, widths[0] :]
    outputs = []
    for part, block in zip(
        padded.split([block.traces * block.length for block in layout.blocks]),
        layout.blocks,
        strict=True,
    ):
        B, L = block.traces, block.length
        q, k, v = (
            x.view(B, L, -1, full.shape[3]).transpose(1, 2)
            for x, full in zip(part.split(widths, 1), (query, key, value), strict=True)
        )
        if block.prefix is not None:
            kp, vp = (
                x.view(B, -1, *own.shape[1::2]).transpose(1, 2)
                for x, own in zip(
                    shared.index_select(0, block.prefix).tensor_split([widths[1]], 1),
                    (k, v),
                    strict=True,
                )
            )
            k, v = torch.cat([kp, k], 2), torch.cat([vp, v], 2)
        if block.seen is not None or (L <= SHORT and not q.is_cuda and dropout == 0.0):
            out = _short(q, k, v, scale, block.seen)
        else:
            grouped = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, scale=scale, is_causal=True, enable_gqa=grouped
            )
        outputs.append(out.transpose(1, 2).reshape(B * L, -1))
    packed = _Move.apply(torch.cat(outputs), layout.scatter, nowhere, layout.gather, layout.padding)  # type: ignore[no-untyped-call]
    return packed.view(1, len(packed), -1, value.shape[3]), None


def _short(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor | None) -> Tensor:
    """Attention of q [B, H, L, d] to k and v [B, G, M, d] by plain products; the query heads of a group share theirs.

    seen [B, L, M]: who sees whom; None = causal, M = L.
    """
    B, H, L, d = q.shape
    G, M = k.shape[1:3]
    products = torch.bmm(q.reshape(B * G, H // G * L, d), k.reshape(B * G, M, d).transpose(1, 2))
    scores = products.view(B, H, L, M).float() * scale
    if seen is None:
        hidden = torch.ones(L, M, dtype=torch.bool, device=q.device).triu(1)
    else:
        hidden = ~seen[:, None]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).to(q.dtype)
    out = torch.bmm(weights.view(B * G, H // G * L, M), v.reshape(B * G, M, d))
    return out.view(B, H, L, d)


AttentionInterface.register(
    PACKED, packed_attention
)  # and no mask function: transformers then builds no mask
