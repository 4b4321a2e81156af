"""Learning from traces that an earlier copy of the student wrote, scored by a teacher: importance weights and their metrics.

The trainer's student differs from the one that sampled the traces by the steps since then. Two weights correct for that,
both truncated at a cap, which bounds their variance and leaves a bias towards the sampler where they exceed it:

    of a token    q(token) / q_sampled(token). It makes the expectation over the sampler's token that over the student's.
                  `policy_gradient` needs it, whose loss is a function of the sampled token.
    of a prefix   the product of these ratios over the tokens before. It makes the sampler's prefixes the student's. A divergence
                  at a position needs no weight of the position's own token, whose expectation is 1, but this one.

`policy_gradient` leaves the prefixes' weight out, as on-policy methods with truncated importance sampling do. Untruncated, the
prefix weight has no bias, and a variance that grows with the trace's length and the distance from the sampler.

In: log q_sampled of each token (`Targets.engine_logp_T`). Shapes: T tokens with a loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distill.training.batch import Batch
from distill.training.loss.head import Student, Targets
from distill.training.loss.metrics import distribution_metrics
from distill.training.loss.objective import StoredObjective

if TYPE_CHECKING:
    from distill.training.policy import StudentModule


@dataclass(frozen=True, slots=True)
class OwnTracesObjective(StoredObjective):
    """A loss on the student's own traces. With `couple`, the sampler's log-probabilities are there for it."""

    def with_teacher(self, module: StudentModule, batch: Batch, rows: Tensor, targets: Targets) -> Targets:
        return replace(targets, old_logp_T=targets.engine_logp_T)


def prefix_log_ratio(logp_T: Tensor, targets: Targets, trace_T: Tensor) -> Tensor:
    """Sum of log q - log q_sampled over the tokens of the trace before each token [T], without a gradient.

    logp_T: log q of the tokens. trace_T: which trace a token is of; a trace's tokens follow each other.
    """
    assert targets.engine_logp_T is not None, "own traces carry the sampler's log-probabilities"
    gap_T = (logp_T.detach() - targets.engine_logp_T).double()
    before_T = gap_T.cumsum(0) - gap_T
    first_T = torch.ones_like(trace_T, dtype=torch.bool)
    first_T[1:] = trace_T[1:] != trace_T[:-1]
    start_T = torch.where(first_T, torch.arange(len(gap_T), device=gap_T.device), 0).cummax(0).values
    return (before_T - before_T[start_T]).to(logp_T.dtype)


def own_trace_metrics(student: Student, targets: Targets, *, importance_cap: float) -> dict[str, Tensor]:
    """Compute the metrics of a stage that learns from its own traces, [T] each, beside those of distributions.

    staleness: log q_sampled - log q of the token, whose mean estimates KL(q_sampled || q), nats. importance_weight: the weight
    that the loss uses, after the cap. clipped_weights: 1 where the cap lowers it.
    """
    assert targets.engine_logp_T is not None, "own traces carry the sampler's log-probabilities"
    stale_T = targets.engine_logp_T - student.label_T
    log_weight_T = -stale_T if targets.coupled_T is None else targets.coupled_T
    weight_T = log_weight_T.exp()
    return distribution_metrics(student, targets) | {
        "staleness": stale_T,
        "importance_weight": weight_T.clamp(max=importance_cap),
        "clipped_weights": (weight_T > importance_cap).to(weight_T.dtype),
    }
