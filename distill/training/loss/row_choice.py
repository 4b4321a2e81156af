"""Choose, in the step, which of a batch's tokens are learned: those with the highest scores of every trace.

For scores that are known only there: the divergence between teacher and student under the current weights, and the entropy of
a teacher in the trainer. Scores are computed without a gradient; the loss then sees the chosen tokens alone. What is kept is
the same as in `token_choice`: the share rounded up, trace by trace; of equal scores the earlier token.

Shapes: T tokens that may have a weight, D hidden, K teacher entries, R rows worked on together, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from distill.training.batch import Batch
from distill.training.loss import divergences
from distill.training.loss.dense import Logits, compare_rows
from distill.training.loss.head import Targets, head_loss
from distill.training.loss.stored_targets import on_outcomes, stored


@dataclass(frozen=True, slots=True)
class RowChoice:
    """fn: entropy (of the teacher) or divergence (KL, teacher to student). share: of a trace's tokens, those kept."""

    fn: Literal["entropy", "divergence"]
    share: float

    @torch.no_grad()
    def by_targets(self, student: Logits, targets: Targets, batch: Batch, rows: Tensor) -> Tensor:
        """Return the indices into `rows` of the tokens that are kept, ascending, by the targets' entries and tail."""
        if self.fn == "entropy":
            logp_TK, tail_T = stored(targets)
            score_T = _entropy(torch.cat([logp_TK, tail_T[:, None]], 1))
        else:
            frozen = _frozen(student)
            score_T = head_loss(
                frozen.hidden_TD,
                frozen.weight_VD,
                on_outcomes(divergences.forward_kl),
                targets,
                form=frozen.form,
                bias_V=frozen.bias_V,
            ).loss_T
        return _chosen(score_T, batch, rows, self.share)

    @torch.no_grad()
    def by_models(
        self,
        student: Logits,
        teachers: Sequence[Logits],
        targets: Targets,
        batch: Batch,
        rows: Tensor,
        temperature: float,
    ) -> Tensor:
        """Return the same by teachers in the trainer, over the whole vocabulary and at a temperature."""
        compare = _entropy_of_first if self.fn == "entropy" else divergences.forward_kl
        score_T = compare_rows(_frozen(student), teachers, compare, targets, temperature=temperature).loss_T
        return _chosen(score_T, batch, rows, self.share)


def _chosen(score_T: Tensor, batch: Batch, rows: Tensor, share: float) -> Tensor:
    trace_T = torch.searchsorted(batch.doc_offsets.to(rows.device), rows, right=True) - 1
    return keep_highest(score_T, trace_T, share)


def keep_highest(score_T: Tensor, trace_T: Tensor, share: float) -> Tensor:
    """Return the indices of the tokens with the highest scores of each trace, ascending. trace_T: non-decreasing, from 0."""
    by_score = score_T.argsort(descending=True, stable=True)
    order = by_score[trace_T[by_score].argsort(stable=True)]  # trace by trace, the highest score first
    num_N = torch.bincount(trace_T)
    first_N = num_N.cumsum(0) - num_N
    rank_T = torch.arange(len(order), device=order.device) - first_N[trace_T[order]]
    kept_N = torch.ceil(torch.round(num_N.double() * share, decimals=6)).long().clamp(min=1)
    return order[rank_T < kept_N[trace_T[order]]].sort().values


def _entropy(logp_TN: Tensor) -> Tensor:
    return -(logp_TN.exp() * torch.where(logp_TN > -torch.inf, logp_TN, 0.0)).sum(1)


def _entropy_of_first(logp_RV: Tensor, logq_RV: Tensor) -> Tensor:
    return _entropy(logp_RV)


def _frozen(student: Logits) -> Logits:
    """Return the logits' inputs without a gradient."""
    bias_V = None if student.bias_V is None else student.bias_V.detach()
    return replace(student, hidden_TD=student.hidden_TD.detach(), weight_VD=student.weight_VD.detach(), bias_V=bias_V)
