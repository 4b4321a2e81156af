"""Causal attention over packed documents ("docs"): no token sees another document, and no [T, T] mask is built.

A doc that continues others (`Batch.parent`) also sees all of their tokens, which were computed once for all that continue
them. Registered with transformers as the attention implementation "packed": `model.set_attn_implementation(PACKED)`,
then `model(..., layout=Layout.of(doc_offsets, parent))`. There are two ways, which give the same numbers:

- On a GPU in a half-precision dtype, flash attention over docs of unequal length, without padding (`Spans`).
- Everywhere else, docs of similar length are gathered into one padded [B, L] block and attended to there; causal masking
  hides the padding at the end (`Padded`). On a CPU, where a doc sees up to SHORT tokens, two plain batched products are
  used; fused kernels, which keep no scores, are used for all else.

Sliding windows, soft-capped scores and attention sinks are supported by the second way. A model that asks for anything
else (a position bias, chosen indices, an attention mask of its own) is refused; `forward.prove` then takes another layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface

from distill.records import SHORT

PACKED = "packed"
SMALLEST = 16
HARMLESS = frozenset({"position_ids", "use_cache", "cache_position", "position_embeddings", "is_causal"})
"""Keywords that transformers passes to attention functions and that change nothing for packed documents."""


class Scores(NamedTuple):
    """How attention weights are made: the scale of the scores, dropout, a soft cap, and sinks [H]."""

    scale: float
    dropout: float = 0.0
    softcap: float | None = None
    sinks: Tensor | None = None


class Block(NamedTuple):
    """B docs of similar length, padded to L tokens.

    prefix [B * P]: the packed tokens that each doc continues, padded to P; None if no doc has a parent.
    hidden bool [B or 1, 1, L, P + L]: True where a query must not see a key; None = causal by the fused kernel.
    before [B]: the number of tokens that each doc continues.
    """

    docs: int
    length: int
    prefix: Tensor | None
    hidden: Tensor | None
    before: Tensor

    def mask(self, window: int | None) -> Tensor | None:
        """Return `hidden` for attention to the last `window` tokens only; as it is for None."""
        if window is None:
            return self.hidden
        L, device = self.length, self.before.device
        P = 0 if self.prefix is None else len(self.prefix) // self.docs
        query_L, key_P = torch.arange(L, device=device), torch.arange(P, device=device)
        before_B11 = self.before[:, None, None]
        far_BLP = before_B11 + query_L[:, None] - key_P >= window
        hidden_BLP = far_BLP | (key_P >= before_B11)
        gap_LL = query_L[:, None] - query_L
        own_BLL = ((gap_LL < 0) | (gap_LL >= window)).expand(self.docs, L, L)
        return torch.cat([hidden_BLP, own_BLL], dim=2)[:, None]


@dataclass(frozen=True, slots=True)
class Padded:
    """The mapping between packed tokens and padded blocks.

    gather [padded tokens]: the packed token at each padded position (0 at padding). padding: positions without a token.
    scatter [T]: each packed token's padded position.
    """

    blocks: tuple[Block, ...]
    gather: Tensor
    padding: Tensor
    scatter: Tensor


@dataclass(frozen=True, slots=True)
class Spans:
    """The docs of a batch for flash attention, which takes them end to end.

    query_offsets, key_offsets int32 [N+1]: the start of each doc's own tokens, and of the tokens that it sees.
    num_queries, num_keys: the largest number of either in a doc. keys: the packed token of each key; None if they are all
    tokens in order.
    """

    query_offsets: Tensor
    key_offsets: Tensor
    num_queries: int
    num_keys: int
    keys: Tensor | None


@dataclass(frozen=True)
class Layout:
    """The docs of a batch; made once per micro-batch, used by every layer.

    starts, lengths, before [N], on the CPU: each doc's first packed token, its number of tokens, and the number of tokens
    of its parents. prefixes: the packed positions of those, in order. longest: the length of the longest trace in tokens.
    """

    starts: Tensor
    lengths: Tensor
    before: Tensor
    prefixes: list[list[range]]
    longest: int
    device: torch.device

    @staticmethod
    def of(doc_offsets: Tensor, parent: Tensor | None = None, device: torch.device | None = None) -> Layout:
        """Build the layout from doc boundaries [N+1] and each doc's parent [N] (-1: none), best both on the CPU.

        device: of the tokens; None = that of doc_offsets.
        """
        offsets = doc_offsets.cpu()
        starts, lengths = offsets[:-1], offsets.diff()
        prefixes = _prefixes(starts.tolist(), lengths.tolist(), parent)
        before = torch.tensor([sum(map(len, prefix)) for prefix in prefixes])
        return Layout(starts, lengths, before, prefixes, int((lengths + before).max()), device or doc_offsets.device)

    def tokens(self, doc: int) -> Tensor:
        """Return the packed positions of all tokens that a doc's last one sees: those of its parents and its own."""
        start = int(self.starts[doc])
        return _tokens([*self.prefixes[doc], range(start, start + int(self.lengths[doc]))]).to(self.device)

    @cached_property
    def padded(self) -> Padded:
        """Return the docs in padded blocks; docs whose lengths round up to the same power of two share one."""
        starts, lengths, before, device = self.starts, self.lengths, self.before, self.device
        kinds = [
            (int(num) > 0, max(SMALLEST, 1 << (int(n) - 1).bit_length()))
            for n, num in zip(lengths, before, strict=True)
        ]
        blocks, parts = [], []
        for kind in sorted(set(kinds)):
            chosen = [i for i, k in enumerate(kinds) if k == kind]
            own = lengths[chosen, None]
            within = torch.arange(int(own.max()))[None]
            parts.append(torch.where(within < own, starts[chosen, None] + within, -1).flatten())
            num = within.shape[1]
            prefix = hidden = None
            if kind[0]:
                tokens = [_tokens(self.prefixes[i]) for i in chosen]
                prefix = pad_sequence(tokens, batch_first=True)
                place = torch.arange(prefix.shape[1])
                hidden = _hidden(before[chosen, None] <= place, num).to(device)
                prefix = prefix.flatten().to(device)
            elif num <= SHORT and device.type == "cpu":
                hidden = _hidden(torch.empty(1, 0, dtype=torch.bool), num)
            blocks.append(Block(len(chosen), num, prefix, hidden, before[chosen].to(device)))
        gather = torch.cat(parts)
        real = gather >= 0
        scatter = torch.empty(int(lengths.sum()), dtype=torch.long)
        scatter[gather[real]] = real.nonzero()[:, 0]
        padding = (~real).nonzero()[:, 0]
        return Padded(tuple(blocks), gather.clamp(min=0).to(device), padding.to(device), scatter.to(device))

    @cached_property
    def spans(self) -> Spans:
        """Return the docs end to end, each doc's prefix before its own tokens."""
        seen = self.lengths + self.before
        keys = None
        if int(self.before.max()):
            docs = zip(self.prefixes, self.starts.tolist(), self.lengths.tolist(), strict=True)
            keys = _tokens([r for prefix, start, num in docs for r in (*prefix, range(start, start + num))])
            keys = keys.to(self.device)
        query_offsets, key_offsets = (
            F.pad(counts.cumsum(0), (1, 0)).to(self.device, torch.int32) for counts in (self.lengths, seen)
        )
        return Spans(query_offsets, key_offsets, int(self.lengths.max()), int(seen.max()), keys)


def _prefixes(starts: list[int], lengths: list[int], parent: Tensor | None) -> list[list[range]]:
    """Return the packed tokens before each doc's own: those of its parent's parents, then its parent's."""
    parents = [-1] * len(starts) if parent is None else parent.tolist()
    found: dict[int, list[range]] = {-1: []}

    def through(doc: int) -> list[range]:
        """Return the tokens of a doc's parents and its own."""
        if doc not in found:
            own = range(starts[doc], starts[doc] + lengths[doc])
            found[doc] = [*through(parents[doc]), own]
        return found[doc]

    return [through(doc) for doc in parents]


def _tokens(ranges: list[range]) -> Tensor:
    return torch.cat([torch.arange(r.start, r.stop) for r in ranges])


def _hidden(padding_BP: Tensor, num: int) -> Tensor:
    """Return a mask [B, 1, L, P + L], True at the padding of the prefixes and at later tokens among the L = num own ones."""
    later_LL = torch.ones(num, num, dtype=torch.bool).triu(1)
    B = len(padding_BP)
    both = [padding_BP[:, None].expand(B, num, -1), later_LL.expand(B, num, num)]
    return torch.cat(both, dim=2)[:, None]


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
    if window is None and softcap is None and s_aux is None and takes_flash(query, value):
        return _by_flash(query, key, value, layout.spans, scale, dropout), None
    shape = Scores(scale, dropout, softcap, s_aux)
    return _by_blocks(query, key, value, layout.padded, shape, window), None


def takes_flash(query: Tensor, value: Tensor) -> bool:
    """Return whether the flash kernels take these inputs: half precision, one head size, an Ampere GPU or newer."""
    size = query.shape[3]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and size == value.shape[3]
        and size % 8 == 0
        and size <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and torch.backends.cuda.is_flash_attention_available()
    )


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
        total = grad.new_zeros(ctx.num, *grad.shape[1:], dtype=torch.float32)
        return total.index_add_(0, index, grad.float()).to(grad.dtype), None


def _by_flash(query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float, dropout: float) -> Tensor:
    """Attend by flash attention; [1, T, H, d]. A doc with more keys than queries aligns its last query with its last key."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if spans.keys is not None:
        k, v = (_Keys.apply(x, spans.keys) for x in (k, v))  # type: ignore[no-untyped-call]
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, spans.query_offsets, spans.key_offsets, spans.num_queries, spans.num_keys, dropout, True, False,
        scale=scale,
    )[0]  # fmt: skip
    return out[None]


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
