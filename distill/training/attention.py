"""Causal attention over packed documents ("docs"): no token sees another document, and no [T, T] mask is built.

A doc that continues others (`Batch.parent`) also sees all of their tokens, which were computed once for all that continue
them. Registered with transformers as the attention implementation "packed": `model.set_attn_implementation(PACKED)`,
then `model(..., layout=Layout.of(doc_offsets, parent))`. There are three ways, which give the same numbers:

- On a GPU in a half-precision dtype, flash attention over docs of unequal length, without padding, and FlexAttention for
  soft-capped scores and attention sinks (`gpu_attention`).
- Everywhere else, docs of similar length are gathered into one padded [B, L] block and attended to there; causal masking
  hides the padding at the end. On a CPU, where a doc sees up to SHORT tokens, two plain batched products are
  used; fused kernels, which keep no scores, are used for all else.

A model that asks for anything else (a position bias, chosen indices, an attention mask of its own) is refused;
`forward.prove` then takes another layout.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from distill.records import SHORT
from distill.training.doc_layout import Layout as Layout
from distill.training.doc_layout import Padded
from distill.training.gpu_attention import Scores, by_flash, by_flex, takes_flash, takes_flex

PACKED = "packed"
HARMLESS = frozenset({"position_ids", "use_cache", "cache_position", "position_embeddings", "is_causal"})
"""Keywords that transformers passes to attention functions and that change nothing for packed documents."""


class _Move(torch.autograd.Function):
    """Select rows of x by index and set some to zero; backward is a gather by the inverse index, not a scatter-add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, zero: Tensor, inverse: Tensor, inverse_zero: Tensor) -> Tensor:
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
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function for query [1, H, T, d] and key, value [1, G, T, d]; gives [1, T, H, d].

    softcap c: scores become c tanh(scores / c). s_aux [H]: attention sinks, the logits of a key without a value.
    """
    unknown = [name for name, value in others.items() if name not in HARMLESS and value not in (None, False)]
    if others.get("is_causal") is False:
        unknown.append("is_causal=False")
    if attention_mask is not None:
        unknown.append("attention_mask")
    if unknown:
        raise ValueError(f"packed attention does not support {', '.join(unknown)} ({type(module).__name__})")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    window = sliding_window if sliding_window is not None and layout.longest > sliding_window else None
    shape = Scores(scale, dropout, softcap, s_aux)
    if takes_flash(query, value, shape):
        return by_flash(query, key, value, layout.spans, shape, window), None
    if takes_flex(query, value, shape):
        return by_flex(query, key, value, layout, shape, window), None
    return _by_blocks(query, key, value, layout.padded, shape, window), None


def _by_blocks(query: Tensor, key: Tensor, value: Tensor, layout: Padded, shape: Scores, window: int | None) -> Tensor:
    """Attend block by block; [1, T, H, d]."""
    nowhere = layout.padding[:0]
    widths = [x.shape[1] * x.shape[3] for x in (query, key, value)]
    rows = [x[0].transpose(0, 1).reshape(x.shape[2], -1) for x in (query, key, value)]
    flat = torch.cat(rows, 1)
    padded = _Move.apply(flat, layout.gather, layout.padding, layout.scatter, nowhere)  # type: ignore[no-untyped-call]
    # In fp32, so that the gradients of all docs that continue a prefix are summed in fp32.
    shared = flat[:, widths[0] :]
    shared = shared.float() if shared.dtype.itemsize < 4 else shared
    outputs = []
    for part, block in zip(
        padded.split([block.docs * block.length for block in layout.blocks]),
        layout.blocks,
        strict=True,
    ):
        B, L = block.docs, block.length
        q, k, v = (
            x.view(B, L, -1, full.shape[3]).transpose(1, 2)
            for x, full in zip(part.split(widths, 1), (query, key, value), strict=True)
        )
        if block.prefix is not None:
            kp, vp = (
                x.view(B, -1, *own.shape[1::2]).transpose(1, 2)
                for x, own in zip(
                    shared.index_select(0, block.prefix).to(q.dtype).tensor_split([widths[1]], 1),
                    (k, v),
                    strict=True,
                )
            )
            k, v = torch.cat([kp, k], 2), torch.cat([vp, v], 2)
        attended = _attend(q, k, v, block.mask(window), shape)
        outputs.append(attended.transpose(1, 2).reshape(B * L, -1))
    packed: Tensor = _Move.apply(torch.cat(outputs), layout.scatter, nowhere, layout.gather, layout.padding)  # type: ignore[no-untyped-call]
    return packed.view(1, len(packed), -1, value.shape[3])


def _attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, shape: Scores) -> Tensor:
    """Attention of q [B, H, L, d] to k and v [B, G, M, d]; the query heads of a group share theirs."""
    scale, dropout = shape.scale, shape.dropout
    if shape.softcap is not None or shape.sinks is not None:
        return _attend_explicitly(q, k, v, hidden, shape)
    if hidden is None:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, scale=scale, is_causal=True, enable_gqa=grouped
        )
    if k.shape[2] <= SHORT and not q.is_cuda and dropout == 0.0:
        out: Tensor = _Plain.apply(q, k, v, hidden, scale)  # type: ignore[no-untyped-call]
        return out
    # No fused kernel takes both a mask and grouped heads on every device.
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, ~hidden, dropout_p=dropout, scale=scale)


def _attend_explicitly(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, shape: Scores) -> Tensor:
    """Attention with soft-capped scores or sinks, as the eager attention of Gemma 2 and GPT-OSS: holds [B, H, L, M]."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * shape.scale
    if shape.softcap is not None:
        scores = shape.softcap * torch.tanh(scores / shape.softcap)
    if hidden is None:
        L, M = scores.shape[2:]
        hidden = torch.ones(L, M, dtype=torch.bool, device=q.device).triu(M - L + 1)
    scores = scores.float().masked_fill(hidden, -torch.inf)
    if shape.sinks is not None:
        sinks = shape.sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=3)
    weights = scores.softmax(-1)[..., : k.shape[2]].to(v.dtype)
    return F.dropout(weights, shape.dropout, training=shape.dropout > 0) @ v


class _Plain(torch.autograd.Function):
    """Attention by two batched products, with as few passes over the scores [B, H, L, M] as possible.

    Only the weights are kept for backward. Scores are rounded to the inputs' dtype, their softmax is fp32 inside.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float) -> Tensor:
        B, H, L, _ = q.shape
        G, M = k.shape[1:3]
        q, k, v = (x.reshape(B * G, -1, x.shape[3]) for x in (q, k, v))
        scores = torch.baddbmm(q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=scale)
        weights = scores.view(B, H, L, M).masked_fill_(hidden, -torch.inf).softmax(-1)
        weights = weights.view(B * G, -1, M)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale = scale
        return torch.bmm(weights, v).view(B, H, L, -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        B, _, L, d = gradients[0].shape
        out = gradients[0].reshape(*q.shape[:2], d)
        scores = torch.bmm(out, v.transpose(1, 2))
        scores = torch._softmax_backward_data(scores, weights, -1, weights.dtype)
        dq = torch.bmm(scores, k).mul_(ctx.scale).view(B, -1, L, q.shape[2])
        dk = torch.bmm(scores.transpose(1, 2), q).mul_(ctx.scale)
        dv = torch.bmm(weights.transpose(1, 2), out)
        M = k.shape[1]
        return dq, dk.view(B, -1, M, q.shape[2]), dv.view(B, -1, M, d), None, None


AttentionInterface.register(PACKED, packed_attention)  # and no mask function: transformers then builds no mask
