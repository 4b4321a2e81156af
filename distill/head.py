"""The one primitive: hidden states and the lm_head become K+1 numbers a token, and their gradients.

At a token with chosen ids S (the label, the teacher's kept ids) every loss needs only the student's
log-probabilities at S and the log-mass of everything else. `head_loss` computes them chunk by chunk, lets a
small pure loss function act on them, and turns the chunk's logits into their own gradient in place. So it
never holds [tokens, vocabulary], and it costs three matrix products: logits, d hidden, d weight (two with a
frozen head). The gradient is made in the forward pass: the loss is a sum, its upstream gradient a scalar.

The mass outside S is taken by masking S in the chunk, never as 1 - sum: in fp32 a true 1e-8 would read 2.4e-7.

With z the logits, S the chosen ids, g the derivative by the K+1 numbers (z at S, r = log sum over v not in S of e^z_v):
    dL/dz_v = g_v for v in S, else g_r * e^(z_v - r)

Left out on purpose: what losses mean (`training.losses`), weights and denominators (`training.packing`).
Shapes: T tokens with a loss, C of them in a chunk, D hidden, V vocabulary, K teacher entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from distill.records import Batch

OUTSIDE = -1e30
"""Stands for log 0 where -inf would turn gradients into NaN (inf - inf)."""

CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
"""Memory for one chunk of fp32 logits."""


@dataclass(frozen=True, slots=True)
class Targets:
    """What a loss compares the student with: the rows of a Batch that have a weight.

    label_T int64; weight_T float32, the denominator already divided in; teacher_ids_TK int64 (-1 = none) with
    teacher_logp_TK (-inf there), teacher_tail_T; the rollout streams as in Batch. coupled_T: what a first pass over the tokens'
    log-probabilities gave, for losses that couple the tokens of a trace. All by row, so they can be sliced.
    """

    label_T: Tensor
    weight_T: Tensor
    teacher_ids_TK: Tensor | None = None
    teacher_logp_TK: Tensor | None = None
    teacher_tail_T: Tensor | None = None
    advantage_T: Tensor | None = None
    old_logp_T: Tensor | None = None
    ref_logp_T: Tensor | None = None
    engine_logp_T: Tensor | None = None
    coupled_T: Tensor | None = None

    @staticmethod
    def of(batch: Batch, rows: Tensor) -> Targets:
        """The chosen rows [T] (indices) of a batch of tensors."""
        streams = {f.name: getattr(batch, f.name, None) for f in fields(Targets)}
        picked: dict[str, Any] = {k: None if v is None else v[rows] for k, v in streams.items()}
        picked["weight_T"] = picked["weight_T"] / batch.denominator
        return Targets(**picked)

    def __getitem__(self, rows: slice) -> Targets:
        streams = {f.name: getattr(self, f.name) for f in fields(Targets)}
        picked: dict[str, Any] = {k: None if v is None else v[rows] for k, v in streams.items()}
        return Targets(**picked)


@dataclass(frozen=True, slots=True)
class Student:
    """The student's exact log-probabilities where a loss needs them, fp32 (fp64 for fp64 inputs).

    label_T: at the label. top_TK: at teacher_ids_TK (where an id is -1, any finite number: mask by the
    teacher's -inf). tail_T: log of the student's mass outside the teacher's ids (OUTSIDE when there is none).
    """

    label_T: Tensor
    top_TK: Tensor
    tail_T: Tensor


@dataclass(frozen=True, slots=True)
class HeadOutput:
    """loss: the weighted sum, differentiable. loss_T, label_logp_T: unweighted, by row, detached."""

    loss: Tensor
    loss_T: Tensor
    label_logp_T: Tensor


LossFn = Callable[[Student, Targets], Tensor]


@dataclass(frozen=True, slots=True)
class HeadForm:
    """How logits come from the product of hidden and weight.

    scale multiplies it (Cohere, Granite: 1 / logits_scaling); softcap c then gives c * tanh(z / c) (Gemma 2);
    vocab_size cuts padded rows of the weight away before the softmax (151936 rows against 151643 tokens).
    """

    vocab_size: int
    scale: float = 1.0
    softcap: float | None = None

    @staticmethod
    def of(config: Any, vocab_size: int) -> HeadForm:
        """From a transformers config; vocab_size is the tokenizer's length."""
        scale = getattr(config, "logit_scale", None) or 1.0 / (
            getattr(config, "logits_scaling", None) or 1.0
        )
        return HeadForm(
            min(vocab_size, config.vocab_size),
            scale,
            getattr(config, "final_logit_softcapping", None),
        )


def head_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    loss_fn: LossFn,
    targets: Targets,
    *,
    form: HeadForm | None = None,
    bias_V: Tensor | None = None,
    chunk: int | None = None,
) -> HeadOutput:
    """Sum over tokens of weight * loss, with gradients to hidden, weight and bias where they ask for one.

    hidden_TD and weight_VD share a dtype (bf16, fp32, fp64); everything after the logits is fp32 (fp64 for fp64).
    chunk: tokens at a time; None fits CHUNK_BYTES. T = 0 gives a zero that still has a (zero) gradient.
    """
    form = form or HeadForm(weight_VD.shape[0])
    if chunk is None:
        chunk = max(1, CHUNK_BYTES.get(hidden_TD.device.type, 256 << 20) // (4 * form.vocab_size))
    targets = _clean(targets, hidden_TD.device)
    loss, loss_T, label_T = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden_TD, weight_VD, bias_V, loss_fn, targets, form, chunk
    )
    return HeadOutput(loss, loss_T, label_T)


def _clean(targets: Targets, device: torch.device) -> Targets:
    """Count an id once however often it stands in a row, and give rows without a teacher an empty one."""
    ids_TK, logp_TK = targets.teacher_ids_TK, targets.teacher_logp_TK
    rows = {f.name: getattr(targets, f.name) for f in fields(Targets)}
    if ids_TK is None or logp_TK is None:
        rows["teacher_ids_TK"] = torch.empty(
            len(targets.label_T), 0, dtype=torch.long, device=device
        )
        return Targets(**rows)
    sorted_TK, order_TK = ids_TK.sort(dim=1, stable=True)
    repeat_TK = torch.zeros_like(ids_TK, dtype=torch.bool)
    repeat_TK[:, 1:] = sorted_TK[:, 1:] == sorted_TK[:, :-1]
    unused_TK = torch.zeros_like(repeat_TK).scatter(1, order_TK, repeat_TK) | (
        logp_TK == -torch.inf
    )
    rows["teacher_ids_TK"] = ids_TK.masked_fill(unused_TK, -1)
    rows["teacher_logp_TK"] = logp_TK.masked_fill(unused_TK | (ids_TK < 0), -torch.inf)
    return Targets(**rows)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        loss_fn: LossFn,
        targets: Targets,
        form: HeadForm,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
        weight_wanted = weight_VD.requires_grad
        bias_wanted = bias_V is not None and bias_V.requires_grad
        grads = hidden_TD.requires_grad or weight_wanted or bias_wanted
        head = _Head(
            weight_VD[: form.vocab_size],
            None if bias_V is None else bias_V[: form.vocab_size],
            form,
            wide,
        )

        loss_T = hidden_TD.new_zeros(len(hidden_TD), dtype=wide)
        label_T = torch.zeros_like(loss_T)
        dhidden_TD = torch.empty_like(hidden_TD) if grads else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=wide) if weight_wanted else None
        dbias_V = (
            torch.zeros_like(bias_V, dtype=wide) if bias_wanted and bias_V is not None else None
        )
        for start in range(0, len(hidden_TD), chunk):
            rows = slice(start, start + chunk)
            hidden_CD = hidden_TD[rows]
            loss_T[rows], label_T[rows], dz_CV = head.chunk(
                hidden_CD, loss_fn, targets[rows], grads
            )
            if dz_CV is None or dhidden_TD is None:
                continue
            torch.mm(dz_CV, head.weight_VD, out=dhidden_TD[rows])
            if dweight_VD is not None:
                _add_product(dweight_VD[: form.vocab_size], dz_CV.t(), hidden_CD)
            if dbias_V is not None:
                dbias_V[: form.vocab_size] += dz_CV.sum(0, dtype=wide)
        ctx.dweight_dtype = weight_VD.dtype
        ctx.gradients = (dhidden_TD, dweight_VD, dbias_V)
        ctx.mark_non_differentiable(loss_T, label_T)
        return (loss_T * targets.weight_T).sum(), loss_T, label_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        dhidden_TD, dweight_VD, dbias_V = ctx.gradients
        dtype = ctx.dweight_dtype
        return (
            None if dhidden_TD is None else dhidden_TD * upstream.to(dhidden_TD.dtype),
            None if dweight_VD is None else (dweight_VD * upstream).to(dtype),
            None if dbias_V is None else (dbias_V * upstream).to(dtype),
            *[None] * 4,
        )


class _Head:
    """One lm_head, its buffers, and what happens in a chunk."""

    def __init__(
        self, weight_VD: Tensor, bias_V: Tensor | None, form: HeadForm, wide: torch.dtype
    ) -> None:
        self.weight_VD, self.bias_V, self.form, self.wide = weight_VD, bias_V, form, wide
        self.buffers: dict[torch.dtype, Tensor] = {}

    def buffer(self, rows: int, dtype: torch.dtype) -> Tensor:
        """[rows, V] scratch, the same memory for every chunk."""
        held = self.buffers.get(dtype)
        if held is None or len(held) < rows:
            held = self.weight_VD.new_empty(rows, len(self.weight_VD), dtype=dtype)
            self.buffers[dtype] = held
        return held[:rows]

    def logits(self, hidden_CD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [C, V] in the wide dtype, in the buffer, and the derivative of the softcap there."""
        z_CV = self.buffer(len(hidden_CD), self.wide)
        if hidden_CD.dtype == self.wide:
            torch.mm(hidden_CD, self.weight_VD.t(), out=z_CV)
        elif hidden_CD.is_cuda:
            torch.mm(hidden_CD, self.weight_VD.t(), out_dtype=self.wide, out=z_CV)
        else:  # no CPU product of bf16 has an fp32 result: the logits are rounded, as transformers' and vLLM's are
            z_CV.copy_(
                torch.mm(
                    hidden_CD, self.weight_VD.t(), out=self.buffer(len(hidden_CD), hidden_CD.dtype)
                )
            )
        if self.bias_V is not None:
            z_CV.add_(self.bias_V)
        if self.form.scale != 1.0:
            z_CV.mul_(self.form.scale)
        if self.form.softcap is None:
            return z_CV, None
        z_CV.div_(self.form.softcap).tanh_()
        slope_CV = 1 - z_CV.square()
        return z_CV.mul_(self.form.softcap), slope_CV

    def chunk(
        self, hidden_CD: Tensor, loss_fn: LossFn, targets: Targets, grads: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(loss [C], log q(label) [C], d loss / d (hidden W^T) [C, V] in hidden's dtype) of one chunk."""
        z_CV, slope_CV = self.logits(hidden_CD)
        label_C1 = targets.label_T[:, None]
        assert targets.teacher_ids_TK is not None
        used_CK = targets.teacher_ids_TK >= 0
        # An unused entry points to the label: chosen anyway, so nothing else is masked or counted for it.
        ids_CK = torch.where(used_CK, targets.teacher_ids_TK, label_C1)
        ids_CS = torch.cat([label_C1, ids_CK], dim=1)
        z_CS = z_CV.gather(1, ids_CS)
        z_CV.scatter_(1, ids_CS, -torch.inf)
        # The rest's softmax, in place: the same numbers serve the log-sum-exp now and the gradient below.
        top_C1 = z_CV.amax(1, keepdim=True).clamp_(min=OUTSIDE)
        sum_C1 = z_CV.sub_(top_C1).exp_().sum(1, keepdim=True)
        rest_C = torch.where(sum_C1 > 0, sum_C1.log() + top_C1, OUTSIDE).squeeze(1)

        z_CS, rest_C = z_CS.detach().requires_grad_(), rest_C.detach().requires_grad_()
        in_top_C = (used_CK & (targets.teacher_ids_TK == label_C1)).any(1)
        with torch.enable_grad():
            student = _student(z_CS, rest_C, used_CK, in_top_C)
            loss_C = loss_fn(student, targets)
            if not grads:
                return loss_C.detach(), student.label_T.detach(), None
            g_CS, g_rest_C = torch.autograd.grad((loss_C * targets.weight_T).sum(), [z_CS, rest_C])
        z_CV.mul_(torch.where(sum_C1 > 0, g_rest_C[:, None] / sum_C1, 0.0))
        z_CV.scatter_add_(1, ids_CS, g_CS)
        if slope_CV is not None:
            z_CV.mul_(slope_CV)
        if self.form.scale != 1.0:
            z_CV.mul_(self.form.scale)
        if hidden_CD.dtype != self.wide:
            z_CV = self.buffer(len(hidden_CD), hidden_CD.dtype).copy_(z_CV)
        return loss_C.detach(), student.label_T.detach(), z_CV


def _student(z_CS: Tensor, rest_C: Tensor, used_CK: Tensor, in_top_C: Tensor) -> Student:
    """The K+1 numbers as log-probabilities; column 0 of z_CS is the label, the others the teacher's ids."""
    label_C, z_CK = z_CS[:, 0], z_CS[:, 1:]
    outside_C = torch.where(in_top_C, OUTSIDE, label_C)
    tail_C = torch.logaddexp(rest_C, outside_C)
    lse_C = torch.cat([torch.where(used_CK, z_CK, OUTSIDE), tail_C[:, None]], dim=1).logsumexp(1)
    return Student(label_C - lse_C, z_CK - lse_C[:, None], tail_C - lse_C)


def _add_product(total_VD: Tensor, left_VC: Tensor, right_CD: Tensor) -> None:
    """total += left @ right, added up in total's dtype."""
    if left_VC.dtype == total_VD.dtype:
        total_VD.addmm_(left_VC, right_CD)
    elif left_VC.is_cuda:
        total_VD.add_(torch.mm(left_VC, right_CD, out_dtype=total_VD.dtype))
    else:
        total_VD.add_(torch.mm(left_VC, right_CD))
