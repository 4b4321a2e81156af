"""What a stage names, found and with its options checked: losses, objectives, rewards, teachers."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from distill import models, plug
from distill.recipe import GrpoStage, OnPolicyStage, TrainStage, teachers_of
from distill.records import Reward, UserError
from distill.training.objective import Objective, Online, PolicyObjective

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from distill.stages.context import Context
    from distill.training.policy import Teacher

OBJECTIVES = "distill.training.objectives"
REWARDS = "distill.tasks.rewards"
LOSSES = "distill.training.losses"
DIVERGENCES = "distill.training.divergences"


def resolve_loss(config: TrainStage | OnPolicyStage, where: str) -> Objective:
    """The loss that a stage names: on stored targets, or, with teachers in the trainer, over the whole vocabulary.

    Raises UserError for an unknown one, a wrong option, and one that has no form with teachers in the trainer.
    """
    from distill.training.measures import watch

    fn, options = config.loss.fn, dict(config.loss.options)
    loss = plug.bind(fn, options, LOSSES, f"{where}.loss")
    asked_by_engine = isinstance(config, OnPolicyStage) and config.scoring == "engine"
    if config.teacher is None or asked_by_engine:
        return Objective(loss, watch)
    ce_weight, scale = 0.0, 1.0
    if fn == "ce_kl":
        weights = inspect.signature(loss).parameters  # with what the recipe says as defaults
        ce_weight, scale = weights["ce_weight"].default, weights["kl_weight"].default
        fn, options = "forward_kl", {}
    if fn not in plug.names(DIVERGENCES):
        known = ", ".join(sorted([*plug.names(DIVERGENCES), "ce_kl"]))
        raise UserError(
            f"{where}.loss: {fn} has no form with a teacher in the trainer; there are: {known}."
        )
    divergence = plug.bind(fn, options, DIVERGENCES, f"{where}.loss")

    def scaled(logp_TN: Tensor, logq_TN: Tensor) -> Tensor:
        compared: Tensor = scale * divergence(logp_TN, logq_TN)
        return compared

    return Objective(loss, watch, online=Online(scaled, config.temperature, ce_weight))


def load_teachers(
    config: TrainStage | OnPolicyStage, context: Context, tokenizer: Any
) -> list[Teacher]:
    """The models that teach in the trainer; raises UserError for one with another tokenizer than the student's."""
    from distill.training.policy import Teacher

    teachers = []
    for name, share in teachers_of(config.teacher).items():
        folder = teacher_dir(name, context, tokenizer)
        model = models.load(folder, dtype=config.dtype, trust_remote_code=context.trusts(name))
        teachers.append(Teacher(model, share))
    return teachers


def teacher_dir(name: str, context: Context, tokenizer: Any) -> Path:
    """Where a teacher is; raises UserError for one with another tokenizer than the student's."""
    folder = context.model_dir(name)
    theirs = models.load_tokenizer(folder, trust_remote_code=context.trusts(name))
    written_by = models.tokenizer_fingerprint(theirs)
    where = f"stages.{context.name}.teacher"
    models.check_same_tokenizer(written_by, len(theirs), tokenizer, where)
    return folder


def resolve_objective(config: GrpoStage, where: str) -> PolicyObjective:
    """The objective that a stage names; raises UserError for an unknown one or a wrong option."""
    make = plug.bind(
        config.objective.fn, config.objective.options, OBJECTIVES, f"{where}.objective"
    )
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
