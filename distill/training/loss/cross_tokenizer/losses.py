"""Losses between models with different tokenizers, with the teacher in the trainer: `(pair) -> HeadOutput`.

The teacher reads the student's texts re-tokenised. Both models predict from the same text at every byte where both
tokenizers have just cut it (`alignment`). There `uld` compares the sorted probabilities of the two next-token
distributions (Boizard et al. 2024, arXiv 2402.12030). `aligned` (after GOLD) compares tokens with the same text one by one
and the others by sorted probabilities; for a span that one side cuts in more tokens than the other it adds the divergence
between the two models' probabilities of that span. GOLD multiplies a row of probabilities by that of the span's other
tokens; the result is not a distribution, so its divergences can be negative. Here each term is a divergence between
distributions, zero if the models agree.

A recipe names a loss by its function's name; keyword-only parameters are its options. Whole rows exist a chunk at a time,
never as [T, V].
Shapes: R rows worked on together, V the student's vocabulary, U the teacher's, G aligned spans, T tokens.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from distill.training.batch import CrossTokenizerBatch
from distill.training.loss import divergences
from distill.training.loss.cross_tokenizer.alignment import VocabularyMap
from distill.training.loss.cross_tokenizer.vocabulary_divergences import shared_token_divergence, sorted_distance
from distill.training.loss.dense import Divergence, Logits, compare_rows
from distill.training.loss.head import HeadOutput, Targets, head_loss
from distill.training.loss.sparse import cross_entropy

Weight = Annotated[float, Field(ge=0)]
DivergenceName = Literal["forward_kl", "reverse_kl", "jsd", "tvd"]

MIN_NEGATIVE_LOGP = 1e-7
"""A span's probability is at most 1 minus this, so that log(1 - P) is finite."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A student and a teacher on the same texts; row t of either side's hidden states predicts its label t.

    spans: the aligned rows, as tensors. shared: the ids that are the same tokens.
    """

    student: Logits
    teacher: Logits
    student_label_T: Tensor
    teacher_label_T: Tensor
    spans: CrossTokenizerBatch
    shared: VocabularyMap

    @property
    def weights(self) -> Tensor:
        """The weight of each span, divided by the denominator, [G]."""
        divided: Tensor = self.spans.weight_G / self.spans.denominator
        return divided


def uld(pair: Pair) -> HeadOutput:
    """Sum over the spans of weight * (sum |p_(i) - q_(i)| over the ranks i at the span's start, in [0, 2])."""
    return _at_starts(pair, sorted_distance)


def aligned(
    pair: Pair,
    *,
    divergence: DivergenceName = "forward_kl",
    sorted_weight: Weight = 1.0,
    span_weight: Weight = 1.0,
) -> HeadOutput:
    """Sum over the spans of weight * (`shared_token_divergence` at the span's start + span_weight * the span's own divergence).

    The span's own divergence is KL of (P, 1 - P) to (Q, 1 - Q), with P and Q the products of the label probabilities in the
    span: the models' probabilities that the text continues with these tokens. It is omitted where both sides have one token,
    which the first term covers. It couples tokens, so log Q comes from a pass without gradients, and its derivative becomes
    a weight of each token's log-probability.
    """
    compare: Divergence = functools.partial(
        shared_token_divergence,
        shared=pair.shared,
        divergence=getattr(divergences, divergence),
        sorted_weight=sorted_weight,
    )
    first = _at_starts(pair, compare)
    spans, weight_G = pair.spans, pair.weights
    if not span_weight or not len(spans.student_piece_M):
        return first
    with torch.no_grad():
        student = _label_losses(pair.student, spans.student_piece_M, pair.student_label_T)
        teacher = _label_losses(pair.teacher, spans.teacher_piece_N, pair.teacher_label_T)
        empty_G = student.label_logp_T.new_zeros(len(weight_G))
        log_q_G = empty_G.index_add(0, spans.student_span_M, student.label_logp_T)
        log_p_G = empty_G.index_add(0, spans.teacher_span_N, teacher.label_logp_T)
    value_G, slope_G = _binary_kl(log_p_G, log_q_G)
    value_G = torch.where(spans.split_G, span_weight * value_G, 0.0)
    weight_M = -(span_weight * slope_G * weight_G)[spans.student_span_M]
    later = _label_losses(pair.student, spans.student_piece_M, pair.student_label_T, weight_M).loss
    loss = first.loss + (later - later.detach()) + (value_G * weight_G).sum()
    return HeadOutput(loss, first.loss_T + value_G, first.label_logp_T)


def _at_starts(pair: Pair, compare: Divergence) -> HeadOutput:
    """Compare both models' next-token distributions at the start of each span."""
    starts = pair.spans.student_start_G
    return compare_rows(
        _rows(pair.student, starts),
        [_rows(pair.teacher, pair.spans.teacher_start_G)],
        compare,
        Targets(pair.student_label_T[starts], pair.weights),
    )


def _binary_kl(log_p_G: Tensor, log_q_G: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL((P, 1 - P) || (Q, 1 - Q)) and its derivative by log Q."""
    log_p_G, log_q_G = log_p_G.clamp(max=-MIN_NEGATIVE_LOGP), log_q_G.clamp(max=-MIN_NEGATIVE_LOGP)
    not_p_G, not_q_G = (-torch.expm1(log_p_G)).log(), (-torch.expm1(log_q_G)).log()
    value_G = log_p_G.exp() * (log_p_G - log_q_G) + not_p_G.exp() * (not_p_G - not_q_G)
    return value_G, -log_p_G.exp() + (not_p_G - not_q_G + log_q_G).exp()


def _rows(model: Logits, rows: Tensor) -> Logits:
    return Logits(model.hidden_TD.index_select(0, rows), model.weight_VD, model.form, model.bias_V)


def _label_losses(model: Logits, rows: Tensor, label_T: Tensor, weight_M: Tensor | None = None) -> HeadOutput:
    """Compute the cross entropy of the labels at some rows; without weights, only their log-probabilities are of use."""
    part = _rows(model, rows)
    if weight_M is None:
        weight_M = torch.zeros_like(rows, dtype=torch.float32)
    return head_loss(
        part.hidden_TD,
        part.weight_VD,
        cross_entropy,
        Targets(label_T[rows], weight_M),
        form=part.form,
        bias_V=part.bias_V,
    )
