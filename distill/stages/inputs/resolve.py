"""Find the losses, objectives and teachers that a stage names, and check their options."""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from distill import models, plug
from distill.recipe import GrpoStage, OnPolicyStage, TrainStage, teachers_of
from distill.records import Template, UserError
from distill.stages.inputs import own_traces
from distill.stages.inputs.learned_tokens import row_choice
from distill.stages.inputs.score_inputs import template_of
from distill.stages.inputs.tails import check_tail
from distill.training.loss import sparse
from distill.training.loss.cross_tokenizer.alignment import VocabularyMap
from distill.training.loss.head import LossFn
from distill.training.loss.metrics import distribution_metrics
from distill.training.loss.multi_teacher import over_teachers
from distill.training.loss.objective import (
    WEIGHT_ONE,
    WEIGHT_ZERO,
    CrossTokenizerObjective,
    DenseObjective,
    Objective,
    SampledTeacherObjective,
    StoredObjective,
    TeacherTopObjective,
    label_nll,
)
from distill.training.loss.own_traces import OwnTracesObjective, own_trace_metrics, prefix_log_ratio
from distill.training.loss.stored_targets import on_outcomes
from distill.training.loss.weight_schedule import LinearWeight

if TYPE_CHECKING:
    from pathlib import Path

    from distill.stages.context import Context
    from distill.training.policy import Teacher
    from distill.training.rl.advantages import PolicyObjective

Form = Literal["targets", "rows", "pair"]
OBJECTIVES = "distill.training.rl.policy_objectives"
LOSSES = "distill.training.loss.sparse"
DIVERGENCES = "distill.training.loss.divergences"
CROSS_TOKENIZER = "distill.training.loss.cross_tokenizer.losses"


TEACHER_ENTRIES = 64
"""The number of tokens per position that a custom loss for stored distributions gets from a teacher in the trainer."""


def is_cross_tokenizer(config: TrainStage | OnPolicyStage) -> bool:
    """Return whether the loss compares models with different tokenizers."""
    return _form(config.loss.fn, "loss") == "pair"


def _form(fn: str, where: str) -> Form:
    """Return a loss's form by its positional parameters: `(student, targets)`, `(logp, logq)` or `(pair)`.

    Raises UserError for an unknown loss, and for a user's loss with other parameters.
    """
    if ":" not in fn:
        if fn in plug.names(CROSS_TOKENIZER):
            return "pair"
        plug.find(fn, LOSSES, where)
        return "targets"
    function = plug.find(fn, LOSSES, where)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = tuple(name for name, p in inspect.signature(function).parameters.items() if p.kind in positional)
    if len(names) == 1:
        return "pair"
    if len(names) == 2:
        return "targets" if names[0] == "student" else "rows"
    raise UserError(
        f"{where}.fn: {fn!r} takes {names}; a loss takes (student, targets), a divergence takes (logp, logq), and a loss "
        "between models with different tokenizers takes (pair). Options must be keyword-only."
    )


def resolve_loss(config: TrainStage | OnPolicyStage, where: str, seed: int = 0) -> Objective:
    """Return the objective of the loss that a stage names: on stored targets, or with teachers in the trainer.

    seed: of the ids that a loss draws from its teachers. Raises UserError for an unknown loss, a wrong option, and a loss
    that does not fit the stage's data or teacher.
    """
    here = f"{where}.loss"
    choice = row_choice(config, where) if isinstance(config, TrainStage) else None
    objective = _objective(config, here, seed)
    if isinstance(config, TrainStage) and config.weights is not None and isinstance(objective, CrossTokenizerObjective):
        raise UserError(
            f"{where}.weights: {config.loss.fn} compares stretches of text, not tokens, so no token can be left out. Use a loss for "
            "one tokenizer, or remove weights."
        )
    if choice is None:
        return objective
    assert isinstance(objective, StoredObjective | DenseObjective)
    return replace(objective, choice=choice)


def _objective(config: TrainStage | OnPolicyStage, here: str, seed: int) -> Objective:
    form = _form(config.loss.fn, here)
    if form == "targets":
        check_tail(config, here.removesuffix(".loss"))
    in_trainer = bool(teachers_of(config.teacher)) and not _is_scored_by_engine(config)
    if form == "pair":
        return _cross_tokenizer(config, here, in_trainer)
    if config.loss.fn == "sampled_kd":
        return _sampled(config, here, in_trainer, seed)
    if in_trainer:
        return _with_teacher(config, here, form)
    loss: LossFn = plug.bind(config.loss.fn, config.loss.options, LOSSES, here)
    if own_traces.required(config):
        return _on_own_traces(config, here, loss)
    if form == "rows":
        loss = on_outcomes(loss)
    if isinstance(config, TrainStage) and isinstance(config.data, dict):
        total = sum(config.data.values())
        loss = over_teachers(loss, [share / total for share in config.data.values()])
    return StoredObjective(loss, distribution_metrics)


def _on_own_traces(config: TrainStage | OnPolicyStage, here: str, loss: LossFn) -> Objective:
    """Return the objective of a loss that weighs tokens or prefixes by importance."""
    is_gradient = config.loss.fn == own_traces.POLICY_GRADIENT
    if isinstance(config, OnPolicyStage):
        if not is_gradient:
            raise UserError(
                f"{here}.{own_traces.IMPORTANCE_CAP}: every rollout is of the present weights here; remove the key, which is for a train "
                "stage on traces that the model generated and a teacher scored."
            )
        return StoredObjective(loss, distribution_metrics)
    cap = plug.all_options(config.loss.fn, config.loss.options, LOSSES, here)[own_traces.IMPORTANCE_CAP]
    measure = functools.partial(own_trace_metrics, importance_cap=cap)
    return OwnTracesObjective(loss, measure, couple=None if is_gradient else prefix_log_ratio)


def _is_scored_by_engine(config: TrainStage | OnPolicyStage) -> bool:
    return isinstance(config, OnPolicyStage) and config.scoring == "engine"


def _cross_tokenizer(config: TrainStage | OnPolicyStage, here: str, in_trainer: bool) -> Objective:
    if not in_trainer or len(teachers_of(config.teacher)) != 1 or config.temperature != 1.0:
        raise UserError(
            f"{here}: {config.loss.fn} needs one teacher in the trainer, at temperature 1: name it in `teacher`"
            f"{' with scoring: trainer' if _is_scored_by_engine(config) else ''}."
        )
    return CrossTokenizerObjective(plug.bind(config.loss.fn, config.loss.options, CROSS_TOKENIZER, here))


def _sampled(config: TrainStage | OnPolicyStage, here: str, in_trainer: bool, seed: int) -> Objective:
    if not in_trainer or config.temperature != 1.0:
        raise UserError(
            f"{here}: sampled_kd samples tokens from the whole distribution of a teacher in the trainer, at temperature 1; "
            "stored distributions have only the most likely tokens. Name a teacher, or use forward_kl."
        )
    options = plug.all_options("sampled_kd", config.loss.options, LOSSES, here)
    loss = functools.partial(sparse.sampled_kd, **options)
    return SampledTeacherObjective(loss, label_nll, draws=options["draws"], seed=seed)


def _with_teacher(config: TrainStage | OnPolicyStage, here: str, form: Form) -> Objective:
    """Return the loss's divergence over the whole vocabulary, or a user's loss on the teacher's entries."""
    fn, options, kl, ce = config.loss.fn, config.loss.options, WEIGHT_ONE, WEIGHT_ZERO
    if fn == "ce_kl":
        given = plug.all_options(fn, options, LOSSES, here)
        kl, ce = (LinearWeight(given[name], given[f"final_{name}"]) for name in ("kl_weight", "ce_weight"))
        fn, options = "forward_kl", {}
    if form == "rows" or fn in plug.names(DIVERGENCES):
        return DenseObjective(plug.bind(fn, options, DIVERGENCES, here), config.temperature, kl, ce)
    if ":" not in fn:
        known = ", ".join(sorted([*plug.names(DIVERGENCES), *plug.names(CROSS_TOKENIZER), "ce_kl", "sampled_kd"]))
        raise UserError(f"{here}: {fn} cannot be used with a teacher in the trainer; the losses that can are: {known}.")
    if config.temperature != 1.0:
        raise UserError(
            f"{here}: {fn} gets the teacher's {TEACHER_ENTRIES} most likely tokens and the mass of the rest, which is possible "
            "only at temperature 1; write it as a divergence (logp, logq) to use the whole vocabulary at any temperature."
        )
    return TeacherTopObjective(plug.bind(fn, options, LOSSES, here), distribution_metrics, entries=TEACHER_ENTRIES)


def load_teachers(
    config: TrainStage | OnPolicyStage, context: Context, tokenizer: Any, max_tokens: int
) -> list[Teacher]:
    """Load the teachers in the trainer and prove their forward passes. max_tokens: of the longest trace. Raises UserError for a teacher whose tokenizer the loss does not support."""
    from distill.stages.inputs.forward_proof import prove_forward
    from distill.training.policy import Teacher

    teachers = []
    for name, share in teachers_of(config.teacher).items():
        folder = teacher_dir(name, config, context, tokenizer)
        context.phase(f"loading the teacher {name}")
        model = models.load(folder, dtype=config.dtype, trust_remote_code=context.trusts(name))
        size, shared = None, None
        if is_cross_tokenizer(config):
            theirs = models.load_tokenizer(folder, trust_remote_code=context.trusts(name))
            student = models.config_of(context.model_dir(config.model))
            size = min(len(theirs), model.config.vocab_size)
            template = shared_template(config, context)
            num = min(len(tokenizer), student["vocab_size"])
            shared = VocabularyMap.of_tokenizers(tokenizer, num, theirs, size, template)
        plan = prove_forward(
            model, name, size or min(len(tokenizer), model.config.get_text_config().vocab_size), context, max_tokens
        )
        teachers.append(Teacher(model, share, size, shared, plan))
    return teachers


def shared_template(config: TrainStage | OnPolicyStage, context: Context) -> Template:
    """The template under which the student and a teacher with another tokenizer read the stage's traces."""
    task = None if config.task is None else context.task(config.task)
    return template_of(config if isinstance(config, TrainStage) else None, task)


def teacher_dir(name: str, config: TrainStage | OnPolicyStage, context: Context, tokenizer: Any) -> Path:
    """Return a teacher's folder. Raises UserError if its tokenizer differs from the student's and the loss needs the same."""
    folder = context.model_dir(name)
    theirs = models.load_tokenizer(folder, trust_remote_code=context.trusts(name))
    same = models.tokenizer_fingerprint(theirs) == models.tokenizer_fingerprint(tokenizer)
    if not same and not is_cross_tokenizer(config):
        raise UserError(
            f"stages.{context.name}.loss: {config.loss.fn} compares token ids, but the teacher {name!r} has another tokenizer "
            f"({len(theirs)} tokens) than the student ({len(tokenizer)} tokens). Use a loss for different tokenizers, "
            f"{' or '.join(sorted(plug.names(CROSS_TOKENIZER)))}, or a teacher with the student's tokenizer."
        )
    return folder


def resolve_objective(config: GrpoStage, where: str) -> PolicyObjective:
    """Return the objective that a stage names. Raises UserError for an unknown objective or a wrong option."""
    make = plug.bind(config.objective.fn, config.objective.options, OBJECTIVES, f"{where}.objective")
    objective: PolicyObjective = make()
    return objective
