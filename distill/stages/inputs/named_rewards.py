"""The rewards that a stage names, found and with their options checked, and as one that keeps the stage's limits."""

from __future__ import annotations

from distill import plug
from distill.recipe import GenerateStage, GrpoStage
from distill.records import Reward
from distill.tasks.combined_reward import CombinedReward

REWARDS = "distill.tasks.rewards"
FIRST_CALL = 5
"""How many times the limit a reward's first call may take: it may have a model to load."""


def resolve_rewards(config: GenerateStage | GrpoStage, where: str) -> list[tuple[str, float, Reward]]:
    """(name, weight, function) of each reward; raises UserError for an unknown one or a wrong option."""
    return [
        (
            reward.fn.rpartition(":")[2],
            reward.weight,
            plug.bind(reward.fn, reward.options, REWARDS, f"{where}.rewards.{number}"),
        )
        for number, reward in enumerate(config.rewards)
    ]


def combined_reward(config: GenerateStage | GrpoStage, where: str) -> CombinedReward:
    """The stage's rewards as one, with the stage's limits."""
    return CombinedReward(
        resolve_rewards(config, where),
        limit_s=config.reward_timeout,
        first_limit_s=FIRST_CALL * config.reward_timeout,
        max_failed=config.max_failed_rewards,
    )
