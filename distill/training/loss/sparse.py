"""Losses on stored targets: pure functions of the student's K+1 numbers and the targets, [T] each, never reduced here.

p is the teacher, q the student, S the teacher's kept ids; all ids outside S are one more outcome with teacher mass
T and student mass P. Each divergence (`divergences`) over these outcomes is zero exactly when student and teacher agree on
them, never negative, and a lower bound of the same divergence over the whole vocabulary. A recipe names a loss by its
function's name; keyword-only parameters are its options.

A loss of your own is a function in a module beside the recipe. It has one of three forms, recognised by its parameters:
`(student, targets) -> [T]` as here, `(logp, logq) -> [T]` as in `divergences`, or `(pair) -> HeadOutput` as in
`cross_tokenizer.losses`.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from distill.records import NO_TAIL, UserError
from distill.training.loss import divergences
from distill.training.loss.divergences import Alpha, Beta
from distill.training.loss.head import Student, Targets
from distill.training.loss.stored_targets import Tail, outcomes, stored, support_kl, tail_kl
from distill.training.loss.weight_schedule import LinearWeight

REFUSED_OPTIONS = {
    "temperature": "stored distributions have temperature 1. At any other, the mass outside the stored ids cannot be "
    "known: for a Zipf-2 teacher with a vocabulary of 150000 and 64 ids stored, the tail is .009 at 1 and .62 at 2, and no stored "
    "number tells. Remove it, or name the teacher in `teacher:`, which runs it in the trainer at any temperature."
}
"""Options that users may look for and that these losses cannot have, with the reason."""

Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


def cross_entropy(student: Student, targets: Targets) -> Tensor:
    """-log q(label), nats [T]: plain SFT on the trace."""
    return -student.label_T


def forward_kl(student: Student, targets: Targets, *, tail: Tail | None = None, bucket_share: Share = 0.0) -> Tensor:
    """KL(p || q), nats [T]:  sum_S p log(p/q) + an estimate of the tail's part.

    tail (`stored_targets.tail_kl`): bucket, T log(T/P), which is biased and has no variance; own_token, the trace's own token where
    it is outside S, unbiased for traces sampled at temperature 1 and not selected, no byte more; draws, ids drawn from the
    teacher's tail at capture (tail_draws), unbiased for any traces, with less variance. None: draws where the traces have
    some, else bucket. bucket_share, for the samples: the share of the bucket in a mixture; bias in proportion to it, variance
    in proportion to (1 - bucket_share) squared.
    """
    if tail is None:
        tail = "bucket" if targets.draw_ids_TN is None else "draws"
    if tail == "bucket":
        return divergences.forward_kl(*outcomes(student, targets))
    sampled_T = (1 - bucket_share) * tail_kl(student, targets, tail)
    if bucket_share:
        sampled_T = sampled_T + bucket_share * tail_kl(student, targets, "bucket")
    return support_kl(student, targets) + sampled_T


def reverse_kl(student: Student, targets: Targets, *, importance_cap: PositiveFloat | None = None) -> Tensor:
    """KL(q || p) over S and the tail, nats [T]:  sum_S q log(q/p) + P log(P/T).

    importance_cap: only on traces that the student wrote itself and a teacher scored. Weighs each position by how much
    likelier its prefix has become since it was sampled, at most importance_cap: min(prod q / q sampled, importance_cap) over the
    tokens before. It corrects the traces' staleness; the cap bounds the variance and leaves a bias (`own_traces`). None = no weight.

    A teacher's tail below 1e-6 counts as 1e-6. With zero mass the loss would be infinite, and without the tail's term the
    student would be rewarded for moving mass there; with 1e-6 the loss is finite and above -1e-6.
    """
    value_T = divergences.reverse_kl(*outcomes(student, targets, least_tail=NO_TAIL))
    if importance_cap is None:
        return value_T
    if targets.coupled_T is None:
        raise UserError("reverse_kl: importance_cap is for traces that the student wrote itself and a teacher scored.")
    return targets.coupled_T.exp().clamp(max=importance_cap) * value_T


def jsd(student: Student, targets: Targets, *, beta: Beta = 0.5) -> Tensor:
    """Jensen-Shannon divergence over S and the tail, nats [T]; beta is the teacher's share of the mixture."""
    return divergences.jsd(*outcomes(student, targets), beta=beta)


def tvd(student: Student, targets: Targets) -> Tensor:
    """Total variation distance over S and the tail, in [0, 1], [T]."""
    return divergences.tvd(*outcomes(student, targets))


def skewed_forward_kl(student: Student, targets: Targets, *, alpha: Alpha = 0.1) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q) over S and the tail, nats [T]."""
    return divergences.skewed_forward_kl(*outcomes(student, targets), alpha=alpha)


def skewed_reverse_kl(student: Student, targets: Targets, *, alpha: Alpha = 0.1) -> Tensor:
    """KL(q || (1 - alpha) p + alpha q) over S and the tail, nats [T]."""
    return divergences.skewed_reverse_kl(*outcomes(student, targets), alpha=alpha)


def ce_kl(
    student: Student,
    targets: Targets,
    *,
    ce_weight: Weight = 0.5,
    kl_weight: Weight = 0.5,
    final_ce_weight: Weight | None = None,
    final_kl_weight: Weight | None = None,
    tail: Tail | None = None,
    bucket_share: Share = 0.0,
) -> Tensor:
    """ce_weight * cross entropy + kl_weight * forward KL, nats [T] (Hinton et al. 2015, at temperature 1).

    A final weight is the weight at the last step, reached linearly; None: the weight is constant. tail, bucket_share: as in
    forward_kl.
    """
    ce = LinearWeight(ce_weight, final_ce_weight).at(targets.progress)
    kl = LinearWeight(kl_weight, final_kl_weight).at(targets.progress)
    kl_T = forward_kl(student, targets, tail=tail, bucket_share=bucket_share)
    return ce * cross_entropy(student, targets) + kl * kl_T


def sampled_kd(student: Student, targets: Targets, *, draws: PositiveInt = 64) -> Tensor:
    """Cross entropy under ids drawn from the teacher, nats [T]: sum over the drawn ids of count / draws * (-log q).

    Needs a teacher in the trainer, from whose whole distribution `draws` ids are drawn at each token, with repetition
    (`dense.sample_ids`): teacher_ids_TK holds the distinct ids drawn, teacher_logp_TK the log of their counts. Its gradient equals
    that of the KL over the whole vocabulary in expectation for any number of draws, plus sampling noise (random sampling KD,
    arXiv 2503.16870).
    """
    logp_TK, _ = stored(targets)
    drawn_TK = torch.where(logp_TK > -torch.inf, student.top_TK, 0.0)
    return -(logp_TK.exp() / draws * drawn_TK).sum(1)


def policy_gradient(student: Student, targets: Targets, *, importance_cap: PositiveFloat = 2.0) -> Tensor:
    """Reverse KL as a policy gradient, [T]: -w A rho on the student's own tokens: in on_policy stages with scoring: engine, and in
    train stages on traces that the model generated and a teacher scored.

    A = log p(token) - log q(token) of the present student, a constant; rho = q / q now, 1 with its gradient; w = min(q now /
    q sampled, importance_cap), a constant. Its gradient equals that of KL(q || p) a token in expectation, plus sampling
    noise, where w is below the cap: also for traces of earlier weights, but for their prefixes (`own_traces`). It needs the
    teacher's log-probability of the sampled token only.
    """
    if targets.advantage_T is None or targets.engine_logp_T is None:
        raise UserError(
            "policy_gradient learns from the student's own completions: use it in a stage of kind on_policy, or on traces that "
            "the model generated and a teacher scored."
        )
    own_T = student.label_T.detach()
    weight_T = (own_T - targets.engine_logp_T).exp().clamp(max=importance_cap)
    advantage_T = targets.advantage_T + targets.engine_logp_T - own_T
    return -weight_T * advantage_T * (student.label_T - own_T).exp()
