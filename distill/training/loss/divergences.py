"""Divergences between two distributions over the same outcomes, a row each: `(logp, logq) -> [T]`, nats.

p is the teacher, q the student. The caller decides what the outcomes are: "these ids, or something else" for stored
targets (`sparse`), or the whole vocabulary with a teacher in the trainer (`dense`). Both use the same definition, so a name
and its options mean the same everywhere in a recipe.

Log-probabilities [T, N] are normalised over the N outcomes; -inf is an outcome without mass (-inf on both sides: no such
outcome). Every function is differentiable in both arguments; value and gradient are finite if the divergence is.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import AfterValidator
from torch import Tensor

from distill.training.loss.head import OUTSIDE


def _between_0_and_1(ends: str) -> AfterValidator:
    def check(value: float) -> float:
        if not 0 < value < 1:
            raise ValueError(f"must lie between 0 and 1, both excluded: {ends}")
        return value

    return AfterValidator(check)


Beta = Annotated[
    float,
    _between_0_and_1(
        "at either end the Jensen-Shannon divergence is 0 whatever the student does. "
        "Its limit by beta at 0 is forward_kl, by 1 - beta at 1 reverse_kl: name the one you mean"
    ),
]
"""The teacher's share of the Jensen-Shannon mixture."""

Alpha = Annotated[
    float,
    _between_0_and_1(
        "at 0 the skewed divergence is the plain one (forward_kl, reverse_kl: name it), at 1 it is 0 whatever the student does"
    ),
]
"""The share of the first distribution that is mixed into the second."""


def forward_kl(logp_TN: Tensor, logq_TN: Tensor) -> Tensor:
    """KL(p || q) = sum p log(p/q): the student must put mass wherever the teacher does."""
    return _kl(_finite(logp_TN), _finite(logq_TN))


def reverse_kl(logp_TN: Tensor, logq_TN: Tensor) -> Tensor:
    """KL(q || p) = sum q log(q/p): the student must not put mass where the teacher does not."""
    return _kl(_finite(logq_TN), _finite(logp_TN))


def jsd(logp_TN: Tensor, logq_TN: Tensor, *, beta: Beta = 0.5) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (Agarwal et al. 2024, arXiv 2306.13649).

    It vanishes like beta as beta goes to 0 (jsd / beta -> forward KL) and like 1 - beta as beta goes to 1 (jsd / (1 - beta)
    -> reverse KL), so a beta near 0 or 1 also acts like a small learning rate.
    """
    p_TN, q_TN = _finite(logp_TN), _finite(logq_TN)
    m_TN = _mix(p_TN, q_TN, beta)
    return beta * _kl(p_TN, m_TN) + (1 - beta) * _kl(q_TN, m_TN)


def tvd(logp_TN: Tensor, logq_TN: Tensor) -> Tensor:
    """Total variation distance, half of sum |p - q|, in [0, 1] (not in nats)."""
    return 0.5 * (logp_TN.exp() - _finite(logq_TN).exp()).abs().sum(1)


def skewed_forward_kl(logp_TN: Tensor, logq_TN: Tensor, *, alpha: Alpha = 0.1) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q) (DistiLLM, arXiv 2402.03898): bounded by -log alpha."""
    p_TN, q_TN = _finite(logp_TN), _finite(logq_TN)
    return _kl(p_TN, _mix(p_TN, q_TN, alpha))


def skewed_reverse_kl(logp_TN: Tensor, logq_TN: Tensor, *, alpha: Alpha = 0.1) -> Tensor:
    """KL(q || (1 - alpha) p + alpha q) (DistiLLM, arXiv 2402.03898): bounded by -log alpha."""
    p_TN, q_TN = _finite(logp_TN), _finite(logq_TN)
    return _kl(q_TN, _mix(q_TN, p_TN, alpha))


def _finite(logp_TN: Tensor) -> Tensor:
    """Replace -inf by a finite number whose exp is 0: 0 * inf, and inf - inf in the gradient, would be NaN."""
    return logp_TN.clamp(min=OUTSIDE)


def _kl(logp_TN: Tensor, logq_TN: Tensor) -> Tensor:
    return (logp_TN.exp() * (logp_TN - logq_TN)).sum(1)


def _mix(a_TN: Tensor, b_TN: Tensor, share: float) -> Tensor:
    """Return log(share * a + (1 - share) * b) from log a and log b."""
    return torch.logaddexp(a_TN + math.log(share), b_TN + math.log1p(-share))
