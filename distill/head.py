"""The one primitive: hidden states and the lm_head become K+1 numbers a token, and their gradients.

At a token with chosen ids S (the label, the teacher's kept ids) every loss needs only the student's
log-probabilities at S and the log-mass of everything else. `head_loss` computes them chunk by chunk, lets a
small pure loss function act on them, and turns the chunk's logits into their own gradient in place. So it
never holds [tokens, vocabulary], and it costs three matrix products: logits, d hidden, d weight (two with a
frozen head). The gradient is made in the forward pass: the loss is a sum, its upstream gradient a scalar.

The mass outside S is taken by masking S in the chunk, never as 1 - sum: in fp32 a true 1e-8 would read 2.4e-7.

With z the logits, S the chosen ids, g the derivative by the K+1 numbers (z at S, r = log sum over v not in S of e^z_v):
    dL/dz_v = g_v for v in S, else g_r * e^(z_v - r)

The passes over a chunk are a `Sweep` (`kernels`): in torch anywhere, in Triton on a GPU.

Left out on purpose: what losses mean (`training.losses`), weights and denominators (`training.packing`).
Shapes: T tokens with a loss, C of them in a chunk, D hidden, V vocabulary, K teacher entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from distill.kernels import OUTSIDE as OUTSIDE
from distill.kernels import HeadForm as HeadForm
from distill.kernels import Rest, Sweep
from distill.kernels.plain import PlainSweep
from distill.records import Batch

CHUNK_BYTES = 256 << 20
"""Most memory for one chunk. Less where less is free; longer chunks gain nothing."""

CPU_ROWS = 256
"""Tokens a chunk on a CPU at most: more only leave the cache."""


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
    best_outside_T: the highest log-probability outside the teacher's ids, without a gradient.
    """

    label_T: Tensor
    top_TK: Tensor
    tail_T: Tensor
    best_outside_T: Tensor


LossFn = Callable[[Student, Targets], Tensor]

Measure = Callable[[Student, Targets], Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True)
class HeadOutput:
    """loss: the weighted sum, differentiable. The others by row, unweighted, detached.

    measures: what `measure` returned. entropy_T: of the student's whole distribution, nats; None unless asked for.
    """

    loss: Tensor
    loss_T: Tensor
    label_logp_T: Tensor
    measures: Mapping[str, Tensor] = field(default_factory=dict)
    entropy_T: Tensor | None = None


def head_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    loss_fn: LossFn,
    targets: Targets,
    *,
    form: HeadForm | None = None,
    bias_V: Tensor | None = None,
    chunk: int | None = None,
    measure: Measure | None = None,
    entropy: bool = False,
) -> HeadOutput:
    """Sum over tokens of weight * loss, with gradients to hidden, weight and bias where they ask for one.

    hidden_TD and weight_VD share a dtype (bf16, fp32, fp64); everything after the logits is fp32 (fp64 for fp64).
    A weight that is sharded over processes (DTensor) is gathered once here; its gradient is averaged over them.
    chunk: tokens at a time; None takes what fits the memory. T = 0 gives a zero that still has a (zero) gradient.
    measure: further numbers by row from the same student, each [T]. entropy: also the exact entropy by row.
    """
    weight_VD, bias_V = _gathered(weight_VD), None if bias_V is None else _gathered(bias_V)
    form = form or HeadForm(weight_VD.shape[0])
    sweep = _sweep(hidden_TD, weight_VD, bias_V, form)
    pass_ = _Pass(
        loss_fn, _clean(targets, hidden_TD.device), form, sweep, measure, entropy, {},
        chunk or chunk_rows(len(hidden_TD), sweep.row_bytes(form, hidden_TD.dtype), hidden_TD.device),
        torch.is_grad_enabled(),
    )  # fmt: skip
    loss, loss_T, label_T = _HeadLoss.apply(hidden_TD, weight_VD, bias_V, pass_)  # type: ignore[no-untyped-call]
    rows = {name: torch.cat(parts) for name, parts in pass_.seen.items()}
    entropy_T = rows.pop("", None)
    return HeadOutput(loss, loss_T, label_T, rows, entropy_T)


def chunk_rows(num_tokens: int, row_bytes: int, device: torch.device) -> int:
    """Tokens in a chunk: as many as a quarter of the free memory and CHUNK_BYTES hold, in chunks of about one size."""
    room = CHUNK_BYTES
    most = CPU_ROWS
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        room, most = min(room, (free + cached) // 4), num_tokens
    rows = max(1, min(room // row_bytes, most))
    rows = -(-num_tokens // -(-num_tokens // rows)) if num_tokens else 1
    return rows if rows < 128 else -(-rows // 64) * 64


def _gathered(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        whole: Tensor = tensor.full_tensor(
            grad_placements=[Partial("avg")] * tensor.device_mesh.ndim
        )
        return whole
    return tensor


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


@dataclass(frozen=True, slots=True)
class _Pass:
    """One call of head_loss, without the tensors that have gradients."""

    loss_fn: LossFn
    targets: Targets
    form: HeadForm
    sweep: Sweep
    measure: Measure | None
    entropy: bool
    seen: dict[str, list[Tensor]]
    chunk: int
    grads: bool


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, call: _Pass
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss_T, label_T, ctx.gradients = _run(hidden_TD, weight_VD, bias_V, call)
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V)
        ctx.call = call
        ctx.mark_non_differentiable(loss_T, label_T)
        return (loss_T * call.targets.weight_T).sum(), loss_T, label_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        # Handed out and not kept, so that autograd takes them as they are; a second backward makes them again.
        grads, ctx.gradients = ctx.gradients or _run(*inputs, ctx.call)[2], None
        # On a CPU looking at a number is free; a step's upstream is mostly 1.
        if upstream.is_cuda or upstream != 1:
            for grad in grads:
                if grad is not None:
                    grad.mul_(upstream)
        dtypes = (None if t is None else t.dtype for t in inputs)
        return *(None if g is None else g.to(d) for g, d in zip(grads, dtypes, strict=True)), None


def _run(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, call: _Pass
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """loss_T, log q(label) [T], and the gradients that are asked for, dweight and dbias in the wide dtype."""
    wide = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
    vocab = call.form.vocab_size
    weight_wanted = call.grads and weight_VD.requires_grad
    bias_wanted = call.grads and bias_V is not None and bias_V.requires_grad
    grads = weight_wanted or bias_wanted or (call.grads and hidden_TD.requires_grad)
    dhidden_TD = torch.empty_like(hidden_TD) if grads else None
    dweight_VD = torch.empty_like(weight_VD, dtype=wide) if weight_wanted else None
    dbias_V = torch.zeros_like(bias_V, dtype=wide) if bias_wanted and bias_V is not None else None
    if dweight_VD is not None:
        dweight_VD[vocab if len(hidden_TD) else 0 :].zero_()
    loss_T = hidden_TD.new_zeros(len(hidden_TD), dtype=wide)
    label_T = torch.zeros_like(loss_T)
    for start in range(0, len(hidden_TD), call.chunk):
        rows = slice(start, start + call.chunk)
        hidden_CD = hidden_TD[rows]
        loss_T[rows], label_T[rows], kept = _chunk(hidden_CD, call, call.targets[rows], grads)
        if kept is None or dhidden_TD is None:
            continue
        dz_CV, factor_C = call.sweep.gradient(*kept)
        torch.mm(dz_CV, weight_VD[:vocab], out=dhidden_TD[rows])
        if factor_C is not None:
            dhidden_TD[rows] *= factor_C[:, None]
            hidden_CD = hidden_CD * factor_C[:, None]
        if dweight_VD is not None:
            _add_product(dweight_VD[:vocab], dz_CV.t(), hidden_CD, first=start == 0)
        if dbias_V is not None:
            dbias_V[:vocab] += dz_CV.sum(0, dtype=wide) if factor_C is None else factor_C @ dz_CV
    return loss_T, label_T, (dhidden_TD, dweight_VD, dbias_V)


def _sweep(hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, form: HeadForm) -> Sweep:
    wide = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
    weight_VD = weight_VD.detach()[: form.vocab_size]
    bias_V = None if bias_V is None else bias_V.detach()[: form.vocab_size]
    return PlainSweep(weight_VD, bias_V, form, wide)


def _chunk(
    hidden_CD: Tensor, call: _Pass, targets: Targets, grads: bool
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """(loss [C], log q(label) [C], derivatives by the chosen logits [C, S] and the rest's log-sum-exp [C])."""
    label_C1 = targets.label_T[:, None]
    assert targets.teacher_ids_TK is not None
    used_CK = targets.teacher_ids_TK >= 0
    # An unused entry points to the label: chosen anyway, so nothing else is masked or counted for it.
    ids_CK = torch.where(used_CK, targets.teacher_ids_TK, label_C1)
    rest = call.sweep.rest(hidden_CD, torch.cat([label_C1, ids_CK], dim=1), entropy=call.entropy)
    in_top_C = (used_CK & (targets.teacher_ids_TK == label_C1)).any(1)
    z_CS, lse_C = rest.z_CS.requires_grad_(), rest.lse_C.requires_grad_()
    with torch.enable_grad():
        student = _student(z_CS, lse_C, rest.best_C, used_CK, in_top_C)
        loss_C = call.loss_fn(student, targets)
        kept = None
        if grads:
            kept = torch.autograd.grad((loss_C * targets.weight_T).sum(), [z_CS, lse_C])
    with torch.no_grad():
        if call.measure is not None:
            for name, value_C in call.measure(student, targets).items():
                call.seen.setdefault(name, []).append(value_C)
        if rest.entropy_C is not None:
            call.seen.setdefault("", []).append(_entropy(rest, student, used_CK, in_top_C))
    return loss_C.detach(), student.label_T.detach(), kept


def _student(
    z_CS: Tensor, rest_C: Tensor, best_C: Tensor, used_CK: Tensor, in_top_C: Tensor
) -> Student:
    """The K+1 numbers as log-probabilities; column 0 of z_CS is the label, the others the teacher's ids."""
    label_C, z_CK = z_CS[:, 0], z_CS[:, 1:]
    outside_C = torch.where(in_top_C, OUTSIDE, label_C)
    tail_C = torch.logaddexp(rest_C, outside_C)
    lse_C = torch.cat([torch.where(used_CK, z_CK, OUTSIDE), tail_C[:, None]], dim=1).logsumexp(1)
    best_C = torch.maximum(best_C, outside_C.detach()) - lse_C.detach()
    return Student(label_C - lse_C, z_CK - lse_C[:, None], tail_C - lse_C, best_C)


def _entropy(rest: Rest, student: Student, used_CK: Tensor, in_top_C: Tensor) -> Tensor:
    """-sum q log q over the whole vocabulary [C]: the chosen ids, each once, and the rest's own entropy."""
    assert rest.entropy_C is not None
    log_share_C = rest.lse_C + (student.label_T - rest.z_CS[:, 0])
    chosen_CS = torch.cat(
        [
            torch.where(in_top_C, OUTSIDE, student.label_T)[:, None],
            torch.where(used_CK, student.top_TK, OUTSIDE),
        ],
        dim=1,
    )
    of_chosen_C = -(chosen_CS.exp() * chosen_CS).sum(1)
    return of_chosen_C + log_share_C.exp() * (rest.entropy_C - log_share_C)


def _add_product(total_VD: Tensor, left_VC: Tensor, right_CD: Tensor, *, first: bool) -> None:
    """total += left @ right (= for the first), added up in total's dtype."""
    if left_VC.dtype == total_VD.dtype:
        torch.addmm(total_VD, left_VC, right_CD, beta=0 if first else 1, out=total_VD)
    elif left_VC.is_cuda:
        torch.addmm(
            total_VD,
            left_VC,
            right_CD,
            beta=0 if first else 1,
            out_dtype=total_VD.dtype,
            out=total_VD,
        )
    elif first:
        total_VD.copy_(torch.mm(left_VC, right_CD))
    else:
        total_VD.add_(torch.mm(left_VC, right_CD))
