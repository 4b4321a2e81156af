"""Numbers for the trace page: entropy, the candidates of teacher and student side by side, and their KL.

Input: stored distributions of both models at the same positions. Output: columns that `trace_page` packs into the page.

Shape suffixes: T positions, K teacher's entries, L student's entries, C candidates shown, E entries, flat.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distill.records import NO_TAIL, Array, TopK

TEACHER_COLUMNS = 8
"""Number of the teacher's most probable candidates considered."""
STUDENT_EXTRA = 4
"""Number of the student's most probable candidates considered in addition."""


def entropy(top: TopK) -> Array:
    """[T] entropy in nats, with all tokens outside the entries as one outcome: at most the full entropy."""
    position_E = np.repeat(np.arange(len(top)), top.count_T)
    logp_E, tail_T = top.logp_E.astype(np.float64), top.tail_T.astype(np.float64)
    head_T = np.bincount(position_E, -np.exp(logp_E) * logp_E, minlength=len(top))
    mass_T = np.exp(tail_T)
    return np.asarray(head_T - np.where(mass_T > NO_TAIL, mass_T * np.where(mass_T > 0, tail_T, 0), 0))


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """The candidates shown: count_T at each position, flat; log-probabilities, nan where a model did not store one.

    teacher_rest_T, student_rest_T: log of the mass of all tokens that are not shown.
    """

    count_T: Array
    ids_E: Array
    teacher_E: Array
    student_E: Array
    teacher_rest_T: Array
    student_rest_T: Array


@dataclass(frozen=True, slots=True, eq=False)
class Matched:
    """Candidates with the log-probabilities of both models: TEACHER_COLUMNS of the teacher, then STUDENT_EXTRA others.

    ids_TC: -1 where there is no entry. rank_TC: a candidate's rank among the teacher's entries. teacher_TC, student_TC:
    -inf where the model did not store the candidate. teacher_all_T, student_all_T: total mass, tail included. kl_T:
    KL(teacher || student) over the entries stored for both, with all other tokens as one outcome: a lower bound of the
    full KL.
    """

    ids_TC: Array
    rank_TC: Array
    teacher_TC: Array
    student_TC: Array
    teacher_all_T: Array
    student_all_T: Array
    kl_T: Array

    def candidates(self, width: int) -> Candidates:
        """The teacher's `width` most probable candidates, and the student's that are not among them."""
        column_C = np.arange(self.ids_TC.shape[1])
        wanted_TC = np.where(column_C < TEACHER_COLUMNS, column_C < width, self.rank_TC >= width)
        shown_TC = wanted_TC & (self.ids_TC >= 0)
        flat = [
            np.where(np.isneginf(values), np.nan, values)
            for values in (self.teacher_TC[shown_TC], self.student_TC[shown_TC])
        ]
        rest = [
            _log(all_T - np.where(shown_TC, np.exp(values), 0.0).sum(1))
            for all_T, values in (
                (self.teacher_all_T, self.teacher_TC),
                (self.student_all_T, self.student_TC),
            )
        ]
        return Candidates(shown_TC.sum(1), self.ids_TC[shown_TC], *flat, *rest)


def match(top: TopK, student: TopK | None) -> Matched:
    """Match the stored entries of both models position by position. student None: nothing is known of a student."""
    student = _empty(len(top)) if student is None else student
    ids_TK, teacher_TK = top.dense(max(TEACHER_COLUMNS, int(top.count_T.max(initial=0))))
    own_TL, student_TL = student.dense(max(STUDENT_EXTRA, int(student.count_T.max(initial=0))))
    rank_TL, rank_TK = _ranks(own_TL, ids_TK), _ranks(ids_TK, own_TL)
    there_TK, back_TL = _taken(student_TL, rank_TK), _taken(teacher_TK, rank_TL)
    first, extra = slice(0, TEACHER_COLUMNS), slice(0, STUDENT_EXTRA)
    own_rank_TK = np.broadcast_to(np.arange(ids_TK.shape[1]), ids_TK.shape)
    return Matched(
        ids_TC=np.concatenate([ids_TK[:, first], own_TL[:, extra]], 1),
        rank_TC=np.concatenate([own_rank_TK[:, first], rank_TL[:, extra]], 1),
        teacher_TC=np.concatenate([teacher_TK[:, first], back_TL[:, extra]], 1).astype(np.float64),
        student_TC=np.concatenate([there_TK[:, first], student_TL[:, extra]], 1).astype(np.float64),
        teacher_all_T=_mass(top, teacher_TK),
        student_all_T=_mass(student, student_TL),
        kl_T=_kl(top, student, teacher_TK, there_TK, student_TL, back_TL),
    )


def _empty(positions: int) -> TopK:
    """Distributions without entries and without tail mass."""
    return TopK(
        np.zeros(positions, np.int32),
        np.empty(0, np.int64),
        np.empty(0, np.float32),
        np.full(positions, -np.inf, np.float32),
    )


def _ranks(ids_TA: Array, among_TB: Array) -> Array:
    """[T, A] column of `among_TB` that holds each id at the same position; B if none does."""
    position_T = np.arange(len(ids_TA))[:, None]
    keys = (position_T << 32) + among_TB
    order = np.argsort(keys, axis=None, kind="stable")
    ordered = keys.ravel()[order]
    wanted = (position_T << 32) + ids_TA
    found = np.minimum(np.searchsorted(ordered, wanted), max(len(ordered) - 1, 0))
    hit = (ids_TA >= 0) & (ordered[found] == wanted) if len(ordered) else ids_TA < -1
    return np.asarray(np.where(hit, order[found] % among_TB.shape[1], among_TB.shape[1]))


def _taken(values_TB: Array, rank_TA: Array) -> Array:
    """[T, A] values in the columns `rank_TA`; -inf where the rank is out of range."""
    padded = np.concatenate([values_TB, np.full((len(values_TB), 1), -np.inf)], 1)
    return np.asarray(np.take_along_axis(padded, rank_TA, 1))


def _mass(top: TopK, logp_TK: Array) -> Array:
    return np.asarray(np.exp(logp_TK.astype(np.float64)).sum(1) + np.exp(top.tail_T.astype(np.float64)))


def _kl(top: TopK, student: TopK, teacher_TK: Array, there_TK: Array, student_TL: Array, back_TL: Array) -> Array:
    """[T] sum of p log(p/q) over the entries stored for both, with all other tokens as one outcome."""
    shared_TK = ~np.isneginf(there_TK) & ~np.isneginf(teacher_TK)
    p_TK = np.where(shared_TK, np.exp(teacher_TK.astype(np.float64)), 0.0)
    with np.errstate(invalid="ignore"):
        head_T = np.where(shared_TK, p_TK * (teacher_TK.astype(np.float64) - there_TK), 0.0).sum(1)
    only_p_T = np.where(shared_TK, 0.0, np.exp(teacher_TK)).sum(1)
    only_q_T = np.where(np.isneginf(back_TL), np.exp(student_TL), 0.0).sum(1)
    p_T = only_p_T + np.exp(top.tail_T.astype(np.float64))
    q_T = np.maximum(only_q_T + np.exp(student.tail_T.astype(np.float64)), 1e-12)
    rest_T = np.where(p_T > NO_TAIL, p_T * (np.log(np.maximum(p_T, 1e-300)) - np.log(q_T)), 0.0)
    return np.asarray(np.maximum(head_T + rest_T, 0.0))


def _log(mass_T: Array) -> Array:
    """Log of a mass; masses up to NO_TAIL count as 0."""
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(np.where(mass_T > NO_TAIL, mass_T, 0.0)))
