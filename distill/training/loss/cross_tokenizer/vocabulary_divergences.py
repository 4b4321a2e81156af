"""Divergences between next-token distributions over different vocabularies: `(log p [R, U], log q [R, V]) -> [R]`.

Which rows are compared is decided in `alignment`; the losses are in `losses`.
Shapes: R rows worked on together, V the student's vocabulary, U the teacher's.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from distill.records import Array
from distill.training.loss.cross_tokenizer.alignment import VocabularyMap
from distill.training.loss.dense import Divergence


def sorted_distance(logp_RU: Tensor, logq_RV: Tensor) -> Tensor:
    """L1 distance of the sorted probabilities: sum |p_(i) - q_(i)| over ranks i, the shorter side zero-padded; [R], in [0, 2]."""
    return _sorted_distance(logp_RU.exp(), logq_RV.exp())


def shared_token_divergence(
    logp_RU: Tensor,
    logq_RV: Tensor,
    shared: VocabularyMap,
    divergence: Divergence,
    *,
    sorted_weight: float = 1.0,
) -> Tensor:
    """Divergence over the shared tokens and "any other" + sorted_weight * `sorted_distance` of the other tokens; [R].

    divergence: one of `divergences`, options bound.
    """
    p_other = _columns(logp_RU, shared, "teacher_other")
    q_other = _columns(logq_RV, shared, "student_other")
    loss_R = divergence(
        torch.cat([_columns(logp_RU, shared, "teacher_shared_M"), _log_mass(p_other)], dim=1),
        torch.cat([_columns(logq_RV, shared, "student_shared_M"), _log_mass(q_other)], dim=1),
    )
    if not sorted_weight:
        return loss_R
    return loss_R + sorted_weight * _sorted_distance(p_other.exp(), q_other.exp())


@functools.lru_cache(maxsize=16)
def _ids(shared: VocabularyMap, name: str, device: torch.device) -> Tensor:
    """Return one of the map's arrays on a device; copied once, for a copy waits for all that a GPU has to do."""
    ids: Array = getattr(shared, name)
    return torch.from_numpy(ids).to(device)


def _columns(logp_RN: Tensor, shared: VocabularyMap, name: str) -> Tensor:
    """Select columns by gather: the gradient of plain indexing takes thirty times as long on a CPU."""
    index = _ids(shared, name, logp_RN.device)
    return logp_RN.gather(1, index.expand(len(logp_RN), -1))


def _sorted_distance(p_RN: Tensor, q_RM: Tensor) -> Tensor:
    p_RN, q_RM = p_RN.sort(1, descending=True).values, q_RM.sort(1, descending=True).values
    both = min(p_RN.shape[1], q_RM.shape[1])
    return (p_RN[:, :both] - q_RM[:, :both]).abs().sum(1) + p_RN[:, both:].sum(1) + q_RM[:, both:].sum(1)


def _log_mass(logp_RN: Tensor) -> Tensor:
    """Return the log of the mass [R, 1]; -inf without a gradient if there are no columns."""
    if logp_RN.shape[1] == 0:
        return logp_RN.new_full((len(logp_RN), 1), -torch.inf)
    return logp_RN.logsumexp(1, keepdim=True)
