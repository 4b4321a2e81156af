"""Packed batches: tokens with everything that a loss may need, aligned by position."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Packed tokens and everything a loss may need, aligned: row t belongs to the input token ids_T[t].

    The shift is already done: label_T[t] is the token after ids_T[t], and the teacher's row t is its
    distribution over that same next token. weight_T is 0 where nothing is learned (prompts, the last token of
    a trace). Arrays are numpy as packed, torch tensors after `to_torch`.

    ids_T, position_T, label_T   int64 [T]; positions restart at each trace
    doc_offsets                  int64 [N+1]; a token sees its own doc and that doc's parents, nothing else
    parent                       int64 [N]: the doc that a doc continues and sees whole, with that doc's own parents;
                                 -1 = none. Docs of traces come first, in the order of trace_ids, then shared prompt
                                 prefixes
    weight_T                     float32 [T]; the loss is sum(weight * loss_T) / denominator
    place_T                      int64 [T]: the index of label_T in its completion, from 0; 0 where the weight is 0
    denominator                  of the whole optimiser step: all micro-batches on all ranks
    teacher_ids_TK               int64 [T, K], -1 = no entry;  teacher_logp_TK float32, -inf there
    teacher_tail_T               float32 [T], log of the teacher's mass outside teacher_ids_TK
    each_logp_TMK, each_tail_TM  float32 [T, M, K], [T, M]: of each of several teachers, where teacher_* are their mixture
    draw_ids_TN, draw_logp_TN    int64 [T, N], -1 = none; float32: ids drawn from the teacher's tail (an id twice counts twice) and
                                 the teacher's log-probabilities of them;  draw_mass_T float32 [T]: the tail's mass for a draw
    teacher_label_T              float32 [T]: the log-probability of label_T under the model that wrote or scored the trace
    advantage_T, old_logp_T, ref_logp_T, engine_logp_T   float32 [T], of label_T; rollouts only
    progress                     share of the steps done before this one: 0 at the first, 1 at the last
    cross_tokenizer              the same texts re-tokenised for a teacher with another tokenizer
    """

    ids_T: Any
    position_T: Any
    doc_offsets: Any
    label_T: Any
    weight_T: Any
    denominator: float
    trace_ids: tuple[str, ...]
    parent: Any = None
    place_T: Any = None
    teacher_ids_TK: Any = None
    teacher_logp_TK: Any = None
    teacher_tail_T: Any = None
    each_logp_TMK: Any = None
    each_tail_TM: Any = None
    draw_ids_TN: Any = None
    draw_logp_TN: Any = None
    draw_mass_T: Any = None
    teacher_label_T: Any = None
    advantage_T: Any = None
    old_logp_T: Any = None
    ref_logp_T: Any = None
    engine_logp_T: Any = None
    progress: float = 0.0
    cross_tokenizer: CrossTokenizerBatch | None = None

    @property
    def squared_lengths(self) -> int:
        """Sum over the docs (numpy) of length^2 + 2 * length * tokens of its parents; attention's cost is in proportion.

        position_T is 0 at the start of a doc without a parent, else the number of tokens before it.
        """
        lengths, before = np.diff(self.doc_offsets), self.position_T[self.doc_offsets[:-1]]
        return int((lengths**2 + 2 * lengths * before).sum())

    def to_torch(self, device: str | torch.device = "cpu") -> Batch:
        """Return the same batch with torch tensors on a device."""
        return Batch(**_moved(self, device))


@dataclass(frozen=True, slots=True, eq=False)
class CrossTokenizerBatch:
    """A batch re-tokenised for a teacher with another tokenizer, and the byte positions where both tokenizers cut.

    A span lies between two such cuts; there are G. Rows index the tokens that have a weight, in order, on the student's or
    the teacher's side. Numpy as packed, torch tensors after `to_torch`.

    batch: in the teacher's tokens; rows int64: its tokens that have a weight
    student_start_G, teacher_start_G int64: the row of each side's first token in a span
    split_G bool: whether either side has more than one token in a span
    student_piece_M, student_span_M; teacher_piece_N, teacher_span_N int64: rows of the tokens in split spans, and their span
    weight_G float32; the loss is sum(weight * loss_G) / denominator, of the whole optimiser step
    """

    batch: Batch
    rows: Any
    student_start_G: Any
    teacher_start_G: Any
    split_G: Any
    student_piece_M: Any
    student_span_M: Any
    teacher_piece_N: Any
    teacher_span_N: Any
    weight_G: Any
    denominator: float

    def to_torch(self, device: str | torch.device = "cpu") -> CrossTokenizerBatch:
        """Return the same with torch tensors on a device."""
        return CrossTokenizerBatch(**_moved(self, device))


def _moved(record: Batch | CrossTokenizerBatch, device: str | torch.device) -> dict[str, Any]:
    """Return a record's fields, with numpy arrays as torch tensors on a device; doc boundaries and parents stay on the CPU.

    The layout of the docs is made from those: reading them back from a GPU would wait for all that it has to do.
    """
    moved: dict[str, Any] = {}
    for f in fields(record):
        value = getattr(record, f.name)
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value).to("cpu" if f.name in ("doc_offsets", "parent") else device)
        elif isinstance(value, Batch | CrossTokenizerBatch):
            value = value.to_torch(device)
        moved[f.name] = value
    return moved
