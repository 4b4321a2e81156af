"""The model in training, as the loop and a rollout source see it.

`StudentModule` is the model with an objective's loss on its head, one module that accelerate can wrap; `Policy` scores batches with the weights of the moment and of the reference, and hands the weights to an engine.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill import models
from distill.records import Array, Batch, draw_seed
from distill.training.attention import PACKED, Layout
from distill.training.loss.cross_tokenizer.alignment import VocabularyMap
from distill.training.loss.cross_tokenizer.losses import Pair
from distill.training.loss.dense import Logits, draw, online_head_loss
from distill.training.loss.head import HeadForm, Student, Targets, head_loss
from distill.training.loss.kernels.chunks import gathered
from distill.training.loss.metrics import by_place, watch_rows
from distill.training.loss.objective import Drawn, Objective, Online, Unlike

REFERENCE = "reference/"


@dataclass(frozen=True, slots=True)
class Teacher:
    """A model that teaches in the trainer, frozen, and its share of the mixture.

    vocab_size: its tokenizer's length, and shared: the tokens it has in common with the student; None for the student's own tokenizer.
    """

    model: Any
    share: float = 1.0
    vocab_size: int | None = None
    shared: VocabularyMap | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """loss: the weighted sum, differentiable. watched and weight_T [T]: by row, detached."""

    loss: Tensor
    watched: Mapping[str, Tensor]
    weight_T: Tensor


class StudentModule(nn.Module):
    """A causal language model with the loss on its head. The teachers are no part of it: nothing of theirs is trained or wrapped."""

    def __init__(
        self,
        model: Any,
        objective: Objective,
        vocab_size: int,
        teachers: Sequence[Teacher] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.vocab_size = vocab_size
        self.form = HeadForm.of(model.config, vocab_size)
        self.teachers = tuple(teachers)
        for each in (model, *(teacher.model for teacher in teachers)):
            _base(each).set_attn_implementation(PACKED)

    def forward(self, batch: Batch, rows: Tensor) -> Output:
        """rows: indices of the tokens that have a weight; only they reach the head."""
        hidden_TD, targets = self._hidden(self.model, batch, rows), Targets.of(batch, rows)
        if self.objective.online is not None:
            return self._beside_teachers(self.objective.online, hidden_TD, batch, rows, targets)
        if self.objective.unlike is not None:
            return self._beside_another(self.objective.unlike, hidden_TD, batch, targets)
        if self.objective.drawn is not None:
            targets = self._drawn(self.objective.drawn, batch, rows, targets)
        if self.objective.couple is not None and targets.old_logp_T is not None:
            logp_T = self._label_logp(hidden_TD, targets)
            trace_T = torch.searchsorted(batch.doc_offsets, rows, right=True) - 1
            targets = replace(targets, coupled_T=self.objective.couple(logp_T, targets, trace_T))
        head = _base(self.model).get_output_embeddings()
        out = head_loss(
            hidden_TD,
            head.weight,
            self.objective.loss,
            targets,
            form=self.form,
            bias_V=getattr(head, "bias", None),
            measure=self.objective.watch,
        )
        return Output(out.loss, out.measures, targets.weight_T)

    def _beside_teachers(
        self, online: Online, hidden_TD: Tensor, batch: Batch, rows: Tensor, targets: Targets
    ) -> Output:
        teachers = self._taught(batch, rows)
        out = online_head_loss(
            self._logits(self.model, hidden_TD),
            teachers,
            online.divergence,
            targets,
            temperature=online.temperature,
            kl_weight=online.kl.at(batch.progress),
            ce_weight=online.ce.at(batch.progress),
            measure=watch_rows,
        )
        watched = {"label_nll": -out.label_logp_T, "divergence": out.loss_T, **out.measures}
        if "kl" in watched:  # not where there is no token at all
            watched |= by_place("kl", watched["kl"], targets.place_T)
        return Output(out.loss, watched, targets.weight_T)

    def _drawn(self, drawn: Drawn, batch: Batch, rows: Tensor, targets: Targets) -> Targets:
        """The targets with ids drawn from the teachers."""
        seed = draw_seed(drawn.seed, batch.progress, *batch.trace_ids)
        generator = torch.Generator(rows.device).manual_seed(seed)
        ids_TK, log_count_TK = draw(self._taught(batch, rows), drawn.draws, generator)
        nothing_T = torch.full_like(log_count_TK[:, 0], -torch.inf)
        return replace(
            targets,
            teacher_ids_TK=ids_TK,
            teacher_logp_TK=log_count_TK,
            teacher_tail_T=nothing_T,
        )

    @torch.no_grad()
    def _taught(self, batch: Batch, rows: Tensor) -> list[Logits]:
        return [self._logits(t.model, self._hidden(t.model, batch, rows), t.share) for t in self.teachers]

    def _beside_another(self, unlike: Unlike, hidden_TD: Tensor, batch: Batch, targets: Targets) -> Output:
        """The teacher reads the same texts in its own tokens."""
        (teacher,), spans = self.teachers, batch.cross_tokenizer
        assert spans is not None, "such a teacher's batches come with its readings"
        assert teacher.shared is not None, "and it with what it shares"
        with torch.no_grad():
            theirs_TE = self._hidden(teacher.model, spans.batch, spans.rows)
        pair = Pair(
            self._logits(self.model, hidden_TD),
            self._logits(teacher.model, theirs_TE, vocab_size=teacher.vocab_size),
            targets.label_T,
            spans.batch.label_T[spans.rows],
            spans,
            teacher.shared,
        )
        out = unlike(pair)
        assert targets.place_T is not None, "every packed batch has it"
        place_G = targets.place_T[spans.student_start_G]
        loss_G = out.loss_T.detach()
        watched = {
            "label_nll": -out.label_logp_T,
            "divergence": loss_G,
            **by_place("divergence", loss_G, place_G),
        }
        return Output(out.loss, watched, pair.weights)

    def _logits(self, model: Any, hidden_TD: Tensor, share: float = 1.0, vocab_size: int | None = None) -> Logits:
        head = _base(model).get_output_embeddings()
        form = HeadForm.of(model.config, vocab_size or self.vocab_size)
        return Logits(hidden_TD, gathered(head.weight), form, getattr(head, "bias", None), share)

    @torch.no_grad()
    def label_logp(self, batch: Batch, rows: Tensor) -> Tensor:
        """Log-probability of the label at each of the rows, nats [rows]."""
        targets = Targets(batch.label_T[rows], batch.weight_T[rows])
        return self._label_logp(self._hidden(self.model, batch, rows), targets)

    @torch.no_grad()
    def _label_logp(self, hidden_TD: Tensor, targets: Targets) -> Tensor:
        head = _base(self.model).get_output_embeddings()
        bias_V = getattr(head, "bias", None)
        return head_loss(
            hidden_TD.detach(),
            head.weight.detach(),
            _label_only,
            targets,
            form=self.form,
            bias_V=None if bias_V is None else bias_V.detach(),
        ).label_logp_T

    @staticmethod
    def _hidden(model: Any, batch: Batch, rows: Tensor) -> Tensor:
        hidden_TD: Tensor = (
            _base(model)
            .get_decoder()(
                input_ids=batch.ids_T[None],
                position_ids=batch.position_T[None],
                use_cache=False,
                layout=Layout.of(batch.doc_offsets, batch.parent),
            )
            .last_hidden_state[0]
        )
        return hidden_TD.index_select(0, rows)


class Policy:
    """The model in training, for a rollout source.

    The reference is a copy of the model as it was at the start; under LoRA it is the model without its adapter.
    """

    def __init__(
        self, model: Any, student_module: Any, device: torch.device, objective: Objective, vocab_size: int
    ) -> None:
        self._model, self._student_module, self._device = model, student_module, device
        self._refreshed = False
        self._reference: StudentModule | None = None
        if objective.reference and not _is_adapted(model):
            frozen = copy.deepcopy(model).eval().requires_grad_(False)
            self._reference = StudentModule(frozen, objective, vocab_size).to(device)

    def logp(self, batch: Batch) -> Array:
        """Log-probability of the labels under the present weights, float32 [T]; 0 where the weight is."""
        return self._score(_unwrapped(self._student_module), batch)

    def reference_logp(self, batch: Batch) -> Array:
        """The same under the reference."""
        if self._reference is not None:
            return self._score(self._reference, batch)
        with self._model.disable_adapter():
            return self._score(_unwrapped(self._student_module), batch)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the checkpoint, tensor) of all weights, adapters merged in."""
        return models.exported_weights(self._model)

    def refresh_reference(self) -> None:
        """The reference becomes the policy of this moment."""
        assert self._reference is not None, "the recipe allows this with a reference of its own only"
        self._refreshed = True
        with torch.no_grad():
            for mine, theirs in zip(self._reference.model.parameters(), self._model.parameters(), strict=True):
                mine.copy_(theirs)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold besides the optimiser's: a reference that is no longer the start."""
        if not self._refreshed or self._reference is None:
            return {}
        named = self._reference.model.named_parameters()
        return {f"{REFERENCE}{name}": p.detach() for name, p in named}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        stored = {k[len(REFERENCE) :]: v for k, v in tensors.items() if k.startswith(REFERENCE)}
        if stored and self._reference is not None:
            self._refreshed = True
            with torch.no_grad():
                for name, parameter in self._reference.model.named_parameters():
                    parameter.copy_(stored[name])

    def _score(self, student_module: StudentModule, batch: Batch) -> Array:
        index = batch.weight_T.nonzero()[0]
        rows = torch.from_numpy(index).to(self._device)
        with _evaluating(student_module):
            found = student_module.label_logp(batch.to_torch(self._device), rows)
        logp_T = np.zeros(len(batch.ids_T), np.float32)
        logp_T[index] = found.float().cpu().numpy()
        return logp_T


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Without dropout inside."""
    before = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(before)


def _label_only(student: Student, targets: Targets) -> Tensor:
    return -student.label_T


def _base(model: Any) -> Any:
    return model.get_base_model() if _is_adapted(model) else model


def _is_adapted(model: Any) -> bool:
    return hasattr(model, "get_base_model")


def _unwrapped(student_module: Any) -> StudentModule:
    inner: StudentModule = getattr(student_module, "module", student_module)
    return inner
