"""The head's kernel in torch, for any device.

On a CPU the passes between the matrix products process a few rows at a time, so that the rows stay in the
cache from the maximum to the sum; on a GPU they process the whole chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from distill.training.loss.kernels import OUTSIDE, HeadForm, Rest
from distill.training.loss.kernels.chunks import wide_dtype, wide_product

CACHE_BYTES = 1 << 20
"""Memory of the rows processed together on a CPU: about the size of a core's own cache."""

_POOL: dict[tuple[str, torch.dtype], Tensor] = {}
"""The last chunk's memory on a CPU, kept for the next call: new pages would cost a tenth of a matrix product."""

FLOOR = 1e-30
"""The smallest absolute value of a row factor, so that the chosen entries can be divided by it."""


class TorchHeadKernel:
    """See `HeadKernel`. weight_VD without padded rows; wide: fp32, or fp64 for fp64 inputs."""

    def __init__(self, weight_VD: Tensor, bias_V: Tensor | None, form: HeadForm, wide: torch.dtype) -> None:
        self.weight_VD, self.bias_V, self.form, self.wide = weight_VD, bias_V, form, wide
        self.buffers: dict[str, Tensor] = {}
        self.kept: tuple[Tensor, Tensor | None, Tensor, Tensor, torch.dtype] | None = None

    @staticmethod
    def row_bytes(form: HeadForm, dtype: torch.dtype) -> int:
        """Return the bytes that one token of a chunk takes."""
        wide = 8 if dtype == torch.float64 else 4
        narrow = dtype.itemsize if dtype.itemsize < wide else 0
        return form.vocab_size * (wide * (1 if form.softcap is None else 2) + narrow)

    def rest(self, hidden_CD: Tensor, ids_CS: Tensor) -> Rest:
        z_CV = self._product(hidden_CD)
        slope_CV = None if self.form.softcap is None else self._buffer("slope", z_CV, self.wide)
        for rows in self._blocks(z_CV) if self._shaped else ():
            self._shape(z_CV[rows], None if slope_CV is None else slope_CV[rows])
        z_CS = z_CV.gather(1, ids_CS)
        z_CV.scatter_(1, ids_CS, -torch.inf)
        best_C1 = z_CV.new_empty(len(z_CV), 1)
        sum_C1 = torch.empty_like(best_C1)
        # The softmax of the rest, in place: it serves the log-sum-exp here and the gradient later.
        for rows in self._blocks(z_CV):
            z_RV = z_CV[rows]
            torch.amax(z_RV, 1, keepdim=True, out=best_C1[rows])
            z_RV.sub_(best_C1[rows].clamp_(min=OUTSIDE))
            z_RV.exp_()
            torch.sum(z_RV, 1, keepdim=True, out=sum_C1[rows])
        lse_C1 = torch.where(sum_C1 > 0, sum_C1.log() + best_C1, OUTSIDE)
        self.kept = (z_CV, slope_CV, ids_CS, sum_C1, hidden_CD.dtype)
        return Rest(
            z_CS,
            lse_C1.squeeze(1),
            best_C1.squeeze(1),
        )

    def gradient(self, g_CS: Tensor, g_rest_C: Tensor) -> tuple[Tensor, Tensor | None]:
        assert self.kept is not None, "`rest` comes before"
        z_CV, slope_CV, ids_CS, sum_C1, dtype = self.kept
        factor_C1 = torch.where(sum_C1 > 0, g_rest_C[:, None] / sum_C1, 0.0)
        if dtype == self.wide:
            # Row factors are applied to the products' smaller sides, so the chosen entries are divided by them first.
            idle_C1 = (factor_C1 == 0) & (g_CS == 0).all(1, keepdim=True)
            factor_C1 = torch.where(factor_C1.abs() < FLOOR, FLOOR, factor_C1)
            z_CV.scatter_add_(1, ids_CS, g_CS / factor_C1)
            if slope_CV is not None:
                z_CV.mul_(slope_CV)
            factor_C1 = factor_C1.masked_fill(idle_C1, 0.0)
            return z_CV, factor_C1.squeeze(1) * self.form.scale
        narrow_CV = self._buffer("narrow", z_CV, dtype)
        scale = self.form.scale
        for rows in self._blocks(z_CV):
            z_RV = z_CV[rows].mul_(factor_C1[rows])
            z_RV.scatter_add_(1, ids_CS[rows], g_CS[rows])
            if slope_CV is not None:
                z_RV.mul_(slope_CV[rows])
            narrow_CV[rows].copy_(z_RV if scale == 1.0 else z_RV.mul_(scale))
        return narrow_CV, None

    @property
    def _shaped(self) -> bool:
        """Whether logits differ from the plain product."""
        return self.bias_V is not None or self.form.scale != 1.0 or self.form.softcap is not None

    def _product(self, hidden_CD: Tensor) -> Tensor:
        """Compute hidden W^T [C, V] in the wide dtype, in the chunk's memory."""
        z_CV = self._buffer("z", hidden_CD, self.wide)
        narrow_CV = None
        if hidden_CD.dtype != self.wide:
            narrow_CV = self._buffer("narrow", hidden_CD, hidden_CD.dtype)
        return wide_product(hidden_CD, self.weight_VD.t(), z_CV, narrow_CV)

    def _shape(self, z_RV: Tensor, slope_RV: Tensor | None) -> None:
        if self.form.scale != 1.0:
            z_RV.mul_(self.form.scale)
        if self.bias_V is not None:
            z_RV.add_(self.bias_V, alpha=self.form.scale)
        if self.form.softcap is not None and slope_RV is not None:
            z_RV.div_(self.form.softcap).tanh_()
            torch.square(z_RV, out=slope_RV).neg_().add_(1)
            z_RV.mul_(self.form.softcap)

    def _blocks(self, z_CV: Tensor) -> Iterator[slice]:
        num = len(z_CV)
        block = num
        if z_CV.device.type == "cpu":
            block = max(1, CACHE_BYTES // (z_CV.shape[1] * z_CV.element_size()))
        return (slice(start, start + block) for start in range(0, num, max(block, 1)))

    def close(self) -> None:
        """Release the memory."""
        for name, flat in self.buffers.items():
            if flat.device.type == "cpu":
                _POOL[name, flat.dtype] = flat
        self.buffers.clear()
        self.kept = None

    def _buffer(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return scratch memory [rows of `like`, V], the same for every chunk."""
        needed = len(like) * len(self.weight_VD)
        held = self.buffers.get(name)
        if held is None and self.weight_VD.device.type == "cpu":
            held = _POOL.pop((name, dtype), None)
        if held is None or len(held) < needed:
            held = self.weight_VD.new_empty(needed, dtype=dtype)
        self.buffers[name] = held
        return held[:needed].view(len(like), -1)


class LogitsKernel(TorchHeadKernel):
    """The same for logits that are there already: `hidden` is them, [C, V or more]. They are not changed."""

    def __init__(self, logits_TV: Tensor, form: HeadForm) -> None:
        # A weight without columns: it says the vocabulary's size and the device.
        super().__init__(logits_TV.new_empty(form.vocab_size, 0), None, form, wide_dtype(logits_TV))

    def _product(self, hidden_CD: Tensor) -> Tensor:
        return self._buffer("z", hidden_CD, self.wide).copy_(hidden_CD[:, : self.form.vocab_size])
