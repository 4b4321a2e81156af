"""The head's kernel for GPUs: Triton between cuBLAS's matrix products.

The logits are computed in fp32, one tile of the vocabulary at a time. While a tile is in the GPU's cache, its chosen entries
are extracted and the rest is stored as e^(z - the tile's maximum) in the weight's dtype, from which the gradient is computed
later, in place. Maxima and sums are fp32 and exact. With bf16 weights a chunk takes 2 bytes a logit, half as much as fp32
logits, so twice as many tokens fit and d weight, which every chunk reads and writes, moves half as often.

Supports scale and bias, not softcap (see `usable`). Runs on a CPU in Triton's interpreter, for tests.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from distill.training.loss.kernels import OUTSIDE, HeadForm, Rest
from distill.training.loss.kernels.chunks import wide_product

TILE = 8192
"""Logits of a token that one matrix product computes."""

PART = 8192
"""Logits that one kernel program holds in registers; they share a maximum."""

MULTIPLIED = 4096
"""Numbers that one program of `multiply` multiplies."""

ALIGNED = 64
"""A chunk's rows are padded in memory to a multiple of this: cuBLAS's fast kernels need aligned rows."""


def usable(hidden_TD: Tensor, form: HeadForm) -> bool:
    """Return whether this kernel supports these inputs; `plain` supports all."""
    return (
        hidden_TD.is_cuda
        and form.softcap is None
        and form.scale > 0
        and hidden_TD.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and importlib.util.find_spec("triton") is not None
    )


class TritonHeadKernel:
    """See `HeadKernel`. weight_VD keeps its padded rows: some of them give the products a width at which cuBLAS is fast."""

    def __init__(self, weight_VD: Tensor, bias_V: Tensor | None, form: HeadForm, tile: int = TILE) -> None:
        self.weight_VD, self.form = weight_VD, form
        self.width = _aligned(form.vocab_size) if _aligned(form.vocab_size) <= len(weight_VD) else form.vocab_size
        self.bias_V = None if bias_V is None else bias_V.float().contiguous()
        self.tile = min(tile, form.vocab_size)
        self.part = min(PART, _power_of_2(self.tile))
        self.parts = -(-self.tile // self.part)
        self.x_flat: Tensor | None = None
        self.e_flat: Tensor | None = None
        self.kept: tuple[Tensor, Tensor, Tensor] | None = None
        from distill.training.loss.kernels import triton_source

        self.kernels: Any = triton_source

    @staticmethod
    def row_bytes(form: HeadForm, dtype: torch.dtype) -> int:
        return _aligned(form.vocab_size) * dtype.itemsize + 4 * min(TILE, form.vocab_size)

    def rest(self, hidden_CD: Tensor, ids_CS: Tensor) -> Rest:
        num, vocab, tile = len(hidden_CD), self.form.vocab_size, self.tile
        stride = _aligned(vocab)
        if self.x_flat is None or self.e_flat is None or len(self.e_flat) < num * stride:
            self.x_flat = hidden_CD.new_empty(num * tile, dtype=torch.float32)
            self.e_flat = hidden_CD.new_empty(num * stride)
            self.e_flat.view(num, stride)[:, vocab:] = 0
        x_CW = self.x_flat[: num * tile].view(num, tile)
        e_CV = self.e_flat[: num * stride].view(num, stride)[:, : self.width]
        ids_CS = ids_CS.contiguous()
        z_CS = torch.empty_like(ids_CS, dtype=torch.float32)
        num_tiles, num_ids = -(-vocab // tile), ids_CS.shape[1]
        # Nothing is written for parts beyond the end of the vocabulary.
        best_NC = z_CS.new_full((num_tiles * self.parts, num), OUTSIDE)
        sum_NC = torch.zeros_like(best_NC)
        bias_V = z_CS if self.bias_V is None else self.bias_V
        for n in range(num_tiles):
            start, first = n * tile, n * self.parts
            width, rows = min(tile, vocab - start), min(tile, self.width - start)
            wide_product(hidden_CD, self.weight_VD[start : start + rows].t(), x_CW[:, :rows])
            self.kernels.soften[(num, -(-width // self.part))](
                x_CW, e_CV, ids_CS, z_CS, bias_V, best_NC[first], sum_NC[first],
                tile, stride, num_ids, num, start, width, self.form.scale,
                HAS_BIAS=self.bias_V is not None, IDS=_power_of_2(num_ids), BLOCK=self.part,
                num_warps=_warps(self.part),
            )  # fmt: skip
        best_C = best_NC.amax(0)
        share_NC = (best_NC - best_C).exp()
        sum_C = (share_NC * sum_NC).sum(0)
        lse_C = torch.where(sum_C > 0, sum_C.log() + best_C, OUTSIDE)
        self.kept = (e_CV, ids_CS, best_NC - lse_C)
        return Rest(z_CS, lse_C, best_C)

    def gradient(self, g_CS: Tensor, g_rest_C: Tensor) -> tuple[Tensor, Tensor | None]:
        assert self.kept is not None, "`rest` comes before"
        e_CV, ids_CS, share_NC = self.kept
        factor_NC = (share_NC.exp() * (g_rest_C * self.form.scale)).contiguous()
        num = len(e_CV)
        self.kernels.rescale[(num, len(factor_NC))](
            e_CV, factor_NC, e_CV.stride(0), num, self.form.vocab_size, self.tile, self.parts,
            BLOCK=self.part, num_warps=_warps(self.part),
        )  # fmt: skip
        return e_CV.scatter_add_(1, ids_CS, (g_CS * self.form.scale).to(e_CV.dtype)), None

    def close(self) -> None:
        self.x_flat = self.e_flat = self.kept = None


def multiply(x: Tensor, factor: Tensor, kernels: Any) -> Tensor:
    """Multiply x in place by a number in the GPU's memory, without waiting for it; nothing is read where it is 1."""
    kernels.multiply[(-(-x.numel() // MULTIPLIED),)](x, factor, x.numel(), BLOCK=MULTIPLIED)
    return x


def _power_of_2(least: int) -> int:
    return 1 << max(least - 1, 0).bit_length()


def _aligned(vocab: int) -> int:
    """Return the length of a chunk's row in memory."""
    return -(-vocab // ALIGNED) * ALIGNED


def _warps(block: int) -> int:
    """Return the number of warps of a program: up to 32 logits a thread."""
    return min(8, max(1, block // 1024))
