"""The output head and the loss on it: K+1 log-probabilities a token, and their gradients, without [tokens, vocabulary].

At a token with chosen ids S (the label, the teacher's kept ids) every loss needs only the student's
log-probabilities at S and the log-mass of all other ids. `head_loss` computes them chunk by chunk, applies a
small pure loss function to them, and turns the chunk's logits into their own gradient in place. This costs three
matrix products: logits, d hidden, d weight (two with a frozen head). The gradient is computed in the forward pass:
the loss is a sum, so its upstream gradient is a scalar.

The mass outside S is summed with S masked, never computed as 1 - sum: in fp32 a true 1e-8 would read 2.4e-7.

With z the logits, S the chosen ids, g the derivative by the K+1 numbers (z at S, r = log sum over v not in S of e^z_v):
    dL/dz_v = g_v for v in S, else g_r * e^(z_v - r)

The passes over a chunk are a `HeadKernel` (`kernels`): in torch anywhere, in Triton on a GPU.

Losses are in `sparse`, weights and denominators in `training.packing`.
Shapes: T tokens with a loss, C of them in a chunk, D hidden, V vocabulary, K teacher entries, N draws from the teacher's tail.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from distill.training.batch import Batch
from distill.training.loss.kernels import OUTSIDE as OUTSIDE
from distill.training.loss.kernels import HeadForm as HeadForm
from distill.training.loss.kernels import HeadKernel, fused
from distill.training.loss.kernels.chunks import (
    Chunk,
    chunk_rows,
    gathered,
    over_chunks,
    wide_dtype,
)
from distill.training.loss.kernels.plain import LogitsKernel, TorchHeadKernel


@dataclass(frozen=True, slots=True)
class Targets:
    """The targets of a loss: the rows of a Batch that have a weight.

    label_T int64; weight_T float32, already divided by the denominator; place_T int64; teacher_ids_TK int64 (-1 = none) with
    teacher_logp_TK (-inf there), teacher_tail_T, each_logp_TMK and each_tail_TM; draw_ids_TN int64 (-1 = none) with draw_logp_TN
    and draw_mass_T, and teacher_label_T, as in Batch; the rollout streams as in Batch. coupled_T:
    the result of a first pass over the tokens' log-probabilities, for losses that couple the tokens of a trace. All go by
    row, so that they can be sliced, but progress, which is as in Batch, for losses that change during training.
    """

    label_T: Tensor
    weight_T: Tensor
    teacher_ids_TK: Tensor | None = None
    teacher_logp_TK: Tensor | None = None
    teacher_tail_T: Tensor | None = None
    each_logp_TMK: Tensor | None = None
    each_tail_TM: Tensor | None = None
    draw_ids_TN: Tensor | None = None
    draw_logp_TN: Tensor | None = None
    draw_mass_T: Tensor | None = None
    teacher_label_T: Tensor | None = None
    advantage_T: Tensor | None = None
    old_logp_T: Tensor | None = None
    ref_logp_T: Tensor | None = None
    engine_logp_T: Tensor | None = None
    coupled_T: Tensor | None = None
    place_T: Tensor | None = None
    progress: float = 0.0

    @staticmethod
    def of(batch: Batch, rows: Tensor) -> Targets:
        """Select rows [T] (indices) of a batch of tensors."""
        streams = {f.name: getattr(batch, f.name, None) for f in fields(Targets)}
        picked = _rows(streams, rows)
        picked["weight_T"] = picked["weight_T"] / batch.denominator
        return Targets(**picked)

    def select(self, rows: Tensor) -> Targets:
        """Select rows by index."""
        return Targets(**_rows({f.name: getattr(self, f.name) for f in fields(Targets)}, rows))

    def __getitem__(self, rows: slice) -> Targets:
        return Targets(**_rows({f.name: getattr(self, f.name) for f in fields(Targets)}, rows))


def _rows(streams: Mapping[str, Any], rows: Tensor | slice) -> dict[str, Any]:
    """Select rows of every tensor; other values are returned unchanged."""
    return {k: v[rows] if isinstance(v, Tensor) else v for k, v in streams.items()}


@dataclass(frozen=True, slots=True)
class Student:
    """The student's exact log-probabilities at the ids that a loss reads, fp32 (fp64 for fp64 inputs).

    label_T: at the label. top_TK: at teacher_ids_TK (any finite number where an id is -1: mask by the
    teacher's -inf). tail_T: log of the student's mass outside the teacher's ids (OUTSIDE if there is none).
    best_outside_T: the highest log-probability outside the teacher's ids, detached. draws_TN: at draw_ids_TN (any finite number
    where an id is -1); None without draws.
    """

    label_T: Tensor
    top_TK: Tensor
    tail_T: Tensor
    best_outside_T: Tensor
    draws_TN: Tensor | None = None


LossFn = Callable[[Student, Targets], Tensor]

Measure = Callable[[Student, Targets], Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True)
class HeadOutput:
    """The result of a loss on the head.

    loss: the weighted sum, differentiable. loss_T, label_logp_T, measures: per-row values, unweighted and detached;
    measures are those that `measure` returned.
    """

    loss: Tensor
    loss_T: Tensor
    label_logp_T: Tensor
    measures: Mapping[str, Tensor] = field(default_factory=dict)


def head_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor | None,
    loss_fn: LossFn,
    targets: Targets,
    *,
    form: HeadForm | None = None,
    bias_V: Tensor | None = None,
    chunk: int | None = None,
    measure: Measure | None = None,
) -> HeadOutput:
    """Sum weight * loss over tokens, with gradients to those of hidden, weight and bias that require one.

    hidden_TD and weight_VD share a dtype (bf16, fp32, fp64); everything after the logits is fp32 (fp64 for fp64).
    weight_VD None: hidden_TD are the logits [T, V] themselves, with any padded columns at their end.
    A weight that is sharded over processes (DTensor) is gathered once here; its gradient is averaged over them.
    chunk: tokens at a time; None = as many as fit the memory. With T = 0 the loss is zero, with a zero gradient.
    measure: metrics by row of the same student, each [T].
    """
    weight_VD, bias_V = (None if each is None else gathered(each) for each in (weight_VD, bias_V))
    form = form or HeadForm(hidden_TD.shape[1] if weight_VD is None else weight_VD.shape[0])
    kernel = _kernel(hidden_TD, weight_VD, bias_V, form)
    targets = _clean(targets, hidden_TD.device)
    calls = _SparsePass(loss_fn, targets, kernel, measure, {})
    if chunk is None:
        bytes_each = kernel.row_bytes(form, hidden_TD.dtype)
        chunk = chunk_rows(len(hidden_TD), bytes_each, hidden_TD.device)
    loss, loss_T, label_T = over_chunks(hidden_TD, weight_VD, bias_V, calls, targets.weight_T, form.vocab_size, chunk)
    rows = {name: torch.cat(parts) for name, parts in calls.seen.items()}
    return HeadOutput(loss, loss_T, label_T, rows)


def _clean(targets: Targets, device: torch.device) -> Targets:
    """Drop repeated ids within a row, and give targets without a teacher an empty set of ids."""
    ids_TK, logp_TK = targets.teacher_ids_TK, targets.teacher_logp_TK
    rows = {f.name: getattr(targets, f.name) for f in fields(Targets)}
    if ids_TK is None or logp_TK is None:
        rows["teacher_ids_TK"] = torch.empty(len(targets.label_T), 0, dtype=torch.long, device=device)
        return Targets(**rows)
    sorted_TK, order_TK = ids_TK.sort(dim=1, stable=True)
    repeat_TK = torch.zeros_like(ids_TK, dtype=torch.bool)
    repeat_TK[:, 1:] = sorted_TK[:, 1:] == sorted_TK[:, :-1]
    unused_TK = torch.zeros_like(repeat_TK).scatter(1, order_TK, repeat_TK) | (logp_TK == -torch.inf)
    rows["teacher_ids_TK"] = ids_TK.masked_fill(unused_TK, -1)
    rows["teacher_logp_TK"] = logp_TK.masked_fill(unused_TK | (ids_TK < 0), -torch.inf)
    return Targets(**rows)


def _kernel(hidden_TD: Tensor, weight_VD: Tensor | None, bias_V: Tensor | None, form: HeadForm) -> HeadKernel:
    if weight_VD is None:
        return LogitsKernel(hidden_TD, form)
    weight_VD = weight_VD.detach()
    bias_V = None if bias_V is None else bias_V.detach()[: form.vocab_size]
    if fused.usable(hidden_TD, form):
        return fused.TritonHeadKernel(weight_VD, bias_V, form)
    return TorchHeadKernel(weight_VD[: form.vocab_size], bias_V, form, wide_dtype(hidden_TD))


@dataclass(frozen=True, slots=True)
class _SparsePass:
    """The chunks of one call of head_loss; `seen` collects the metrics."""

    loss_fn: LossFn
    targets: Targets
    kernel: HeadKernel
    measure: Measure | None
    seen: dict[str, list[Tensor]]

    def chunk(self, hidden_CD: Tensor, rows: slice, grads: bool) -> Chunk:
        targets = self.targets[rows]
        label_C1 = targets.label_T[:, None]
        assert targets.teacher_ids_TK is not None
        used_CK = targets.teacher_ids_TK >= 0
        # An unused entry points to the label, which is chosen anyway, so no other id is masked for it.
        ids_CK = torch.where(used_CK, targets.teacher_ids_TK, label_C1)
        ids_CS = torch.cat([label_C1, ids_CK], dim=1)
        drawn_CN = None
        if targets.draw_ids_TN is not None:
            drawn_CN = torch.where(targets.draw_ids_TN >= 0, targets.draw_ids_TN, label_C1)
            ids_CS = torch.cat([ids_CS, drawn_CN], dim=1)
        rest = self.kernel.rest(hidden_CD, ids_CS)
        in_top_C = (used_CK & (targets.teacher_ids_TK == label_C1)).any(1)
        z_CS, lse_C = rest.z_CS.requires_grad_(), rest.lse_C.requires_grad_()
        dz_CV = factor_C = None
        with torch.enable_grad():
            student = _student(z_CS, lse_C, rest.best_C, used_CK, _counts_outside(ids_CS, used_CK, in_top_C))
            loss_C = self.loss_fn(student, targets)
            if grads:
                g = torch.autograd.grad((loss_C * targets.weight_T).sum(), [z_CS, lse_C])
                dz_CV, factor_C = self.kernel.gradient(*g)
        with torch.no_grad():
            if self.measure is not None:
                for name, value_C in self.measure(student, targets).items():
                    self.seen.setdefault(name, []).append(value_C)
        return Chunk(loss_C.detach(), student.label_T.detach(), dz_CV, factor_C)

    def close(self) -> None:
        self.kernel.close()


def _counts_outside(ids_CS: Tensor, used_CK: Tensor, in_top_C: Tensor) -> Tensor:
    """Return which of the label and the draws are mass outside the teacher's ids, each id once, bool [C, 1 + N]."""
    width = used_CK.shape[1]
    if ids_CS.shape[1] == 1 + width:
        return ~in_top_C[:, None]
    top_CK, drawn_CN = ids_CS[:, 1 : 1 + width], ids_CS[:, 1 + width :]
    in_top_CN = (used_CK[:, None] & (top_CK[:, None] == drawn_CN[:, :, None])).any(2)
    # Equal to the label, which is counted before them, or to an earlier draw.
    seen_CNN = (drawn_CN[:, :, None] == drawn_CN[:, None]).tril(-1)
    again_CN = (drawn_CN == ids_CS[:, :1]) | seen_CNN.any(2)
    return torch.cat([~in_top_C[:, None], ~in_top_CN & ~again_CN], dim=1)


def _student(z_CS: Tensor, rest_C: Tensor, best_C: Tensor, used_CK: Tensor, outside_CO: Tensor) -> Student:
    """Normalise the chosen numbers: column 0 of z_CS is the label, then the teacher's ids, then the draws.

    outside_CO: `_counts_outside` of the label and the draws.
    """
    width = used_CK.shape[1]
    label_C, z_CK, z_CN = z_CS[:, 0], z_CS[:, 1 : 1 + width], z_CS[:, 1 + width :]
    z_CO = torch.where(outside_CO, torch.cat([z_CS[:, :1], z_CN], dim=1), OUTSIDE)
    # With the label alone logaddexp is the same number, in one pass less.
    tail_C = torch.logaddexp(rest_C, z_CO[:, 0])
    if z_CO.shape[1] > 1:
        tail_C = torch.cat([tail_C[:, None], z_CO[:, 1:]], dim=1).logsumexp(1)
    lse_C = torch.cat([torch.where(used_CK, z_CK, OUTSIDE), tail_C[:, None]], dim=1).logsumexp(1)
    best_C = torch.maximum(best_C, z_CO.detach().amax(1)) - lse_C.detach()
    draws_CN = z_CN - lse_C[:, None] if z_CN.shape[1] else None
    return Student(label_C - lse_C, z_CK - lse_C[:, None], tail_C - lse_C, best_C, draws_CN)
