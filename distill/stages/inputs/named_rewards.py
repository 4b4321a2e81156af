"""Find the rewards that a stage names, check their options, and combine them with the stage's limits."""

from __future__ import annotations

from distill import plug
from distill.recipe import EvalStage, GenerateStage, GrpoStage
from distill.records import Reward
from distill.tasks.combined_reward import CombinedReward

REWARDS = "distill.tasks.rewards"
FIRST_CALL = 5
"""The factor by which a reward's first call may exceed the limit: it may have to load a model."""


def resolve_rewards(config: GenerateStage | GrpoStage, where: str) -> list[tuple[str, float, Reward]]:
    """Return (name, weight, function) of each reward. Raises UserError for an unknown reward or a wrong option."""
    return [
        (
            reward.fn.rpartition(":")[2],
            reward.weight,
            plug.bind(reward.fn, reward.options, REWARDS, f"{where}.rewards.{number}"),
        )
        for number, reward in enumerate(config.rewards)
    ]


def named_rewards(config: GenerateStage | EvalStage, where: str) -> CombinedReward | None:
    """Return the rewards of a stage that samples traces, combined; None if it names none."""
    return combined_reward(config, where) if isinstance(config, GenerateStage) and config.rewards else None


def combined_reward(config: GenerateStage | GrpoStage, where: str) -> CombinedReward:
    """Return the stage's rewards combined, with the stage's limits."""
    return CombinedReward(
        resolve_rewards(config, where),
        limit_s=config.reward_timeout,
        first_limit_s=FIRST_CALL * config.reward_timeout,
        max_failed=config.max_failed_rewards,
    )
