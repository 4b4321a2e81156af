"""Attention over packed documents by the kernels of a GPU, without padding: flash attention and FlexAttention.

Flash attention takes docs of unequal length end to end, with a window, for half-precision inputs. Head sizes that it does
not have, and values of another size than the keys (multi-head latent attention), are filled up with zeros, which add
nothing to any product. FlexAttention (arXiv 2412.05496), which torch compiles, takes the rest: soft-capped scores, and
sinks, which follow from its log-sum-exp: a key without a value, whose logit is s, multiplies a row by sigmoid(lse - s).

What neither takes is left to padded blocks (`attention`). The arithmetic is tested on a CPU; which cards run which kernels is
checked by `make gpu-smoke`.

Shapes: T tokens, H query heads, G key heads, d head size.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from distill.training.doc_layout import Layout, Spans

HALF = (torch.bfloat16, torch.float16)
LARGEST = 256
"""The largest head size of either kernel."""
SMALL_CARDS = ((8, 6), (8, 7), (8, 8), (8, 9), (12, 0), (12, 1))
"""Compute capabilities with about 100 KiB of shared memory, where torch's flash attention has no backward pass for sizes in
(192, 224], and none with dropout above 192 (torch: sdp_utils.cpp, check_requires_grad_and_head_dim_gt192_constraints...)."""
BLOCK = 128
"""Tokens in a block of FlexAttention's mask."""


class Scores(NamedTuple):
    """How attention weights are made: the scale of the scores, dropout, a soft cap, and sinks [H]."""

    scale: float
    dropout: float = 0.0
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether they are a softmax of the scaled products, as flash attention computes it."""
        return self.softcap is None and self.sinks is None


# --------------------------------------------------------------------------------------------- flash attention


def takes_flash(query: Tensor, value: Tensor, shape: Scores) -> bool:
    """Return whether the flash kernels take these inputs: plain scores, half precision, an Ampere GPU or newer."""
    if not (shape.plain and query.is_cuda and query.dtype in HALF):
        return False
    capability = torch.cuda.get_device_capability(query.device)
    return (
        capability >= (8, 0)
        and flash_size(query.shape[3], value.shape[3], capability, shape.dropout) is not None
        and torch.backends.cuda.is_flash_attention_available()
    )


def flash_size(query_size: int, value_size: int, capability: tuple[int, int], dropout: float = 0.0) -> int | None:
    """Return the head size that inputs are filled up to for the flash kernels; None if they have none for it."""
    size = -(-max(query_size, value_size) // 8) * 8
    if capability in SMALL_CARDS and size > 192:
        size = max(size, 232)
        return None if dropout > 0.0 or size > LARGEST else size
    return size if size <= LARGEST else None


def by_flash(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, shape: Scores, window: int | None, size: int | None = None
) -> Tensor:
    """Attend by flash attention; [1, T, H, d]. A doc with more keys than queries aligns its last query with its last key.

    window: the number of tokens that a token sees, itself included; None = all. size: the head size of the kernel; None =
    as the GPU needs it.
    """
    if size is None:
        capability = torch.cuda.get_device_capability(query.device)
        size = flash_size(query.shape[3], value.shape[3], capability, shape.dropout)
        assert size is not None, "`takes_flash` comes before"
    q, k, v = (_filled(x[0].transpose(0, 1), size) for x in (query, key, value))
    if spans.keys is not None:
        k, v = (_Keys.apply(x, spans.keys) for x in (k, v))  # type: ignore[no-untyped-call]
    # A window of W is the token and W - 1 before it; with one, "causal" is a window of 0 after the token.
    windows = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, spans.query_offsets, spans.key_offsets, spans.num_queries, spans.num_keys, shape.dropout,
        window is None, False, scale=shape.scale, **windows,
    )[0]  # fmt: skip
    return out[None, :, :, : value.shape[3]]


def _filled(x: Tensor, size: int) -> Tensor:
    """Fill up the last dimension with zeros."""
    return x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1]))


class _Keys(torch.autograd.Function):
    """Select rows of x [T, G, d] by index, with repetition; gradients are summed in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num = len(x)
        return x.index_select(0, index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (index,), grad = ctx.saved_tensors, gradients[0]
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = grad.new_zeros(ctx.num, *grad.shape[1:], dtype=wide)
        return total.index_add_(0, index, grad.to(wide)).to(grad.dtype), None


# ------------------------------------------------------------------------------------------------ FlexAttention


def takes_flex(query: Tensor, value: Tensor, shape: Scores) -> bool:
    """Return whether FlexAttention computes these inputs: soft-capped scores or sinks, half precision, an Ampere GPU or newer."""
    if shape.plain or shape.dropout > 0.0 or not (query.is_cuda and query.dtype in HALF):
        return False
    capability = torch.cuda.get_device_capability(query.device)
    # With larger heads the backward pass needs more shared memory than a small card has.
    largest = 128 if capability in SMALL_CARDS else LARGEST
    sizes = (query.shape[3], value.shape[3])
    return capability >= (8, 0) and 16 <= min(sizes) <= max(sizes) <= largest and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def by_flex(query: Tensor, key: Tensor, value: Tensor, layout: Layout, shape: Scores, window: int | None) -> Tensor:
    """Attend by FlexAttention; [1, T, H, d]. Shared prefixes are read where they are, not copied to each doc."""
    function = _compiled() if query.is_cuda else flex_attention
    sinks = shape.sinks
    found = function(
        query, key, value,
        score_mod=_scores(layout, shape),
        block_mask=_mask(layout, window),
        scale=1.0,
        enable_gqa=query.shape[1] != key.shape[1],
        # Not the kernel for decoding, which short batches would get: it takes powers of two of grouped heads only.
        kernel_options={"BACKEND": "TRITON"},
        return_aux=None if sinks is None else AuxRequest(lse=True),
    )  # fmt: skip
    if sinks is not None:
        out, also = found
        kept = torch.sigmoid(also.lse - sinks.to(also.lse.dtype)[None, :, None])
        found = (out * kept[..., None]).to(value.dtype)
    result: Tensor = found.transpose(1, 2)
    return result


def _scores(layout: Layout, shape: Scores) -> Callable[..., Tensor]:
    """Return the function that scales and caps a score. Its numbers are in memory: another number in the same process (of a
    teacher, say) would make it dynamic in the compiled function, which torch 2.13 cannot."""
    key = ("scores", shape.scale, shape.softcap)
    if key not in layout.kept:
        scale_1 = torch.full((1,), shape.scale, device=layout.device)
        cap_1 = None if shape.softcap is None else torch.full((1,), shape.softcap, device=layout.device)

        def scaled(score: Tensor, batch: Tensor, head: Tensor, query_at: Tensor, key_at: Tensor) -> Tensor:
            return score * scale_1[0]

        def capped(score: Tensor, batch: Tensor, head: Tensor, query_at: Tensor, key_at: Tensor) -> Tensor:
            assert cap_1 is not None
            return cap_1[0] * torch.tanh(score * scale_1[0] / cap_1[0])

        layout.kept[key] = scaled if cap_1 is None else capped
    function: Callable[..., Tensor] = layout.kept[key]
    return function


@functools.cache
def _compiled() -> Any:
    return torch.compile(flex_attention)


def _mask(layout: Layout, window: int | None) -> BlockMask:
    """Return FlexAttention's mask, made once a batch and window."""
    key = ("flex", window)
    if key not in layout.kept:
        enter, leave, place = layout.nested.enter, layout.nested.leave, layout.nested.place
        first = torch.zeros_like(place) if window is None else place - (window - 1)

        def seen(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            inside = (enter[j] <= enter[i]) & (enter[i] < leave[j])
            return inside & (place[j] <= place[i]) & (place[j] >= first[i])

        some = seen_blocks(layout, BLOCK, window)
        num = some.sum(1, dtype=torch.int32)[None, None]
        order = some.int().argsort(dim=1, descending=True, stable=True).int()[None, None]
        T = int(layout.lengths.sum())
        layout.kept[key] = BlockMask.from_kv_blocks(
            num.to(layout.device), order.to(layout.device), BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(T, T)
        )
    mask: BlockMask = layout.kept[key]
    return mask


def seen_blocks(layout: Layout, size: int, window: int | None) -> Tensor:
    """Return for blocks of `size` tokens whether any token of a query block sees one of a key block, bool [T/size, T/size].

    From the docs' boundaries on the CPU: no [T, T] mask is built, and nothing waits for the GPU. A few blocks more than
    needed may be named; the mask by token decides.
    """
    num = -(-int(layout.lengths.sum()) // size)
    some = torch.zeros(num, num, dtype=torch.bool)
    for doc, (start, length) in enumerate(zip(layout.starts.tolist(), layout.lengths.tolist(), strict=True)):
        own = range(start, start + length)
        queries, first_Q, last_Q = _places(own, int(layout.before[doc]), size)
        before = 0
        for tokens in (*layout.prefixes[doc], own):
            keys, first_K, last_K = _places(tokens, before, size)
            before += len(tokens)
            seen_QK = first_K <= last_Q[:, None]
            if window is not None:
                seen_QK &= first_Q[:, None] - last_K < window
            some[queries, keys] |= seen_QK
    return some


def _places(tokens: range, before: int, size: int) -> tuple[slice, Tensor, Tensor]:
    """Return the blocks of a run of tokens, and each block's first and last place in the trace that they belong to."""
    blocks = slice(tokens.start // size, (tokens.stop - 1) // size + 1)
    starts = torch.arange(blocks.start, blocks.stop) * size
    first = starts.clamp(min=tokens.start) - tokens.start + before
    last = (starts + size - 1).clamp(max=tokens.stop - 1) - tokens.start + before
    return blocks, first, last
