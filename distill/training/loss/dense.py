"""Divergences over the whole vocabulary, with teachers in the trainer beside the student.

Exact at any temperature; holds at most one chunk of either model's logits. Each teacher costs one more matrix product than
stored targets do. The models may differ in hidden size, scale, cap and padding, but must have the same vocabulary.

Several teachers are mixed as distributions, p = sum share_i p_i, and the student is compared with the mixture in one pass.
For forward KL the result is, up to a constant, the weighted sum of the single losses. For the other divergences it differs
from that sum: the mixture is one target, which the student can reach.

Shapes: T tokens with a loss, C of them in a chunk, R of those worked on together, D and E hidden sizes, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distill.training.loss.head import HeadForm, HeadOutput, Targets
from distill.training.loss.kernels.chunks import (
    Chunk,
    chunk_rows,
    gathered,
    over_chunks,
    wide_dtype,
    wide_product,
)

Divergence = Callable[[Tensor, Tensor], Tensor]
"""(log p [R, V], log q [R, V]) -> [R], as in `divergences`, options bound."""

RowMeasure = Callable[[Tensor, Tensor], Mapping[str, Tensor]]
"""(log p [R, V], log q [R, V]) -> numbers by row, [R] each."""

BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}
"""Memory of the logits processed together between the products; the divergence needs a few times as much."""


@dataclass(frozen=True, slots=True)
class Logits:
    """The inputs of a model's logits: hidden_TD and the head's weight_VD, bias_V and form.

    share: this teacher's part of the mixture. Shares are divided by their sum.
    """

    hidden_TD: Tensor
    weight_VD: Tensor
    form: HeadForm
    bias_V: Tensor | None = None
    share: float = 1.0


def dense_loss(
    student: Logits,
    teachers: Sequence[Logits],
    divergence: Divergence,
    targets: Targets,
    *,
    temperature: float = 1.0,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    chunk: int | None = None,
    measure: RowMeasure | None = None,
) -> HeadOutput:
    """Sum over tokens of weight * (kl_weight * temperature^2 * divergence + ce_weight * -log q(label)).

    Both distributions are taken at the temperature, the label's log-probability at 1. The factor temperature^2
    keeps the gradient's size (Hinton et al. 2015). Gradients go to the student's hidden, weight and bias only. Of `targets`,
    label_T and weight_T are read. chunk: tokens at a time; None = as many as fit the memory. measure: metrics by row of the
    same two distributions.
    """
    if any(t.form.vocab_size != student.form.vocab_size for t in teachers):
        sizes = [m.form.vocab_size for m in (student, *teachers)]
        raise ValueError(f"one vocabulary is needed; the models' sizes are {sizes}")
    return compare_rows(
        student,
        teachers,
        divergence,
        targets,
        temperature=temperature,
        kl_weight=kl_weight,
        ce_weight=ce_weight,
        chunk=chunk,
        measure=measure,
    )


def compare_rows(
    student: Logits,
    teachers: Sequence[Logits],
    compare: Divergence,
    targets: Targets,
    *,
    temperature: float = 1.0,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    chunk: int | None = None,
    measure: RowMeasure | None = None,
) -> HeadOutput:
    """As `dense_loss`, for any comparison of whole rows; a single teacher may have another vocabulary than the student."""
    weight_VD = gathered(student.weight_VD)
    bias_V = None if student.bias_V is None else gathered(student.bias_V)
    wide = wide_dtype(student.hidden_TD)
    calls = _DensePass(
        _LogitsBuffer(weight_VD, bias_V, student.form, wide),
        _Mixture(teachers, wide, temperature),
        compare,
        targets,
        temperature,
        kl_weight,
        ce_weight,
        measure,
    )
    if chunk is None:
        bytes_each = sum(wide.itemsize * m.form.vocab_size for m in (student, *teachers))
        if student.hidden_TD.dtype != wide:
            bytes_each += student.hidden_TD.element_size() * student.form.vocab_size
        chunk = chunk_rows(len(student.hidden_TD), bytes_each, student.hidden_TD.device)
    loss, loss_T, label_T = over_chunks(
        student.hidden_TD,
        weight_VD,
        bias_V,
        calls,
        targets.weight_T,
        student.form.vocab_size,
        chunk,
    )
    rows = {name: torch.cat(parts) for name, parts in calls.measures.items()}
    return HeadOutput(loss, loss_T, label_T, rows)


class _LogitsBuffer:
    """The raw products hidden W^T of a chunk, in memory of its own, and their conversion to logits."""

    def __init__(self, weight_VD: Tensor, bias_V: Tensor | None, form: HeadForm, wide: torch.dtype) -> None:
        self.weight_VD = weight_VD.detach()[: form.vocab_size]
        self.bias_V = None if bias_V is None else bias_V.detach()[: form.vocab_size]
        self.form, self.wide = form, wide
        self.buffer: Tensor | None = None

    def product(self, hidden_CD: Tensor) -> Tensor:
        if self.buffer is None or len(self.buffer) < len(hidden_CD):
            self.buffer = self.weight_VD.new_empty(len(hidden_CD), len(self.weight_VD), dtype=self.wide)
        x_CV = self.buffer[: len(hidden_CD)]
        return wide_product(hidden_CD, self.weight_VD.t(), x_CV)

    def logits(self, x_RV: Tensor) -> Tensor:
        z_RV = x_RV if self.bias_V is None else x_RV + self.bias_V
        z_RV = z_RV if self.form.scale == 1.0 else z_RV * self.form.scale
        cap = self.form.softcap
        return z_RV if cap is None else cap * torch.tanh(z_RV / cap)


@dataclass(frozen=True, slots=True)
class _DensePass:
    student: _LogitsBuffer
    teachers: _Mixture
    compare: Divergence
    targets: Targets
    temperature: float
    kl_weight: float
    ce_weight: float
    measure: RowMeasure | None
    measures: dict[str, list[Tensor]] = field(default_factory=dict)

    def chunk(self, hidden_CD: Tensor, rows: slice, grads: bool) -> Chunk:
        x_CV = self.student.product(hidden_CD)
        logp_CV = self.teachers.logp(rows)
        label_C1, weight_C = self.targets.label_T[rows, None], self.targets.weight_T[rows]
        loss_C = x_CV.new_empty(len(x_CV))
        label_logp_C = torch.empty_like(loss_C)
        for block in blocks(x_CV):
            x_RV = x_CV[block].detach().requires_grad_(grads)
            with torch.set_grad_enabled(grads):
                z_RV = self.student.logits(x_RV)
                label_R = (z_RV.gather(1, label_C1[block]) - z_RV.logsumexp(1, True)).squeeze(1)
                logq_RV = (z_RV / self.temperature).log_softmax(1)
                loss_R = self.compare(logp_CV[block], logq_RV) * (self.kl_weight * self.temperature**2)
                if self.ce_weight:
                    loss_R = loss_R - self.ce_weight * label_R
                if grads:
                    x_CV[block] = torch.autograd.grad((loss_R * weight_C[block]).sum(), x_RV)[0]
            loss_C[block], label_logp_C[block] = loss_R.detach(), label_R.detach()
            if self.measure is not None:
                for name, value_R in self.measure(logp_CV[block], logq_RV.detach()).items():
                    self.measures.setdefault(name, []).append(value_R)
        return Chunk(loss_C, label_logp_C, x_CV.to(hidden_CD.dtype) if grads else None)

    def close(self) -> None:
        self.student.buffer = None
        self.teachers.close()


@torch.no_grad()
def sample_ids(teachers: Sequence[Logits], num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw `num` ids a row from the teachers' mixture over the whole vocabulary, with repetition.

    Returns (the distinct ids drawn [T, num], -1 = none; the log of each id's count [T, num], -inf there).
    """
    hidden_TE = teachers[0].hidden_TD
    wide = wide_dtype(hidden_TE)
    mixture = _Mixture(teachers, wide, 1.0)
    bytes_each = sum(wide.itemsize * t.form.vocab_size for t in teachers)
    size = chunk_rows(len(hidden_TE), bytes_each, hidden_TE.device)
    parts = [hidden_TE.new_empty(0, num, dtype=torch.long)]
    for start in range(0, len(hidden_TE), size):
        p_CV = mixture.logp(slice(start, start + size)).exp_()
        parts.append(torch.multinomial(p_CV, num, replacement=True, generator=generator))
    mixture.close()
    sorted_TN = torch.cat(parts).sort(1).values
    first_TN = torch.ones_like(sorted_TN, dtype=torch.bool)
    first_TN[:, 1:] = sorted_TN[:, 1:] != sorted_TN[:, :-1]
    index_TN = first_TN.cumsum(1) - 1
    count_TN = torch.zeros_like(sorted_TN).scatter_add(1, index_TN, torch.ones_like(sorted_TN))
    ids_TN = torch.full_like(sorted_TN, -1).scatter(1, index_TN, sorted_TN)
    return ids_TN, count_TN.to(wide).log()


def top_entries(teachers: Sequence[Logits], num: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the `num` likeliest ids of the teachers' mixture at each row, likeliest first.

    Returns (ids [T, K], log p [T, K], log of the mass of all other ids [T]), K the smaller of num and the vocabulary.
    """
    hidden_TE = teachers[0].hidden_TD
    wide = wide_dtype(hidden_TE)
    mixture = _Mixture(teachers, wide, 1.0)
    bytes_each = sum(wide.itemsize * t.form.vocab_size for t in teachers)
    size = chunk_rows(len(hidden_TE), bytes_each, hidden_TE.device)
    width = min(num, teachers[0].form.vocab_size)
    ids, logps, tails = [], [], []
    for start in range(0, max(1, len(hidden_TE)), size):
        logp_CV = mixture.logp(slice(start, start + size))
        logp_CK, ids_CK = logp_CV.topk(width, dim=1)
        ids.append(ids_CK)
        logps.append(logp_CK)
        # Summed over the other ids: 1 minus the sum over the kept ids would be rounding noise for a small tail.
        tails.append(logp_CV.scatter_(1, ids_CK, -torch.inf).logsumexp(1))
    mixture.close()
    return torch.cat(ids), torch.cat(logps), torch.cat(tails)


class _Mixture:
    """Teachers of one vocabulary as a single distribution."""

    def __init__(self, teachers: Sequence[Logits], wide: torch.dtype, temperature: float) -> None:
        total = sum(t.share for t in teachers)
        self.temperature = temperature
        self.parts = [
            (
                t.hidden_TD.detach(),
                math.log(t.share / total),
                _LogitsBuffer(gathered(t.weight_VD), t.bias_V, t.form, wide),
            )
            for t in teachers
        ]

    def logp(self, rows: slice) -> Tensor:
        """Return log p [C, V], in the first teacher's memory."""
        mixed_CV: Tensor | None = None
        for hidden_TE, log_share, source in self.parts:
            t_CV = source.product(hidden_TE[rows])
            for block in blocks(t_CV):
                logp_RV = (source.logits(t_CV[block]) / self.temperature).log_softmax(1) + log_share
                t_CV[block] = logp_RV
            if mixed_CV is None:
                mixed_CV = t_CV
            else:
                torch.logaddexp(mixed_CV, t_CV, out=mixed_CV)
        assert mixed_CV is not None, "a teacher is needed"
        return mixed_CV

    def close(self) -> None:
        for _, _, source in self.parts:
            source.buffer = None


def blocks(x_CV: Tensor) -> Iterator[slice]:
    """Yield slices over the rows of a chunk, each at most BLOCK_BYTES large."""
    size = max(1, BLOCK_BYTES.get(x_CV.device.type, 1 << 20) // (x_CV.shape[1] * x_CV.element_size()))
    return (slice(start, start + size) for start in range(0, len(x_CV), size))
