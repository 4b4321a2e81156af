"""The losses on stored distributions as functions, for one's own trainer.

    from distill.losses import Head, forward_kl

    loss = forward_kl(logits, batch)                                # logits [B, T, V]
    loss = forward_kl(hidden, batch, head=Head.of(model))           # hidden states [B, T, D]: logits are never held whole

`batch` is a `distill.traces.batches.TraceBatch`: what its `collate` makes of stored traces. The numbers are those of a
`train` stage with the same loss: the same kernels compute them, in chunks, with the gradient in the forward pass.

Alignment is done here and nowhere else (`predicting`): a batch's values at [b, t] are about the token input_ids[b, t], which the
model predicts at position t - 1. Give the student's output as the model returns it, for all T positions, without a shift.
Or give only the rows that predict a learned token, [N, V] or [N, D], in the order of `predicting(batch)`.

Padding, prompts and positions without a stored distribution have the label -100; they reach neither the head nor the mean.

Shapes: B traces, T tokens of the longest, N learned tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor

from distill import plug
from distill.records import UserError
from distill.traces.batches import IGNORED, TraceBatch
from distill.training.forward import ForwardPlan
from distill.training.loss import sparse
from distill.training.loss.head import HeadForm, HeadOutput, LossFn, Measure, Targets, head_loss
from distill.training.loss.stored_targets import Tail
from distill.training.policy import output_head

_HOME = "distill.training.loss.sparse"
_FROM_STORED = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "tvd",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "ce_kl",
    "cross_entropy",
)
_WITH_LABELS = ("ce_kl", "cross_entropy")

Reduction = Literal["mean", "sum", "none"]


@dataclass(frozen=True, slots=True)
class Head:
    """A model's output head: weight [V, D], bias [V], and how logits follow from their product (scale, cap, vocabulary).

    form None: the logits are the product, over all rows of the weight.
    """

    weight: Tensor
    bias: Tensor | None = None
    form: HeadForm | None = None

    @staticmethod
    def of(model: Any, vocab_size: int | None = None) -> Head:
        """Return the head of a transformers model, with a LoRA adapter's part where it has one.

        Take it anew in every step: with an adapter on the head, the weight is made of the adapter's present one.
        vocab_size: the tokenizer's length; rows of the weight beyond it are padding. None: no row is.
        """
        weight, bias = output_head(model)
        return Head(weight, bias, ForwardPlan.of(model, vocab_size or weight.shape[0]).form)


class Settings(TypedDict, total=False):
    """What all losses here take besides their own options.

    head: the student's output head, if hidden states are given; without it they are logits.
    reduction: mean over the learned tokens (default), sum, or none: the loss of each token, [B, T] with 0 at the others (given
    rows: [N]); with a gradient, which costs a second pass over the head.
    denominator: divide the sum by it instead of by the number of tokens: the number of learned tokens of the whole optimiser
    step, over all micro-batches and processes, so that the step's gradient does not depend on how it was split.
    temperature: of both distributions; other than 1 only with distributions over the whole vocabulary. The loss is multiplied
    by its square.
    vocab_size: the tokenizer's length; logits beyond it are padding and take no part. None: all take part.
    progress: share of the training that is done, for losses whose weights change (final_ce_weight, final_kl_weight).
    """

    head: Head | None
    reduction: Reduction
    denominator: Tensor | float | None
    temperature: float
    vocab_size: int | None
    progress: float


def forward_kl(
    student: Tensor, batch: TraceBatch, *, tail: Tail | None = None, bucket_share: float = 0.0, **how: Unpack[Settings]
) -> Tensor:
    """KL(teacher || student), nats. tail, bucket_share: how the tail's part is estimated, as in a recipe."""
    return on_batch("forward_kl", student, batch, {"tail": tail, "bucket_share": bucket_share}, **how)


def reverse_kl(student: Tensor, batch: TraceBatch, **how: Unpack[Settings]) -> Tensor:
    """KL(student || teacher) over the stored entries and the tail, nats."""
    return on_batch("reverse_kl", student, batch, **how)


def jsd(student: Tensor, batch: TraceBatch, *, beta: float = 0.5, **how: Unpack[Settings]) -> Tensor:
    """Jensen-Shannon divergence over the stored entries and the tail, nats; beta is the teacher's share of the mixture."""
    return on_batch("jsd", student, batch, {"beta": beta}, **how)


def tvd(student: Tensor, batch: TraceBatch, **how: Unpack[Settings]) -> Tensor:
    """Total variation distance over the stored entries and the tail, in [0, 1]."""
    return on_batch("tvd", student, batch, **how)


def skewed_forward_kl(student: Tensor, batch: TraceBatch, *, alpha: float = 0.1, **how: Unpack[Settings]) -> Tensor:
    """KL(teacher || alpha teacher + (1 - alpha) student) over the stored entries and the tail, nats."""
    return on_batch("skewed_forward_kl", student, batch, {"alpha": alpha}, **how)


def skewed_reverse_kl(student: Tensor, batch: TraceBatch, *, alpha: float = 0.1, **how: Unpack[Settings]) -> Tensor:
    """KL(student || (1 - alpha) teacher + alpha student) over the stored entries and the tail, nats."""
    return on_batch("skewed_reverse_kl", student, batch, {"alpha": alpha}, **how)


def ce_kl(
    student: Tensor,
    batch: TraceBatch,
    *,
    ce_weight: float = 0.5,
    kl_weight: float = 0.5,
    final_ce_weight: float | None = None,
    final_kl_weight: float | None = None,
    tail: Tail | None = None,
    bucket_share: float = 0.0,
    **how: Unpack[Settings],
) -> Tensor:
    """ce_weight * cross entropy of the trace's tokens + kl_weight * forward KL, nats.

    A final weight is reached linearly as `progress` goes from 0 to 1; None: the weight is constant.
    """
    weights = {"ce_weight": ce_weight, "kl_weight": kl_weight}
    final = {"final_ce_weight": final_ce_weight, "final_kl_weight": final_kl_weight}
    options = {**weights, **final, "tail": tail, "bucket_share": bucket_share}
    return on_batch("ce_kl", student, batch, options, **how)


def cross_entropy(student: Tensor, batch: TraceBatch, **how: Unpack[Settings]) -> Tensor:
    """-log of the student's probability of the trace's own token, nats: plain SFT."""
    return on_batch("cross_entropy", student, batch, **how)


def loss_function(fn: str | LossFn, options: Mapping[str, Any] | None = None) -> LossFn:
    """Return a loss by its name in a recipe, with its options checked and bound; a function is returned as it is.

    A function of one's own takes (student, targets) and returns [N], as in a recipe. Raises UserError for an unknown name, a wrong
    option, and a loss that needs more than stored distributions.
    """
    if not isinstance(fn, str):
        return functools.partial(fn, **(options or {}))
    if ":" not in fn and fn not in _FROM_STORED:
        raise UserError(
            f"{fn!r} is no loss on stored distributions for one's own trainer.{plug.nearest(fn, _FROM_STORED)}"
        )
    bound: LossFn = plug.bind(fn, options or {}, _HOME, fn)
    return bound


def predicting(batch: TraceBatch) -> tuple[Tensor, Tensor]:
    """Return (b [N], t [N]): the positions of the student's output that predict a learned token, trace by trace.

    The token predicted at [b, t] is input_ids[b, t + 1]. This is the only place where the shift is made.
    """
    b_N, t_N = (batch["labels"][:, 1:] != IGNORED).nonzero(as_tuple=True)
    return b_N, t_N


def targets_of(batch: TraceBatch, device: torch.device | None = None) -> Targets:
    """Return the targets of the learned tokens, in the order of `predicting`, each with the weight 1."""
    b_N, t_N = predicting(batch)
    device = device or batch["labels"].device

    def at(name: str) -> Tensor | None:
        stream: Tensor | None = batch.get(name)  # type: ignore[assignment]
        return None if stream is None else stream[b_N, t_N + 1].to(device)

    label_N = at("labels")
    assert label_N is not None, "every batch has labels"
    return Targets(
        label_T=label_N,
        weight_T=torch.ones(len(label_N), device=device),
        teacher_ids_TK=at("top_ids"),
        teacher_logp_TK=at("top_logprobs"),
        teacher_tail_T=at("tail_logprob"),
        draw_ids_TN=at("draw_ids"),
        draw_logp_TN=at("draw_logprobs"),
        draw_mass_T=at("draw_mass"),
        teacher_label_T=at("logprob"),
    )


def on_batch(
    fn: str | LossFn,
    student: Tensor,
    batch: TraceBatch,
    options: Mapping[str, Any] | None = None,
    **how: Unpack[Settings],
) -> Tensor:
    """Compute a loss by its name in a recipe, or one of your own (`loss_function`), on a batch.

    student: logits [B, T, V], or hidden states [B, T, D] with `head`, of all tokens of the batch; or [N, V], [N, D].
    Raises UserError if student and batch do not fit together, or the loss needs what the batch lacks.
    """
    loss = loss_function(fn, options)
    temperature = how.get("temperature", 1.0)
    factor = temperature**2
    rows, targets = rows_and_targets(student, batch, how.get("head"), how.get("vocab_size"))
    targets = replace(targets, progress=how.get("progress", 0.0))
    form = _form(rows, how.get("head"), how.get("vocab_size"))
    if temperature != 1.0:
        if not isinstance(fn, str) or fn in _WITH_LABELS:
            raise UserError("temperature is for the divergences; the cross entropy of tokens has none. Leave it at 1.")
        targets, form = _at_temperature(targets, form, temperature)
    compute = functools.partial(_head_loss, loss=loss, targets=targets, head=how.get("head"), form=form)
    reduction = how.get("reduction", "mean")
    if reduction == "none":
        loss_N = factor * _each(rows, compute, how.get("head"))
        if student.dim() == 2:
            return loss_N
        b_N, t_N = (each.to(loss_N.device) for each in predicting(batch))
        return loss_N.new_zeros(student.shape[:2]).index_put((b_N, t_N + 1), loss_N)
    total = factor * compute(rows).loss
    if reduction == "sum":
        return total
    if reduction != "mean":
        raise UserError(f"reduction: {reduction!r} is none of mean, sum and none.")
    denominator = how.get("denominator")
    return total / (max(len(rows), 1) if denominator is None else denominator)


def rows_and_targets(
    student: Tensor, batch: TraceBatch, head: Head | None, vocab_size: int | None
) -> tuple[Tensor, Targets]:
    """Return the student's rows [N, ·] that predict a learned token, and their targets. Raises UserError if they do not fit."""
    targets, num = targets_of(batch, student.device), int((batch["labels"][:, 1:] != IGNORED).sum())
    shape, expected = tuple(student.shape), tuple(batch["labels"].shape)
    if student.dim() == 3:
        if shape[:2] != expected:
            raise UserError(
                f"the student's output has the shape {shape} for a batch of {expected} tokens. Give it for all tokens of the batch, not "
                "shifted or cut (logits_to_keep), or give the rows of `predicting(batch)` alone."
            )
        b_N, t_N = predicting(batch)
        student = student[b_N.to(student.device), t_N.to(student.device)]
    elif student.dim() != 2 or len(student) != num:
        raise UserError(
            f"the student's output has the shape {shape}; {num} tokens of the batch are learned. Give [B, T, ·], or one row for each "
            "of `predicting(batch)`."
        )
    if head is not None and student.shape[1] != head.weight.shape[1]:
        raise UserError(
            f"the head takes {head.weight.shape[1]} hidden features, but the student's output has {student.shape[1]}. Give the last "
            "hidden states with `head`, or logits without it."
        )
    size = _form(student, head, vocab_size).vocab_size
    ids = targets.teacher_ids_TK
    if ids is not None and not ids.is_cuda and ids.numel() and int(ids.max()) >= size:
        raise UserError(
            f"the traces hold the token id {int(ids.max())}, and the student has {size} ids: the teacher's tokenizer is another. "
            "Stored distributions can be learned with the tokenizer they were stored with."
        )
    return student, targets


def _form(rows: Tensor, head: Head | None, vocab_size: int | None) -> HeadForm:
    if head is None:
        if vocab_size is not None and vocab_size > rows.shape[1]:
            raise UserError(
                f"vocab_size is {vocab_size}, and the logits have {rows.shape[1]} columns. Are these hidden states? They need "
                "head=Head.of(model)."
            )
        return HeadForm(vocab_size or rows.shape[1])
    form = head.form or HeadForm(head.weight.shape[0])
    return form if vocab_size is None else replace(form, vocab_size=min(vocab_size, form.vocab_size))


def _head_loss(
    rows: Tensor,
    *,
    loss: LossFn,
    targets: Targets,
    head: Head | None,
    form: HeadForm,
    weight: Tensor | None = None,
    measure: Measure | None = None,
) -> HeadOutput:
    """The weighted sum of the loss. weight: of each row, [N]; None = 1."""
    if weight is not None:
        targets = replace(targets, weight_T=weight)
    if head is None:
        return head_loss(rows, None, loss, targets, form=form, measure=measure)
    return head_loss(rows, head.weight, loss, targets, form=form, bias_V=head.bias, measure=measure)


def _each(rows: Tensor, compute: Callable[..., HeadOutput], head: Head | None) -> Tensor:
    """Return the loss of each row [N], differentiable."""
    ends = () if head is None else (head.weight, head.bias)
    loss_N: Tensor = _EachRow.apply(compute, rows, *ends)  # type: ignore[no-untyped-call]
    return loss_N


class _EachRow(torch.autograd.Function):
    """The rows' losses; their upstream gradients are the weights of a second pass, whose gradients these are."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[..., HeadOutput], *inputs: Tensor | None) -> Tensor:
        ctx.compute = compute
        ctx.save_for_backward(*inputs)
        with torch.no_grad():
            rows = inputs[0]
            return compute(rows).loss_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        inputs = [
            None if each is None else each.detach().requires_grad_(wanted)
            for each, wanted in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with torch.enable_grad():
            rows, weight, bias = (*inputs, None, None)[:3]
            head = {} if weight is None else {"head": Head(weight, bias)}
            loss = ctx.compute(rows, weight=upstream_N, **head).loss
        wanted = [each for each in inputs if each is not None and each.requires_grad]
        found = iter(torch.autograd.grad(loss, wanted))
        return None, *(next(found) if each is not None and each.requires_grad else None for each in inputs)


def _at_temperature(targets: Targets, form: HeadForm, temperature: float) -> tuple[Targets, HeadForm]:
    """Return both sides at a temperature. Raises UserError where it cannot be had."""
    ids_NK, logp_NK = targets.teacher_ids_TK, targets.teacher_logp_TK
    whole = ids_NK is not None and logp_NK is not None and bool(((ids_NK >= 0).sum(1) == form.vocab_size).all())
    if not whole or logp_NK is None:
        raise UserError(
            f"temperature: {sparse.REFUSED_OPTIONS['temperature'].partition(' Remove it')[0]} Leave it at 1."
        )
    if form.softcap is not None:
        raise UserError(
            "temperature: this model caps its logits, and a temperature is applied after the cap. Leave it at 1."
        )
    if temperature <= 0:
        raise UserError(f"temperature: must be above 0, got {temperature}.")
    logp_NK = (logp_NK.to(torch.float64) / temperature).log_softmax(1).to(logp_NK.dtype)
    return replace(targets, teacher_logp_TK=logp_NK), replace(form, scale=form.scale / temperature)
