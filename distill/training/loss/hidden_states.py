"""Matching hidden states: how far a student's layers are from those of the teacher that they were made from.

A pruned student keeps some of its teacher's layers. The output of each (the hidden states given to the next layer) is compared
with that of the teacher's layer that it was made from, at the tokens that have a weight. Widths are equal, so nothing is
projected. Nothing but the tokens' own values enters a token's loss, so it does not depend on how batches are packed.

    mse      mean over D of (s - t)^2, divided by the variance over D of t at that token
    cosine   1 - cos(s, t)

Romero et al. 2015 (FitNets, arXiv 1412.6550); for pruned language models as in Minitron (arXiv 2407.14679).

Shapes: R rows (tokens with a weight), D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.training.batch import Batch
from distill.training.layer_outputs import LayerOutputs
from distill.training.loss.objective import Objective, Output

if TYPE_CHECKING:
    from distill.training.policy import StudentModule


def mse(student_RD: Tensor, teacher_RD: Tensor) -> Tensor:
    """Squared difference by the teacher's variance, [R], float32 or wider; 1 is the error of the teacher's mean."""
    student_RD, teacher_RD = _wide(student_RD), _wide(teacher_RD)
    return (student_RD - teacher_RD).square().mean(1) / teacher_RD.var(1, unbiased=False).clamp(min=1e-12)


def cosine(student_RD: Tensor, teacher_RD: Tensor) -> Tensor:
    """1 - the cosine between the two, in [0, 2], [R]."""
    return 1 - F.cosine_similarity(_wide(student_RD), _wide(teacher_RD), dim=1)


DISTANCES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": mse, "cosine": cosine}


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True, slots=True)
class HiddenMatch:
    """What is compared. pairs: (the student's layer, the teacher's layer). weight: factor on the mean over the pairs."""

    pairs: tuple[tuple[int, int], ...]
    weight: float = 1.0
    fn: Literal["mse", "cosine"] = "mse"


@dataclass(frozen=True, slots=True)
class MatchedObjective:
    """Another objective, plus weight * the mean over the pairs of layers of their distance, at the same tokens.

    `loss` in the metrics is the sum; `hidden` is the mean distance, without the weight.
    """

    inner: Objective
    match: HiddenMatch

    @property
    def reference(self) -> bool:
        return self.inner.reference

    def forward(self, module: StudentModule, batch: Batch, rows: Tensor) -> Output:
        (teacher,) = module.teachers
        module.outputs = LayerOutputs([mine for mine, _ in self.match.pairs])
        teacher.outputs = LayerOutputs([theirs for _, theirs in self.match.pairs])
        try:
            out = self.inner.forward(module, batch, rows)
            mine, theirs = module.outputs.rows, teacher.outputs.rows
        finally:
            module.outputs = teacher.outputs = None
        distance = DISTANCES[self.match.fn]
        loss = out.loss
        mean_R = torch.zeros_like(out.weight_T)
        for student_RD, teacher_RD in zip(mine, theirs, strict=True):
            if out.chosen is not None:
                student_RD, teacher_RD = student_RD[out.chosen], teacher_RD[out.chosen]
            loss_R = distance(student_RD, teacher_RD) / len(self.match.pairs)
            loss = loss + self.match.weight * (loss_R * out.weight_T).sum()
            mean_R = mean_R + loss_R.detach()
        return replace(out, loss=loss, measures={**out.measures, "hidden": mean_R})
