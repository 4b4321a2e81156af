"""Metrics a token while a student learns from distributions, averaged with the loss's weights.

A metric is -inf at tokens where it is not applicable; these are excluded from its mean.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from distill.records import NO_TAIL
from distill.training.loss import divergences
from distill.training.loss.head import OUTSIDE, Student, Targets
from distill.training.loss.stored_targets import outcomes

POSITION_STARTS = (0, 16, 64, 256)
"""Boundaries of the ranges of a completion for which KL is logged: tokens 0-15, 16-63, 64-255, and from 256 on."""


def distribution_metrics(student: Student, targets: Targets) -> dict[str, Tensor]:
    """Compute the metrics a token of a student against stored (or top) teacher distributions, [T] each.

    label_nll: -log q(label), nats. With a teacher's distribution also:

    teacher_nll: -log p(label) if the label is among the kept ids, else -log of the tail's mass, nats. agreement:
    1 if the student's most probable token is the teacher's. tail: the teacher's mass outside the kept ids; student_tail:
    the student's mass outside the same ids. kl: KL(p || q) over the kept ids and the tail, nats, for every loss, also by
    range of the completion (`by_position`). entropy_gap: the teacher's entropy over the same outcomes minus the student's, nats.
    """
    found = {"label_nll": -student.label_T}
    ids_TK, logp_TK, tail_T = (
        targets.teacher_ids_TK, targets.teacher_logp_TK, targets.teacher_tail_T,
    )  # fmt: skip
    if ids_TK is None or logp_TK is None or tail_T is None or ids_TK.shape[1] == 0:
        return found
    is_label_TK = (ids_TK == targets.label_T[:, None]) & (logp_TK > -torch.inf)
    kept_T = torch.where(is_label_TK, logp_TK, -torch.inf).amax(1)
    label_T = torch.where(is_label_TK.any(1), kept_T, tail_T.clamp(min=math.log(NO_TAIL)))
    # The teacher's entries are in descending order of probability.
    best_T = torch.where(logp_TK > -torch.inf, student.top_TK, -torch.inf)
    first_T = best_T[:, 0] >= torch.maximum(best_T.amax(1), student.best_outside_T)
    logp_TN, logq_TN = outcomes(student, targets)
    kl_T = divergences.forward_kl(logp_TN, logq_TN)
    return found | {
        "teacher_nll": -label_T,
        "agreement": first_T.to(tail_T.dtype),
        "tail": tail_T.exp(),
        "student_tail": student.tail_T.exp(),
        "kl": kl_T,
        "entropy_gap": _entropy(logp_TN) - _entropy(logq_TN),
        **by_position("kl", kl_T, targets.place_T),
    }


def full_vocabulary_metrics(logp_RV: Tensor, logq_RV: Tensor) -> dict[str, Tensor]:
    """Compute kl, agreement and entropy_gap as in `distribution_metrics`, from rows over the whole vocabulary, [R].

    logp_RV (teacher) and logq_RV (student) are log-softmaxes of finite logits.
    """
    p_RV = logp_RV.exp()
    own_R = torch.linalg.vecdot(p_RV, logp_RV)
    return {
        "kl": own_R - torch.linalg.vecdot(p_RV, logq_RV),
        "agreement": (logp_RV.argmax(1) == logq_RV.argmax(1)).to(logq_RV.dtype),
        "entropy_gap": torch.linalg.vecdot(logq_RV.exp(), logq_RV) - own_R,
    }


def by_position(name: str, value_T: Tensor, place_T: Tensor | None) -> dict[str, Tensor]:
    """Split a metric by range of the completion: `kl/0-15`, `kl/16-63`, `kl/64-255`, `kl/256-`."""
    if place_T is None:
        return {}
    found = {}
    for start, stop in itertools.pairwise((*POSITION_STARTS, math.inf)):
        here_T = (place_T >= start) & (place_T < stop)
        last = "" if stop == math.inf else int(stop) - 1
        found[f"{name}/{start}-{last}"] = torch.where(here_T, value_T, -torch.inf)
    return found


def weighted_sums(measures: Mapping[str, Tensor], weight_T: Tensor) -> dict[str, Tensor]:
    """Return each metric's weighted sum and the total weight of the tokens where it is applicable, [2] each."""
    found = {}
    for name, value_T in measures.items():
        known_T = value_T != -torch.inf  # NaN counts as applicable, so that it shows in the mean
        weighted_T = torch.where(known_T, value_T * weight_T, 0.0)
        found[name] = torch.stack([weighted_T.sum(), (known_T * weight_T).sum()]).float()
    return found


def _entropy(logp_TN: Tensor) -> Tensor:
    logp_TN = logp_TN.clamp(min=OUTSIDE)
    return -(logp_TN.exp() * logp_TN).sum(1)
