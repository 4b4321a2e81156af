"""The model in training: `StudentModule` for the loop, `Policy` for sources of rollouts.

`StudentModule` is the model with an objective's loss on its output head, one module that `parallel.shard` can shard; so is
`TeacherModule`. `Policy` computes log-probabilities of batches under the current weights and the reference, and gives the
weights to an engine.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill import models
from distill.records import Array
from distill.training import parallel
from distill.training.batch import Batch
from distill.training.forward import ForwardPlan, base_model, is_adapted, with_vocab
from distill.training.layer_outputs import LayerOutputs
from distill.training.loss.cross_tokenizer.alignment import VocabularyMap
from distill.training.loss.dense import Logits
from distill.training.loss.head import Student, Targets, head_loss
from distill.training.loss.kernels.chunks import gathered
from distill.training.loss.objective import Objective, Output

REFERENCE_PREFIX = "reference/"


@dataclass(frozen=True, slots=True)
class Teacher:
    """A frozen teacher model in the trainer, and its share of the mixture.

    vocab_size: its tokenizer's length. shared: the tokens that it has in common with the student. Both are None for a
    teacher with the student's tokenizer. plan: how it is computed; None = as a Llama-like model.
    """

    model: Any
    share: float = 1.0
    vocab_size: int | None = None
    shared: VocabularyMap | None = None
    plan: ForwardPlan | None = None


class TeacherModule(nn.Module):
    """A frozen teacher with its plan; its forward pass gives the inputs of its logits."""

    def __init__(self, teacher: Teacher, student_vocab_size: int) -> None:
        super().__init__()
        self.model = teacher.model
        self.share, self.shared = teacher.share, teacher.shared
        plan = teacher.plan or ForwardPlan.of(teacher.model, student_vocab_size)
        self.plan = with_vocab(plan, min(teacher.vocab_size or student_vocab_size, _head_rows(teacher.model)))
        self.plan.apply(teacher.model)
        self.outputs: LayerOutputs | None = None

    @torch.no_grad()
    def forward(self, batch: Batch, rows: Tensor) -> Logits:
        """rows: indices of the tokens that have a weight. Fills `outputs`, if it is set."""
        hidden_TE = self.plan.hidden(self.model, batch, rows, self.outputs)
        return _logits(self.model, self.plan, hidden_TE, self.share)

    @torch.no_grad()
    def label_logp(self, batch: Batch, rows: Tensor) -> Tensor:
        """Return the label's log-probability at each of the rows, nats [rows]."""
        return label_logp(self.model, self.plan, batch, rows)


class StudentModule(nn.Module):
    """A causal language model with the loss on its head. Teachers are kept outside: they are not trained or sharded with it.

    plan: how the model is computed; None = as a Llama-like model.
    """

    def __init__(
        self,
        model: Any,
        objective: Objective,
        vocab_size: int,
        teachers: Sequence[Teacher] = (),
        plan: ForwardPlan | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.vocab_size = vocab_size
        self.plan = plan or ForwardPlan.of(model, vocab_size)
        self.plan.apply(model)
        self.teachers = tuple(TeacherModule(teacher, vocab_size) for teacher in teachers)
        self.outputs: LayerOutputs | None = None

    def forward(self, batch: Batch, rows: Tensor) -> Output:
        """rows: indices of the tokens that have a weight; only they reach the head."""
        return self.objective.forward(self, batch, rows)

    def hidden(self, batch: Batch, rows: Tensor) -> Tensor:
        """Return the student's last hidden states [rows, D] for the given rows of a packed batch. Fills `outputs`, if set."""
        return self.plan.hidden(self.model, batch, rows, self.outputs)

    def output_head(self) -> tuple[Tensor, Tensor | None]:
        """Return the student's output head: weight [V, D] and bias [V]."""
        return output_head(self.model)

    def logits(self, hidden_TD: Tensor) -> Logits:
        """Return the inputs of the student's logits."""
        return _logits(self.model, self.plan, hidden_TD, 1.0)

    def teacher_logits(self, batch: Batch, rows: Tensor) -> list[Logits]:
        """Return the inputs of every teacher's logits over the same tokens."""
        return [teacher(batch, rows) for teacher in self.teachers]

    @torch.no_grad()
    def label_logp(self, batch: Batch, rows: Tensor) -> Tensor:
        """Return the label's log-probability at each of the rows, nats [rows]."""
        return label_logp(self.model, self.plan, batch, rows)

    @torch.no_grad()
    def label_logp_from_hidden(self, hidden_TD: Tensor, targets: Targets) -> Tensor:
        """Return the labels' log-probabilities from hidden states, without a gradient, nats [T]."""
        return _label_logp_from_hidden(self.model, self.plan, hidden_TD, targets)


def output_head(model: Any) -> tuple[Tensor, Tensor | None]:
    """Return a model's output head: weight [V, D], with an adapter's part added, and bias [V]."""
    head = base_model(model).get_output_embeddings()
    return models.effective_weight(head), getattr(head, "bias", None)


@torch.no_grad()
def label_logp(model: Any, plan: ForwardPlan, batch: Batch, rows: Tensor) -> Tensor:
    """Return the label's log-probability under a model at the given rows of a packed batch, nats [rows]."""
    return _label_logp_from_hidden(
        model, plan, plan.hidden(model, batch, rows), Targets(batch.label_T[rows], batch.weight_T[rows])
    )


def _label_logp_from_hidden(model: Any, plan: ForwardPlan, hidden_TD: Tensor, targets: Targets) -> Tensor:
    weight_VD, bias_V = output_head(model)
    return head_loss(
        hidden_TD.detach(),
        weight_VD.detach(),
        _label_only,
        targets,
        form=plan.form,
        bias_V=None if bias_V is None else bias_V.detach(),
    ).label_logp_T


def _logits(model: Any, plan: ForwardPlan, hidden_TD: Tensor, share: float) -> Logits:
    weight_VD, bias_V = output_head(model)
    return Logits(hidden_TD, gathered(weight_VD), plan.form, bias_V, share)


def _head_rows(model: Any) -> int:
    return int(base_model(model).get_output_embeddings().weight.shape[0])


class Policy:
    """The model in training and its reference, as a source of rollouts uses them.

    The reference is a copy of the model as it was at the start; under LoRA it is the model without its adapter.
    """

    def __init__(self, module: StudentModule, reference: StudentModule | None, device: torch.device) -> None:
        self._module, self._reference, self._device = module, reference, device
        self._reference_synced = False

    @staticmethod
    def reference_of(module: StudentModule) -> StudentModule | None:
        """Copy the model as the reference, before it is sharded. None if the loss needs none or the model has an adapter."""
        if not module.objective.reference or is_adapted(module.model):
            return None
        frozen = copy.deepcopy(module.model).eval().requires_grad_(False)
        return StudentModule(frozen, module.objective, module.vocab_size, plan=module.plan)

    def logp(self, batch: Batch) -> Array:
        """Return the labels' log-probabilities under the current weights, float32 [T]; 0 where weight_T is 0."""
        return self._score(self._module, batch)

    def reference_logp(self, batch: Batch) -> Array:
        """Return the labels' log-probabilities under the reference, float32 [T]; 0 where weight_T is 0."""
        if self._reference is not None:
            return self._score(self._reference, batch)
        with self._module.model.disable_adapter():
            return self._score(self._module, batch)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name in the checkpoint, tensor) of all weights, with adapters merged in; shards are gathered one by one."""
        parallel.at_rest(self._module)
        return models.exported_weights(self._module.model)

    def sync_reference(self) -> None:
        """Copy the current weights into the reference."""
        assert self._reference is not None, "the recipe allows this with a reference of its own only"
        self._reference_synced = True
        with torch.no_grad():
            parallel.at_rest(self._module)
            parallel.at_rest(self._reference)
            theirs = self._module.model.parameters()
            for mine, current in zip(self._reference.model.parameters(), theirs, strict=True):
                mine.copy_(current)

    def state(self, *, every: bool = False) -> dict[str, Tensor]:
        """Return the tensors of a reference that was synced, which a checkpoint must hold; `every`: of any reference."""
        if self._reference is None or not (self._reference_synced or every):
            return {}
        parallel.at_rest(self._reference)
        named = self._reference.model.named_parameters()
        return {f"{REFERENCE_PREFIX}{name}": p.detach() for name, p in named}

    def loaded(self, names: Iterable[str]) -> None:
        """Take up the tensors of `state` that were read in place: a reference among them has been synced."""
        self._reference_synced = any(name.startswith(REFERENCE_PREFIX) for name in names)

    def _score(self, student_module: StudentModule, batch: Batch) -> Array:
        index = batch.weight_T.nonzero()[0]
        rows = torch.from_numpy(index).to(self._device)
        with _eval_mode(student_module):
            found = student_module.label_logp(batch.to_torch(self._device), rows)
        parallel.at_rest(student_module)
        logp_T = np.zeros(len(batch.ids_T), np.float32)
        logp_T[index] = found.float().cpu().numpy()
        return logp_T


@contextlib.contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Turn dropout off inside the context."""
    before = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(before)


def _label_only(student: Student, targets: Targets) -> Tensor:
    return -student.label_T
