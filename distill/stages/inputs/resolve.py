"""What a stage names, found and with its options checked: losses, objectives, rewards, teachers."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from distill import models, plug
from distill.recipe import GrpoStage, OnPolicyStage, TrainStage, teachers_of
from distill.records import Reward, UserError
from distill.training.loss import sparse
from distill.training.loss.cross_tokenizer.alignment import VocabularyMap
from distill.training.loss.multi_teacher import over_teachers
from distill.training.loss.objective import (
    FULL,
    NONE,
    Drawn,
    Objective,
    Online,
    PolicyObjective,
    label_nll,
)
from distill.training.loss.weight_schedule import LinearWeight

if TYPE_CHECKING:
    from pathlib import Path

    from distill.stages.context import Context
    from distill.training.policy import Teacher

OBJECTIVES = "distill.training.rl.objectives"
REWARDS = "distill.tasks.rewards"
LOSSES = "distill.training.loss.sparse"
DIVERGENCES = "distill.training.loss.divergences"
UNLIKE = "distill.training.loss.cross_tokenizer.losses"


def is_unlike(config: TrainStage | OnPolicyStage) -> bool:
    """Whether the loss is one between models with different tokenizers."""
    return config.loss.fn in plug.names(UNLIKE)


def resolve_loss(config: TrainStage | OnPolicyStage, where: str, seed: int = 0) -> Objective:
    """The loss that a stage names: on stored targets, or, with teachers in the trainer, over the whole vocabulary.

    seed: of the ids that a loss draws from its teachers.

    Raises UserError for an unknown one, a wrong option, and one that has no form with teachers in the trainer.
    """
    from distill.training.loss.metrics import watch

    fn, options = config.loss.fn, dict(config.loss.options)
    asked_by_engine = isinstance(config, OnPolicyStage) and config.scoring == "engine"
    if is_unlike(config):
        if asked_by_engine or len(teachers_of(config.teacher)) != 1 or config.temperature != 1.0:
            raise UserError(
                f"{where}.loss: {fn} compares with one teacher in the trainer, at temperature 1: name it in `teacher`"
                f"{' with scoring: trainer' if asked_by_engine else ''}."
            )
        unlike = plug.bind(fn, options, UNLIKE, f"{where}.loss")
        return Objective(sparse.cross_entropy, unlike=unlike)
    loss = plug.bind(fn, options, LOSSES, f"{where}.loss")
    if isinstance(config, TrainStage) and isinstance(config.data, dict):
        total = sum(config.data.values())
        loss = over_teachers(loss, [share / total for share in config.data.values()])
    if plug.find(fn, LOSSES) is sparse.sampled_kd:
        if config.teacher is None or asked_by_engine or config.temperature != 1.0:
            raise UserError(
                f"{where}.loss: sampled_kd draws from the whole distribution of a teacher in the trainer, at temperature 1; "
                "stored entries are the likeliest, not draws. Name a teacher, or use forward_kl."
            )
        draws = inspect.signature(loss).parameters["draws"].default
        return Objective(loss, label_nll, drawn=Drawn(draws, seed))
    if config.teacher is None or asked_by_engine:
        return Objective(loss, watch)
    kl, ce = FULL, NONE
    if fn == "ce_kl":
        given = inspect.signature(loss).parameters  # with what the recipe says as defaults
        kl, ce = (
            LinearWeight(given[name].default, given[f"final_{name}"].default) for name in ("kl_weight", "ce_weight")
        )
        fn, options = "forward_kl", {}
    if fn not in plug.names(DIVERGENCES):
        known = ", ".join(sorted([*plug.names(DIVERGENCES), *plug.names(UNLIKE), "ce_kl", "sampled_kd"]))
        raise UserError(f"{where}.loss: {fn} has no form with a teacher in the trainer; there are: {known}.")
    divergence = plug.bind(fn, options, DIVERGENCES, f"{where}.loss")

    return Objective(loss, watch, online=Online(divergence, config.temperature, kl, ce))


def load_teachers(config: TrainStage | OnPolicyStage, context: Context, tokenizer: Any) -> list[Teacher]:
    """The models that teach in the trainer; raises UserError for one whose tokenizer the loss cannot do with."""
    from distill.training.policy import Teacher

    teachers = []
    for name, share in teachers_of(config.teacher).items():
        folder = teacher_dir(name, config, context, tokenizer)
        context.phase(f"loading the teacher {name}")
        model = models.load(folder, dtype=config.dtype, trust_remote_code=context.trusts(name))
        size, shared = None, None
        if is_unlike(config):
            theirs = models.load_tokenizer(folder, trust_remote_code=context.trusts(name))
            student = models.config_of(context.model_dir(config.model))
            size = min(len(theirs), model.config.vocab_size)
            shared = VocabularyMap.of_tokenizers(tokenizer, min(len(tokenizer), student["vocab_size"]), theirs, size)
        teachers.append(Teacher(model, share, size, shared))
    return teachers


def teacher_dir(name: str, config: TrainStage | OnPolicyStage, context: Context, tokenizer: Any) -> Path:
    """Where a teacher is; raises UserError for one with another tokenizer than the student's, unless the loss is made for that."""
    folder = context.model_dir(name)
    theirs = models.load_tokenizer(folder, trust_remote_code=context.trusts(name))
    same = models.tokenizer_fingerprint(theirs) == models.tokenizer_fingerprint(tokenizer)
    if not same and not is_unlike(config):
        raise UserError(
            f"stages.{context.name}.loss: {config.loss.fn} compares ids, and the teacher {name!r} has another tokenizer "
            f"({len(theirs)} tokens) than the student ({len(tokenizer)} tokens). Use one of the losses that compare by text, "
            f"{' or '.join(sorted(plug.names(UNLIKE)))}, or a teacher that shares the student's tokenizer."
        )
    return folder


def resolve_objective(config: GrpoStage, where: str) -> PolicyObjective:
    """The objective that a stage names; raises UserError for an unknown one or a wrong option."""
    make = plug.bind(config.objective.fn, config.objective.options, OBJECTIVES, f"{where}.objective")
    objective: PolicyObjective = make()
    return objective


def resolve_rewards(config: GrpoStage, where: str) -> list[tuple[str, float, Reward]]:
    """(name, weight, function) of each reward; raises UserError for an unknown one or a wrong option."""
    return [
        (
            reward.fn.rpartition(":")[2],
            reward.weight,
            plug.bind(reward.fn, reward.options, REWARDS, f"{where}.rewards.{number}"),
        )
        for number, reward in enumerate(config.rewards)
    ]
