"""A chunk of logits on a GPU: Triton between cuBLAS's products.

The logits are made a tile of the vocabulary at a time in fp32, and while a tile is still in the GPU's cache its chosen entries are
taken out and the rest is written as e^(z - the tile's maximum) in the weight's dtype: what the gradient is made of, at half the
memory of fp32 logits. Maxima and sums are fp32 and exact; a last pass in place turns it into the gradient. For bf16 weights a chunk takes
2 bytes a logit, so that twice as many tokens fit and d weight, which is read and written once a chunk, half as often.

Plain logits only (scale and bias yes, softcap no: see `usable`). Runs on a CPU in Triton's interpreter, for tests.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from distill.training.loss.kernels import OUTSIDE, HeadForm, Rest
from distill.training.loss.kernels.chunks import wide_product

TILE = 8192
"""Logits of a token in a tile: with a thousand tokens 32 MB, within an H100's second-level cache."""


def usable(hidden_TD: Tensor, form: HeadForm) -> bool:
    """Whether this sweep takes these inputs; `plain` takes all."""
    return (
        hidden_TD.is_cuda
        and form.softcap is None
        and form.scale > 0
        and hidden_TD.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and importlib.util.find_spec("triton") is not None
    )


class FusedSweep:
    """See `Sweep`. weight_VD without padded rows."""

    def __init__(self, weight_VD: Tensor, bias_V: Tensor | None, form: HeadForm, tile: int = TILE) -> None:
        self.weight_VD, self.bias_V, self.form = weight_VD, bias_V, form
        self.tile = min(tile, form.vocab_size)
        self.num_tiles = -(-form.vocab_size // self.tile)
        self.x_flat: Tensor | None = None
        self.e_flat: Tensor | None = None
        from distill.training.loss.kernels import triton_source

        self.kernels: Any = triton_source

    @staticmethod
    def row_bytes(form: HeadForm, dtype: torch.dtype) -> int:
        return form.vocab_size * dtype.itemsize + 4 * min(TILE, form.vocab_size)

    def rest(self, hidden_CD: Tensor, ids_CS: Tensor, *, entropy: bool = False) -> Rest:
        num, vocab = len(hidden_CD), self.form.vocab_size
        if self.e_flat is None or len(self.e_flat) < num * vocab:
            self.x_flat = hidden_CD.new_empty(num * self.tile, dtype=torch.float32)
            self.e_flat = hidden_CD.new_empty(num * vocab)
        assert self.x_flat is not None
        e_CV = self.e_flat[: num * vocab].view(num, vocab)
        ids_CS = ids_CS.contiguous()
        z_CS = torch.empty_like(ids_CS, dtype=torch.float32)
        best_NC = z_CS.new_empty(self.num_tiles, num)
        sum_NC, below_NC = torch.empty_like(best_NC), torch.empty_like(best_NC)
        bias_V = z_CS if self.bias_V is None else self.bias_V.float().contiguous()
        chosen = (ids_CS, z_CS, bias_V)
        block = _power_of_2(ids_CS.shape[1])
        plain = {"HAS_BIAS": self.bias_V is not None}
        for n in range(self.num_tiles):
            start = n * self.tile
            width = min(self.tile, vocab - start)
            x_CW = self.x_flat[: num * width].view(num, width)
            wide_product(hidden_CD, self.weight_VD[start : start + width].t(), x_CW)
            size = (ids_CS.shape[1], start, width)
            self.kernels.choose[(num,)](x_CW, *chosen, *size, self.form.scale, **plain, BLOCK=block)
            self.kernels.mask[(num,)](x_CW, ids_CS, *size, BLOCK=block)
            self.kernels.soften[(num,)](
                x_CW, e_CV, bias_V, best_NC[n], sum_NC[n], below_NC[n], vocab, start, width, self.form.scale,
                **plain, ENTROPY=entropy, BLOCK=min(2048, _power_of_2(width)),
            )  # fmt: skip
        best_C = best_NC.amax(0)
        share_NC = (best_NC - best_C).exp()
        sum_C = (share_NC * sum_NC).sum(0)
        lse_C = torch.where(sum_C > 0, sum_C.log() + best_C, OUTSIDE)
        entropy_C = None
        if entropy:
            below_C = (share_NC * (below_NC + (best_NC - best_C) * sum_NC)).sum(0)
            entropy_C = torch.where(sum_C > 0, sum_C.log() - below_C / sum_C, 0.0)
        self.kept = (e_CV, ids_CS, best_NC - lse_C)
        return Rest(z_CS, lse_C, best_C, entropy_C)

    def gradient(self, g_CS: Tensor, g_rest_C: Tensor) -> tuple[Tensor, Tensor | None]:
        e_CV, ids_CS, share_NC = self.kept
        factor_NC = (share_NC.exp() * (g_rest_C * self.form.scale)).contiguous()
        num, vocab = e_CV.shape
        self.kernels.rescale[(num, self.num_tiles)](
            e_CV, factor_NC, num, vocab, self.tile, BLOCK=min(2048, _power_of_2(self.tile))
        )  # fmt: skip
        return e_CV.scatter_add_(1, ids_CS, (g_CS * self.form.scale).to(e_CV.dtype)), None

    def close(self) -> None:
        self.x_flat = self.e_flat = None


def _power_of_2(least: int) -> int:
    return 1 << max(least - 1, 0).bit_length()
