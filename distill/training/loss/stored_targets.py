"""Stored targets: teacher and student over the same outcomes at each token, the teacher's kept ids and "any other id".

p is the teacher, q the student, S the teacher's kept ids; all ids outside S are one more outcome with teacher mass
T and student mass P. A teacher's tail below 1e-6 is rounding noise and counts as no mass; if S is the whole vocabulary
there is no tail.

`tail_kl` is the part of the forward KL that the tail contributes, sum over v outside S of p log(p/q). Of p there, the data hold the
mass and, depending on how they were made, samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

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


Tail = Literal["bucket", "own_token", "draws"]
"""How a loss estimates the tail's part of the KL over the whole vocabulary; see `tail_kl`."""


def tail_kl(student: Student, targets: Targets, tail: Tail) -> Tensor:
    """Estimate the tail's part of KL(p || q), sum over v outside S of p_v log(p_v / q_v), nats [T].

    bucket: T log(T / P), all other ids as one. Never above the true value; its gradient spreads T over the tail as the student
    does (biased), and has no variance.
    own_token: log(p_y / q_y) if the trace's own token y is outside S, else 0. Unbiased in value and gradient if y was drawn from
    p: over traces sampled at temperature 1 without top-p and selected by nothing that follows from them. Of the three the most
    variance: an event of probability T with a gradient of size 1.
    draws: sum over the draws of the tail's mass for a draw * log(p_v / q_v). Unbiased over the draws, however the traces were
    made or selected. With n draws its variance is, relative to the own token's, about T / n.

    The gradients of own_token and draws are those of the cross entropy -log q; the teacher's log-probabilities make their values
    comparable to a KL, and 0 where student and teacher agree. Source: random sampling KD, arXiv 2503.16870. Raises UserError if the
    data hold no such samples.
    """
    logp_TK, tail_T = stored(targets)
    if tail == "bucket":
        tail_T = torch.where((tail_T > math.log(NO_TAIL)) & (student.tail_T > OUTSIDE / 2), tail_T, OUTSIDE)
        return tail_T.exp() * (tail_T - student.tail_T)
    if tail == "own_token":
        if targets.teacher_label_T is None or targets.teacher_ids_TK is None:
            raise UserError("tail: own_token needs traces with the log-probabilities of their own tokens.")
        in_top_T = ((targets.teacher_ids_TK == targets.label_T[:, None]) & (logp_TK > -torch.inf)).any(1)
        return torch.where(in_top_T, 0.0, targets.teacher_label_T - student.label_T)
    if targets.draw_ids_TN is None or targets.draw_logp_TN is None or targets.draw_mass_T is None:
        raise UserError(
            "tail: draws needs traces with draws from the teacher's tail: generate or score with tail_draws."
        )
    if student.draws_TN is None:  # no position of the batch has a draw
        return torch.zeros_like(student.label_T)
    drawn_TN = targets.draw_ids_TN >= 0
    ratio_TN = torch.where(drawn_TN, targets.draw_logp_TN - student.draws_TN, 0.0)
    return targets.draw_mass_T * ratio_TN.sum(1)


def support_kl(student: Student, targets: Targets) -> Tensor:
    """Return the kept ids' part of KL(p || q), sum over S of p log(p/q), nats [T]."""
    logp_TK, _ = stored(targets)
    ratio_TK = torch.where(logp_TK > -torch.inf, logp_TK - student.top_TK, 0.0)
    return (logp_TK.exp() * ratio_TK).sum(1)


def on_outcomes(divergence: Callable[..., Tensor]) -> LossFn:
    """Turn a divergence `(logp, logq)` into a loss on stored targets, over the kept ids and the tail."""
    return lambda student, targets: divergence(*outcomes(student, targets))
