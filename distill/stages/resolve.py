"""The plugs that a stage names, found and with their options checked; loads no model."""

from __future__ import annotations

from distill import plug
from distill.recipe import GrpoStage
from distill.records import Reward
from distill.training.objective import PolicyObjective

OBJECTIVES = "distill.training.objectives"
REWARDS = "distill.tasks.rewards"


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
