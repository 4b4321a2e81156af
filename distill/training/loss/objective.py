"""The objectives that the loop minimises, one class a kind of loss, each with its own forward pass.

    StoredObjective           a loss on the student's K+1 numbers and what is stored: labels, distributions, rewards
    TeacherTopObjective       the same loss on the top entries of a teacher in the trainer, computed at every step
    SampledTeacherObjective   the same loss on ids drawn from a teacher in the trainer
    DenseObjective            a divergence over the whole vocabulary, with teachers in the trainer
    CrossTokenizerObjective   a comparison with a teacher in the trainer that has another tokenizer

In: the module with the student and its teachers, a batch, the rows that have a weight. Out: the weighted sum of the loss,
differentiable, and the metrics to log.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from distill.records import draw_seed
from distill.training.batch import Batch
from distill.training.loss.cross_tokenizer.losses import Pair
from distill.training.loss.dense import Divergence, dense_loss, sample_ids, top_entries
from distill.training.loss.head import HeadOutput, LossFn, Measure, Student, Targets, head_loss
from distill.training.loss.metrics import by_position, full_vocabulary_metrics
from distill.training.loss.row_choice import RowChoice
from distill.training.loss.weight_schedule import LinearWeight

if TYPE_CHECKING:
    from distill.training.policy import StudentModule

Couple = Callable[[Tensor, Targets, Tensor], Tensor]
"""(log-probs of the labels [T], targets, trace index [T]) -> a value of the whole trace at each of its tokens, [T] or [T, C]."""
WEIGHT_ONE, WEIGHT_ZERO = LinearWeight(1.0), LinearWeight(0.0)


@dataclass(frozen=True, slots=True)
class Output:
    """The result of an objective. loss: the weighted sum, differentiable. measures (metrics) and weight_T: [T], detached.

    chosen: the indices of the T tokens among the rows that the objective got, if it chose some of them; None = all.
    """

    loss: Tensor
    measures: Mapping[str, Tensor]
    weight_T: Tensor
    chosen: Tensor | None = None


class Objective(Protocol):
    """One kind of loss. reference: whether it needs the log-probabilities of a frozen reference model."""

    @property
    def reference(self) -> bool: ...

    def forward(self, module: StudentModule, batch: Batch, rows: Tensor) -> Output:
        """Compute the loss at the tokens `rows` [T] of a batch."""
        ...


def label_nll(student: Student, targets: Targets) -> dict[str, Tensor]:
    """-log q(label), nats."""
    return {"label_nll": -student.label_T}


@dataclass(frozen=True, slots=True)
class StoredObjective:
    """A loss on the batch's own streams. loss: unreduced, [T]. measure: metrics a token, averaged with the loss's weights.

    couple: a first pass over whole traces, for losses that couple a trace's tokens; it fills Targets.coupled_T.
    couples_engine: whether it is made before the first update too, when the policy is its own old one. choice: which tokens
    are learned, if that is decided in the step; None = all that have a weight.
    """

    loss: LossFn
    measure: Measure = label_nll
    couple: Couple | None = None
    reference: bool = False
    choice: RowChoice | None = None
    couples_engine: bool = False

    def couples(self, targets: Targets) -> bool:
        """Whether the loss needs the first pass over whole traces for these tokens."""
        engine = self.couples_engine and targets.engine_logp_T is not None
        return self.couple is not None and (engine or targets.old_logp_T is not None)

    def forward(self, module: StudentModule, batch: Batch, rows: Tensor) -> Output:
        hidden_TD, targets = module.hidden(batch, rows), Targets.of(batch, rows)
        targets = self.with_teacher(module, batch, rows, targets)
        chosen = None
        if self.choice is not None:
            chosen = self.choice.by_targets(module.logits(hidden_TD), targets, batch, rows)
            hidden_TD, targets, rows = hidden_TD.index_select(0, chosen), targets.select(chosen), rows[chosen]
        if self.couple is not None and self.couples(targets):
            trace_T = torch.searchsorted(batch.doc_offsets.to(rows.device), rows, right=True) - 1
            coupled_T = self.couple(module.label_logp_from_hidden(hidden_TD, targets), targets, trace_T)
            targets = replace(targets, coupled_T=coupled_T)
        weight_VD, bias_V = module.output_head()
        out = head_loss(
            hidden_TD, weight_VD, self.loss, targets, form=module.plan.form, bias_V=bias_V, measure=self.measure
        )
        return Output(out.loss, out.measures, targets.weight_T, chosen)

    def with_teacher(self, module: StudentModule, batch: Batch, rows: Tensor, targets: Targets) -> Targets:
        """Add to the targets what the batch does not hold."""
        return targets


@dataclass(frozen=True, slots=True)
class TeacherTopObjective(StoredObjective):
    """A loss for stored distributions, on the `entries` likeliest ids (and the tail) of teachers in the trainer."""

    entries: int = 64

    def with_teacher(self, module: StudentModule, batch: Batch, rows: Tensor, targets: Targets) -> Targets:
        ids_TK, logp_TK, tail_T = top_entries(module.teacher_logits(batch, rows), self.entries)
        return replace(targets, teacher_ids_TK=ids_TK, teacher_logp_TK=logp_TK, teacher_tail_T=tail_T)


@dataclass(frozen=True, slots=True)
class SampledTeacherObjective(StoredObjective):
    """A loss on ids drawn from the teachers' mixture, `draws` a token; the seed, trace ids and step decide them."""

    draws: int = 64
    seed: int = 0

    def with_teacher(self, module: StudentModule, batch: Batch, rows: Tensor, targets: Targets) -> Targets:
        seed = draw_seed(self.seed, batch.progress, *batch.trace_ids)
        generator = torch.Generator(rows.device).manual_seed(seed)
        ids_TK, log_count_TK = sample_ids(module.teacher_logits(batch, rows), self.draws, generator)
        nothing_T = torch.full_like(log_count_TK[:, 0], -torch.inf)
        return replace(targets, teacher_ids_TK=ids_TK, teacher_logp_TK=log_count_TK, teacher_tail_T=nothing_T)


@dataclass(frozen=True, slots=True)
class DenseObjective:
    """kl * temperature^2 * divergence over the whole vocabulary + ce * -log q(label), with teachers in the trainer.

    choice: which tokens are learned, if that is decided in the step; None = all that have a weight.
    """

    divergence: Divergence
    temperature: float = 1.0
    kl: LinearWeight = WEIGHT_ONE
    ce: LinearWeight = WEIGHT_ZERO
    choice: RowChoice | None = None

    @property
    def reference(self) -> bool:
        return False

    def forward(self, module: StudentModule, batch: Batch, rows: Tensor) -> Output:
        student, targets = module.logits(module.hidden(batch, rows)), Targets.of(batch, rows)
        teachers, chosen = module.teacher_logits(batch, rows), None
        if self.choice is not None:
            chosen = self.choice.by_models(student, teachers, targets, batch, rows, self.temperature)
            student, *teachers = (
                replace(each, hidden_TD=each.hidden_TD.index_select(0, chosen)) for each in (student, *teachers)
            )
            targets = targets.select(chosen)
        out = dense_loss(
            student,
            teachers,
            self.divergence,
            targets,
            temperature=self.temperature,
            kl_weight=self.kl.at(batch.progress),
            ce_weight=self.ce.at(batch.progress),
            measure=full_vocabulary_metrics,
        )
        measures = {"label_nll": -out.label_logp_T, "divergence": out.loss_T, **out.measures}
        if "kl" in measures:  # not where there is no token at all
            measures |= by_position("kl", measures["kl"], targets.place_T)
        return Output(out.loss, measures, targets.weight_T, chosen)


@dataclass(frozen=True, slots=True)
class CrossTokenizerObjective:
    """A comparison with a teacher that reads the same texts re-tokenised."""

    loss: Callable[[Pair], HeadOutput]

    @property
    def reference(self) -> bool:
        return False

    def forward(self, module: StudentModule, batch: Batch, rows: Tensor) -> Output:
        hidden_TD, targets = module.hidden(batch, rows), Targets.of(batch, rows)
        (teacher,), spans = module.teachers, batch.cross_tokenizer
        assert spans is not None, "such a teacher's batches hold its tokens"
        assert teacher.shared is not None, "such a teacher comes with what its vocabulary shares"
        (theirs,) = module.teacher_logits(spans.batch, spans.rows)
        pair = Pair(
            module.logits(hidden_TD),
            theirs,
            targets.label_T,
            spans.batch.label_T[spans.rows],
            spans,
            teacher.shared,
        )
        out = self.loss(pair)
        assert targets.place_T is not None, "every packed batch has it"
        place_G = targets.place_T[spans.student_start_G]
        loss_G = out.loss_T.detach()
        measures = {
            "label_nll": -out.label_logp_T,
            "divergence": loss_G,
            **by_position("divergence", loss_G, place_G),
        }
        return Output(out.loss, measures, pair.weights)
