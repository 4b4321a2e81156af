"""Stored targets: teacher and student over the same outcomes at each token, the teacher's kept ids and "any other id".

p is the teacher, q the student, S the teacher's kept ids; all ids outside S are one more outcome with teacher mass
T and student mass P. A teacher's tail below 1e-6 is rounding noise and counts as no mass; if S is the whole vocabulary
there is no tail.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from distill.records import NO_TAIL, UserError
from distill.training.loss.head import OUTSIDE, LossFn, Student, Targets


def outcomes(student: Student, targets: Targets, *, least_tail: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return log p and log q [T, K+1] over S and the tail; -inf in both where there is no such outcome.

    Raises UserError if the data hold no distributions.
    """
    logp_TK, tail_T = stored(targets)
    tail_T = torch.where(tail_T > math.log(NO_TAIL), tail_T, -torch.inf)
    if least_tail:
        tail_T = tail_T.clamp(min=math.log(least_tail))
    outside_T = student.tail_T > OUTSIDE / 2
    logp_TN = torch.cat([logp_TK, torch.where(outside_T, tail_T, -torch.inf)[:, None]], dim=1)
    logq_TN = torch.cat([kept(student.top_TK, logp_TK), student.tail_T[:, None]], dim=1)
    return logp_TN, logq_TN


def kept(top_TK: Tensor, logp_TK: Tensor) -> Tensor:
    """Return the student's log-probabilities at S, -inf where there is no entry."""
    return torch.where(logp_TK > -torch.inf, top_TK, -torch.inf)


def stored(targets: Targets) -> tuple[Tensor, Tensor]:
    """Return log p at S and the log of the tail."""
    if targets.teacher_logp_TK is None or targets.teacher_tail_T is None:
        raise UserError(
            "this loss learns from the teacher's distributions, and the data hold none. Use data from a generate "
            "stage with top_logprobs > 0, or loss: {fn: cross_entropy}."
        )
    return targets.teacher_logp_TK, targets.teacher_tail_T


def on_outcomes(divergence: Callable[..., Tensor]) -> LossFn:
    """Turn a divergence `(logp, logq)` into a loss on stored targets, over the kept ids and the tail."""
    return lambda student, targets: divergence(*outcomes(student, targets))
