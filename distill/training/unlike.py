"""Losses between models with different tokenizers, a teacher beside the student.

`uld` compares the sorted probabilities of the two next-token distributions, whatever the tokens are called (Boizard et al. 2024,
arXiv 2402.12030). `aligned` knows more (after GOLD): it compares at the positions where both tokenizers have just cut the
text at the same byte, token by token where the texts of two tokens are the same and by sorted probabilities elsewhere;
`aligned_head_loss` adds, for spans that one side cuts in more pieces than the other, the divergence of the two models' beliefs
in that span. GOLD multiplies a row of probabilities by that of the span's other tokens; what comes out is no distribution, so
its divergences can be negative. Here each term is a divergence between distributions, zero where the models agree.

Whole rows are read in the chunk, never as [T, V].
Shapes: R rows worked on together, V the student's vocabulary, U the teacher's, G aligned spans, T tokens.
"""

from __future__ import annotations

import functools
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from distill.head import HeadOutput, Targets, head_loss
from distill.training.alignment import Alignment, VocabularyMap
from distill.training.losses import cross_entropy
from distill.training.online import Divergence, Logits, dense_head_loss

Weight = Annotated[float, Field(ge=0)]

LEAST = 1e-7
"""Spans count as not quite certain by this much, so that log(1 - P) is finite."""


def uld(logp_RU: Tensor, logq_RV: Tensor) -> Tensor:
    """sum |p_(i) - q_(i)| over the ranks i, the shorter side padded with zeros; [R], in [0, 2]."""
    return _sorted_gap(logp_RU.exp(), logq_RV.exp())


def aligned(
    logp_RU: Tensor,
    logq_RV: Tensor,
    shared: VocabularyMap,
    divergence: Divergence,
    *,
    sorted_weight: Weight = 1.0,
) -> Tensor:
    """Divergence over the shared tokens and "any other" + sorted_weight * sorted gap among the others; [R].

    divergence: one of `divergences`, options bound.
    """
    by_teacher, by_student = (
        torch.from_numpy(ids).to(logq_RV.device)
        for ids in (shared.teacher_shared_M, shared.student_shared_M)
    )
    only_teacher, only_student = (
        torch.from_numpy(ids).to(logq_RV.device)
        for ids in (shared.teacher_other, shared.student_other)
    )
    p_other, q_other = logp_RU[:, only_teacher], logq_RV[:, only_student]
    loss_R = divergence(
        torch.cat([logp_RU[:, by_teacher], _log_mass(p_other)], dim=1),
        torch.cat([logq_RV[:, by_student], _log_mass(q_other)], dim=1),
    )
    if not sorted_weight:
        return loss_R
    return loss_R + sorted_weight * _sorted_gap(p_other.exp(), q_other.exp())


def aligned_head_loss(
    student: Logits,
    teacher: Logits,
    alignment: Alignment,
    student_label_T: Tensor,
    teacher_label_T: Tensor,
    weight_G: Tensor,
    shared: VocabularyMap,
    divergence: Divergence,
    *,
    sorted_weight: float = 1.0,
    span_weight: float = 1.0,
) -> HeadOutput:
    """Sum over the spans of weight * (`aligned` at the span's start + span_weight * the span's own divergence); rows are spans.

    Row t of either side's hidden states predicts its label t. The span's own divergence is that between the two
    models' answers to "does the text go on with these bytes, in these tokens?": KL of (P, 1 - P) to (Q, 1 - Q), P and Q the products of
    the label probabilities in the span. It is left out where both sides have one token: the first term covers it. It couples tokens, so
    log Q comes from a pass without gradients, and its derivative becomes a weight of each token's log-probability.
    """
    device = student.hidden_TD.device
    starts_s, starts_t, span_s, span_t = (
        torch.from_numpy(column).to(device)
        for column in (
            alignment.student_start_G, alignment.teacher_start_G, alignment.student_span_T, alignment.teacher_span_T,
        )
    )  # fmt: skip
    first = dense_head_loss(
        _rows(student, starts_s),
        [_rows(teacher, starts_t)],
        functools.partial(
            _aligned, shared=shared, divergence=divergence, sorted_weight=sorted_weight
        ),
        Targets(student_label_T[starts_s], weight_G),
    )
    num_spans = len(starts_s)
    pieces_G = torch.maximum(_count(span_s, num_spans), _count(span_t, num_spans))
    split_s, split_t = _of_split(span_s, pieces_G), _of_split(span_t, pieces_G)
    if not span_weight or not len(split_s):
        return first
    with torch.no_grad():
        log_q_G = _span_logp(student, split_s, student_label_T, span_s, num_spans)
        log_p_G = _span_logp(teacher, split_t, teacher_label_T, span_t, num_spans)
    value_G, slope_G = _yes_or_no(log_p_G, log_q_G)
    value_G = torch.where(pieces_G > 1, span_weight * value_G, 0.0)
    weight_T = -(span_weight * slope_G * weight_G)[span_s[split_s]]
    later = _labels(student, split_s, student_label_T, weight_T).loss
    loss = first.loss + (later - later.detach()) + (value_G * weight_G).sum()
    return HeadOutput(loss, first.loss_T + value_G, first.label_logp_T)


def _aligned(logp_RU: Tensor, logq_RV: Tensor, **options: object) -> Tensor:
    return aligned(logp_RU, logq_RV, **options)  # type: ignore[arg-type]


def _sorted_gap(p_RN: Tensor, q_RM: Tensor) -> Tensor:
    p_RN, q_RM = p_RN.sort(1, descending=True).values, q_RM.sort(1, descending=True).values
    both = min(p_RN.shape[1], q_RM.shape[1])
    return (
        (p_RN[:, :both] - q_RM[:, :both]).abs().sum(1)
        + p_RN[:, both:].sum(1)
        + q_RM[:, both:].sum(1)
    )


def _log_mass(logp_RN: Tensor) -> Tensor:
    """log of the mass [R, 1]; -inf without a gradient where there are no columns."""
    if logp_RN.shape[1] == 0:
        return logp_RN.new_full((len(logp_RN), 1), -torch.inf)
    return logp_RN.logsumexp(1, keepdim=True)


def _yes_or_no(log_p_G: Tensor, log_q_G: Tensor) -> tuple[Tensor, Tensor]:
    """KL((P, 1 - P) || (Q, 1 - Q)) and its derivative by log Q."""
    log_p_G, log_q_G = log_p_G.clamp(max=-LEAST), log_q_G.clamp(max=-LEAST)
    not_p_G, not_q_G = (-torch.expm1(log_p_G)).log(), (-torch.expm1(log_q_G)).log()
    value_G = log_p_G.exp() * (log_p_G - log_q_G) + not_p_G.exp() * (not_p_G - not_q_G)
    return value_G, -log_p_G.exp() + (not_p_G - not_q_G + log_q_G).exp()


def _rows(model: Logits, rows: Tensor) -> Logits:
    return Logits(model.hidden_TD.index_select(0, rows), model.weight_VD, model.form, model.bias_V)


def _count(span_T: Tensor, num_spans: int) -> Tensor:
    return torch.bincount(span_T[span_T >= 0], minlength=num_spans)


def _of_split(span_T: Tensor, pieces_G: Tensor) -> Tensor:
    """The tokens of spans that either side cuts in pieces."""
    return ((span_T >= 0) & (pieces_G[span_T.clamp(min=0)] > 1)).nonzero()[:, 0]


def _labels(model: Logits, rows: Tensor, label_T: Tensor, weight_T: Tensor) -> HeadOutput:
    part = _rows(model, rows)
    return head_loss(
        part.hidden_TD,
        part.weight_VD,
        cross_entropy,
        Targets(label_T[rows], weight_T),
        form=part.form,
        bias_V=part.bias_V,
    )


def _span_logp(
    model: Logits, rows: Tensor, label_T: Tensor, span_T: Tensor, num_spans: int
) -> Tensor:
    logp_T = _labels(model, rows, label_T, torch.zeros_like(rows, dtype=torch.float32)).label_logp_T
    return logp_T.new_zeros(num_spans).index_add(0, span_T[rows], logp_T)
