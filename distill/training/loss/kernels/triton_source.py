"""The Triton kernels of `fused`, imported only where they run."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def soften(
    x_ptr, e_ptr, ids_ptr, z_ptr, bias_ptr, best_ptr, sum_ptr,
    x_stride, e_stride, num_ids, num_rows, start, width, scale,
    HAS_BIAS: tl.constexpr, IDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn BLOCK products of a row into e^(z - their maximum), stored narrow, and its sum; a program per row and part.

    The logits at the chosen ids of this part are written to z, and take no part in the maximum and the sum.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    first = part * BLOCK
    end = tl.minimum(first + BLOCK, width)
    k = tl.arange(0, IDS)
    ids = tl.load(ids_ptr + row * num_ids + k, mask=k < num_ids, other=-1)
    here = (ids >= start + first) & (ids < start + end)
    x = tl.load(x_ptr + row * x_stride + ids - start, mask=here, other=0.0)
    if HAS_BIAS:
        x += tl.load(bias_ptr + ids, mask=here, other=0.0)
    tl.store(z_ptr + row * num_ids + k, x * scale, mask=here)
    # A repeated id must be read by all its threads before one of them overwrites it, and the row only after that.
    tl.debug_barrier()
    gone = tl.full((IDS,), float("-inf"), tl.float32)
    tl.store(x_ptr + row * x_stride + ids - start, gone, mask=here)
    tl.debug_barrier()
    column = first + tl.arange(0, BLOCK)
    inside = column < end
    z = tl.load(x_ptr + row * x_stride + column, mask=inside, other=float("-inf"))
    if HAS_BIAS:
        z += tl.load(bias_ptr + start + column, mask=inside, other=0.0)
    z = z * scale
    best = tl.maximum(tl.max(z, axis=0), -1e30)
    e = tl.exp(z - best)
    tl.store(e_ptr + row * e_stride + start + column, e.to(e_ptr.dtype.element_ty), mask=inside)
    place = part * num_rows + row
    tl.store(best_ptr + place, best)
    tl.store(sum_ptr + place, tl.sum(e, axis=0))


@triton.jit
def rescale(e_ptr, factor_ptr, e_stride, num_rows, vocab, tile, parts, BLOCK: tl.constexpr):
    """e *= factor, in place; a program per row and part. `parts`: the number of parts of a tile."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    start = part // parts * tile
    first = part % parts * BLOCK
    end = tl.minimum(tl.minimum(first + BLOCK, tile), vocab - start)
    factor = tl.load(factor_ptr + part * num_rows + row)
    column = first + tl.arange(0, BLOCK)
    inside = column < end
    place = e_ptr + row * e_stride + start + column
    e = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, (e * factor).to(e_ptr.dtype.element_ty), mask=inside)


@triton.jit
def multiply(x_ptr, factor_ptr, num, BLOCK: tl.constexpr):
    """x *= factor, a number in memory, in place; nothing is read where it is 1."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + place, mask=place < num, other=0.0).to(tl.float32)
        tl.store(x_ptr + place, (x * factor).to(x_ptr.dtype.element_ty), mask=place < num)
