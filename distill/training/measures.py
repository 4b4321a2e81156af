"""What one watches while a student learns from distributions: numbers a token, averaged with the loss's weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distill.head import Student, Targets
from distill.records import NO_TAIL


def watch(student: Student, targets: Targets) -> dict[str, Tensor]:
    """label_nll: -log q(label), nats. With a teacher's distribution also:

    teacher_nll: -log p(label), where the label is among the kept ids, else -log of the tail's mass, nats. agreement:
    1 where the student's most probable token is the teacher's. tail: the teacher's mass outside the kept ids; student_tail:
    the student's mass outside the same ids.
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
    # Entries come by descending probability, the student's own where the teacher keeps them.
    best_T = torch.where(logp_TK > -torch.inf, student.top_TK, -torch.inf)
    first_T = best_T[:, 0] >= torch.maximum(best_T.amax(1), student.best_outside_T)
    return found | {
        "teacher_nll": -label_T,
        "agreement": first_T.to(tail_T.dtype),
        "tail": tail_T.exp(),
        "student_tail": student.tail_T.exp(),
    }
