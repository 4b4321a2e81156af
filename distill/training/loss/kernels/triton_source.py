"""The Triton kernels of `fused`, which says what they are for. Imported only where they run."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def choose(
    x_ptr, ids_ptr, z_ptr, bias_ptr, num_ids, start, width, scale,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """z of the chosen ids that lie in this tile; a program a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + row * num_ids + column, mask=column < num_ids, other=-1)
    here = (ids >= start) & (ids < start + width)
    x = tl.load(x_ptr + row * width + ids - start, mask=here, other=0.0)
    if HAS_BIAS:
        x += tl.load(bias_ptr + ids, mask=here, other=0.0)
    tl.store(z_ptr + row * num_ids + column, x * scale, mask=here)


@triton.jit
def mask(x_ptr, ids_ptr, num_ids, start, width, BLOCK: tl.constexpr):
    """The chosen ids of this tile become -inf. Apart from `choose`, or a repeated id might be read after it is gone."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + row * num_ids + column, mask=column < num_ids, other=-1)
    here = (ids >= start) & (ids < start + width)
    gone = tl.full((BLOCK,), float("-inf"), tl.float32)
    tl.store(x_ptr + row * width + ids - start, gone, mask=here)


@triton.jit
def soften(
    x_ptr, e_ptr, bias_ptr, best_ptr, sum_ptr, below_ptr, vocab, start, width, scale,
    HAS_BIAS: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile's row: its maximum, then e^(z - maximum), stored narrow, and its sum; a program a row."""
    row = tl.program_id(0).to(tl.int64)
    best = tl.full((), -1e30, tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < width
        z = tl.load(x_ptr + row * width + column, mask=inside, other=float("-inf"))
        if HAS_BIAS:
            z += tl.load(bias_ptr + start + column, mask=inside, other=0.0)
        best = tl.maximum(best, tl.max(z * scale, axis=0))
    total = tl.full((), 0.0, tl.float32)
    below = tl.full((), 0.0, tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < width
        z = tl.load(x_ptr + row * width + column, mask=inside, other=float("-inf"))
        if HAS_BIAS:
            z += tl.load(bias_ptr + start + column, mask=inside, other=0.0)
        gap = z * scale - best
        e = tl.exp(gap)
        total += tl.sum(e, axis=0)
        if ENTROPY:
            below += tl.sum(e * tl.maximum(gap, -1e4), axis=0)
        tl.store(e_ptr + row * vocab + start + column, e.to(e_ptr.dtype.element_ty), mask=inside)
    tl.store(best_ptr + row, best)
    tl.store(sum_ptr + row, total)
    tl.store(below_ptr + row, below)


@triton.jit
def rescale(e_ptr, factor_ptr, num_rows, vocab, tile, BLOCK: tl.constexpr):
    """e *= factor, in place; a program a row and tile."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * tile
    factor = tl.load(factor_ptr + tl.program_id(1) * num_rows + row)
    for first in range(0, tile, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = (column < tile) & (start + column < vocab)
        place = e_ptr + row * vocab + start + column
        e = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        tl.store(place, (e * factor).to(e_ptr.dtype.element_ty), mask=inside)
