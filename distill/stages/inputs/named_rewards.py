"""Look up the rewards that a stage names, check their options, and combine them into one weighted reward."""

from __future__ import annotations

from distill import plug
from distill.recipe import GenerateStage, GrpoStage
from distill.records import Reward
from distill.tasks.combined_reward import CombinedReward

REWARDS = "distill.tasks.rewards"
FIRST_CALL = 5
"""Factor on the time limit for a reward's first call, which may have to load a model."""


def resolve_rewards(config: GenerateStage | GrpoStage, where: str) -> list[tuple[str, float, Reward]]:
    """(name, weight, function) of each reward. Raises UserError for an unknown reward or a wrong option."""
    return [
        (
            reward.fn.rpartition(":")[2],
            reward.weight,
            plug.bind(reward.fn, reward.options, REWARDS, f"{where}.rewards.{number}"),
        )
        for number, reward in enumerate(config.rewards)
    ]


def combined_reward(config: GenerateStage | GrpoStage, where: str) -> CombinedReward:
    """The stage's rewards combined into one, with the stage's limits on time and failures."""
    return CombinedReward(
        resolve_rewards(config, where),
        limit_s=config.reward_timeout,
        first_limit_s=FIRST_CALL * config.reward_timeout,
        max_failed=config.max_failed_rewards,
    )
