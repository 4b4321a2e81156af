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
from distill.training.loss.stored_targets import outcomes, stored
from distill.training.loss.weight_schedule import LinearWeight

REFUSED_OPTIONS = {
    "temperature": "stored distributions have temperature 1. At any other, the mass outside the stored ids cannot be "
    "known: for a Zipf-2 teacher with a vocabulary of 150000 and 64 ids stored, the tail is .009 at 1 and .62 at 2, and no stored "
    "number tells. Remove it, or name the teacher in `teacher:`, which runs it in the trainer at any temperature."
}
"""Options that users may look for and that these losses cannot have, with the reason."""

Weight = Annotated[float, Field(ge=0)]


def cross_entropy(student: Student, targets: Targets) -> Tensor:
    """-log q(label), nats [T]: plain SFT on the trace."""
    return -student.label_T


def forward_kl(student: Student, targets: Targets) -> Tensor:
    """KL(p || q) over S and the tail, nats [T]:  sum_S p log(p/q) + T log(T/P)."""
    return divergences.forward_kl(*outcomes(student, targets))


def reverse_kl(student: Student, targets: Targets) -> Tensor:
    """KL(q || p) over S and the tail, nats [T]:  sum_S q log(q/p) + P log(P/T).

    A teacher's tail below 1e-6 counts as 1e-6. With zero mass the loss would be infinite, and without the tail's term the
    student would be rewarded for moving mass there; with 1e-6 the loss is finite and above -1e-6.
    """
    return divergences.reverse_kl(*outcomes(student, targets, least_tail=NO_TAIL))


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
) -> Tensor:
    """ce_weight * cross entropy + kl_weight * forward KL, nats [T] (Hinton et al. 2015, at temperature 1).

    A final weight is the weight at the last step, reached linearly; None: the weight is constant.
    """
    ce = LinearWeight(ce_weight, final_ce_weight).at(targets.progress)
    kl = LinearWeight(kl_weight, final_kl_weight).at(targets.progress)
    return ce * cross_entropy(student, targets) + kl * forward_kl(student, targets)


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
    """Reverse KL as a policy gradient, [T]: -w A rho on the student's own tokens, for on_policy stages with scoring: engine.

    A = log p(token) - log q(token) when it was sampled, a constant; rho = q / q sampled, 1 with its gradient; w = min(q trainer
    / q engine, importance_cap), a constant. Its gradient equals that of KL(q || p) a token in expectation, plus sampling
    noise. It needs the teacher's log-probability of the sampled token only.
    """
    if targets.advantage_T is None or targets.engine_logp_T is None:
        raise UserError(
            "policy_gradient learns from the student's own completions: use it in a stage of kind on_policy."
        )
    own_T = student.label_T.detach()
    weight_T = (own_T - targets.engine_logp_T).exp().clamp(max=importance_cap)
    return -weight_T * targets.advantage_T * (student.label_T - own_T).exp()
