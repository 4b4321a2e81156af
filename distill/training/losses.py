"""Losses: pure functions of the student's K+1 numbers and the targets, `[T]` each, never reduced here.

p is the teacher, q the student, S the teacher's kept ids; everything outside S is one more outcome with teacher mass
T and student mass P. A loss is used in a recipe by its name; its keyword-only parameters are its options.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distill.head import Student, Targets
from distill.records import NO_TAIL, UserError


def cross_entropy(student: Student, targets: Targets) -> Tensor:
    """-log q(label), nats [T]: plain SFT on the trace."""
    return -student.label_T


def forward_kl(student: Student, targets: Targets) -> Tensor:
    """KL(p || q) over S and the tail, nats [T]:  sum_S p log(p/q) + T log(T/P).

    A true KL between distributions over "these ids, or something else": non-negative, zero exactly when student and
    teacher agree on the buckets, and a lower bound of the KL over the whole vocabulary. A teacher's tail
    below 1e-6 is rounding noise and has no bucket.
    """
    logp_TK, tail_T = _teacher(targets)
    kept_TK = logp_TK > -torch.inf
    # Mask before arithmetic: 0 * inf would be NaN, in the gradient too.
    gap_TK = torch.where(kept_TK, logp_TK, 0.0) - torch.where(kept_TK, student.top_TK, 0.0)
    has_tail_T = tail_T > math.log(NO_TAIL)
    tail_gap_T = torch.where(has_tail_T, tail_T, 0.0) - torch.where(has_tail_T, student.tail_T, 0.0)
    return (logp_TK.exp() * gap_TK).sum(1) + tail_T.exp() * tail_gap_T


def _teacher(targets: Targets) -> tuple[Tensor, Tensor]:
    if targets.teacher_logp_TK is None or targets.teacher_tail_T is None:
        raise UserError(
            "this loss learns from the teacher's distributions, and the data hold none. Use data from a generate "
            "stage with top_k > 0, or loss: {fn: cross_entropy}."
        )
    return targets.teacher_logp_TK, targets.teacher_tail_T
