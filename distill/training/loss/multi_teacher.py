"""The loss on several teachers' stored distributions over the same tokens: sum over teachers of share_i D(p_i || q).

Each teacher kept its own ids; at a position the student is evaluated at their union. From these K+1 numbers follows the
student as each teacher's ids see it: its mass outside teacher i's ids is its mass outside the union plus that at the ids
that only other teachers kept. So any number of teachers needs one pass over the vocabulary.

For metrics, the teachers' mixture goes with the single distributions, as far as it is known: sum share_i p_i at every id of
the union; a teacher that did not keep an id adds nothing there, and its tail is added to the mixture's tail.

Shapes: C positions of a trace, T tokens of a batch, M teachers, K entries of the union.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from distill.records import Array, TopK
from distill.training.loss.head import OUTSIDE, LossFn, Student, Targets


@dataclass(frozen=True, slots=True, eq=False)
class TeacherMixture:
    """The distributions of several teachers at C positions.

    ids_CK: the union of their ids, -1 = no entry, by descending probability in the mixture; logp_CK (-inf there) and tail_T:
    the mixture. each_logp_CMK: each teacher's own, -inf at ids that it did not keep; each_tail_CM: the log of its mass
    outside its ids.
    """

    ids_CK: Array
    logp_CK: Array
    tail_T: Array
    each_logp_CMK: Array
    each_tail_CM: Array

    @staticmethod
    def of(tops: Sequence[TopK], shares: Sequence[float]) -> TeacherMixture:
        """Build the mixture from each teacher's distributions over the same positions; shares add up to 1."""
        dense = [top.dense() for top in tops]
        ids_CE = np.concatenate([ids for ids, _ in dense], axis=1)
        order_CE = np.argsort(ids_CE, axis=1, kind="stable")
        sorted_CE = np.take_along_axis(ids_CE, order_CE, 1)
        first_CE = sorted_CE >= 0
        first_CE[:, 1:] &= sorted_CE[:, 1:] != sorted_CE[:, :-1]
        index_CE = np.empty_like(order_CE)  # each teacher's entries as indices into the union
        np.put_along_axis(index_CE, order_CE, first_CE.cumsum(1) - 1, 1)
        num, width = len(ids_CE), int(first_CE.sum(1).max(initial=0))
        union_CK = np.full((num, width), -1, np.int64)
        each_CMK = np.full((num, len(tops), width), -np.inf, np.float32)
        start = 0
        for m, (ids_CN, logp_CN) in enumerate(dense):
            rows, columns = np.nonzero(ids_CN >= 0)
            indices = index_CE[rows, start + columns]
            union_CK[rows, indices] = ids_CN[rows, columns]
            each_CMK[rows, m, indices] = logp_CN[rows, columns]
            start += ids_CN.shape[1]
        each_tail_CM = np.stack([top.tail_T for top in tops], axis=1).astype(np.float32)
        share_M = np.asarray(shares, np.float64)
        with np.errstate(divide="ignore"):
            mixed_CK = np.log(np.einsum("m,cmk->ck", share_M, np.exp(each_CMK)))
            tail_C = np.log(np.exp(each_tail_CM) @ share_M)
        by_mass_CK = np.argsort(-mixed_CK, axis=1, kind="stable")
        return TeacherMixture(
            np.take_along_axis(union_CK, by_mass_CK, 1),
            np.take_along_axis(mixed_CK, by_mass_CK, 1).astype(np.float32),
            tail_C.astype(np.float32),
            np.take_along_axis(each_CMK, by_mass_CK[:, None], 2),
            each_tail_CM,
        )

    @property
    def width(self) -> int:
        return int(self.ids_CK.shape[1])

    def slice(self, start: int, stop: int) -> TeacherMixture:
        """Positions start to stop - 1."""
        return TeacherMixture(*(getattr(self, f.name)[start:stop] for f in fields(self)))

    def dense(self, width: int) -> tuple[Array, Array]:
        """Return the union and the mixture [C, width], padded as in TopK.dense."""
        extra = ((0, 0), (0, width - self.width))
        return (
            np.pad(self.ids_CK, extra, constant_values=-1),
            np.pad(self.logp_CK, extra, constant_values=-np.inf),
        )

    def each(self, width: int) -> Array:
        """Return every teacher's log-probabilities [C, M, width]."""
        extra = ((0, 0), (0, 0), (0, width - self.width))
        return np.pad(self.each_logp_CMK, extra, constant_values=-np.inf)


def over_teachers(loss: LossFn, shares: Sequence[float]) -> LossFn:
    """Turn a loss into its sum over teachers, share_i * loss(student at teacher i's ids, teacher i's targets), [T]."""

    def combined(student: Student, targets: Targets) -> Tensor:
        assert targets.each_logp_TMK is not None and targets.each_tail_TM is not None  # noqa: PT018
        total = torch.zeros_like(student.label_T)
        for m, share in enumerate(shares):
            logp_TK = targets.each_logp_TMK[:, m]
            own = replace(targets, teacher_logp_TK=logp_TK, teacher_tail_T=targets.each_tail_TM[:, m])
            total = total + share * loss(_student_for_teacher(student, targets, logp_TK), own)
        return total

    return combined


def _student_for_teacher(student: Student, targets: Targets, logp_TK: Tensor) -> Student:
    """Return the student as one teacher's ids see it: ids that this teacher did not keep are part of the tail."""
    assert targets.teacher_logp_TK is not None
    others_TK = (targets.teacher_logp_TK > -torch.inf) & (logp_TK == -torch.inf)
    outside_TK = torch.where(others_TK, student.top_TK, OUTSIDE)
    tail_T = torch.cat([outside_TK, student.tail_T[:, None]], dim=1).logsumexp(1)
    best_TK = torch.cat([outside_TK.detach(), student.best_outside_T[:, None]], dim=1)
    return replace(student, tail_T=tail_T, best_outside_T=best_TK.amax(1))
