"""grpo: a model learns from rewards on its own completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from distill import models
from distill.compute.tally import tally_cost
from distill.recipe import GrpoStage
from distill.records import draw_seed
from distill.stages.budget import budget_of
from distill.stages.context import Context, Result
from distill.stages.inputs.resolve import resolve_objective, resolve_rewards
from distill.stages.inputs.student import load_student, save_student
from distill.stages.rollouts import Progress, Samples, open_sampler, policy_metrics
from distill.stages.snapshots import keep_snapshots
from distill.tasks.combined_reward import Rewards
from distill.training import loop
from distill.training.rl.reward_rollout import Rollout, Rollouts

FIRST_REWARD = 5
"""How many times the limit a reward's first call may take: it may have a model to load."""
SHOWN = 3
"""Groups of a rollout of which completions are shown."""
WATCHED = ("reward", "length", "clipped_ratio", "frac_reward_zero_std", "entropy", "kl_ref", "kl_engine")


def run(config: GrpoStage, context: Context) -> Result:
    where = f"stages.{context.name}"
    objective = resolve_objective(config, where)
    rewards = Rewards(
        resolve_rewards(config, where),
        limit_s=config.reward_timeout,
        first_limit_s=FIRST_REWARD * config.reward_timeout,
        max_failed=config.max_failed_rewards,
    )
    folder, trust = context.model_dir(config.model), context.trusts(config.model)
    tokenizer = models.load_tokenizer(folder, trust_remote_code=trust)
    with open_sampler(config, context, tokenizer) as (sampler, pool):
        model = load_student(config, context)
        samples = Samples(context, config)
        rollouts = Rollouts(
            sampler=sampler,
            config=config,
            objective=objective,
            rewards=rewards,
            seed=draw_seed(context.seed, context.name, "rollouts"),
            watch=lambda step, rollout: samples(step, lambda: _shown(rollout)),
        )
        length = budget_of(config, context) or loop.Length(config.steps or 0)
        progress = Progress(context, length, ("reward", "length"))
        tally = loop.train(
            model,
            rollouts.steps,
            objective,
            config,
            length=length,
            vocab_size=len(tokenizer),
            folder=context.folder,
            name=context.name,
            show=progress,
            keep=keep_snapshots(config, context),
        )
        progress.close()
    fingerprint, shape = save_student(model, tokenizer, config, context)
    metrics = policy_metrics(context, tally, pool, WATCHED)
    metrics["rewards_failed"] = rewards.failures
    return Result(tally_cost(config, shape, tally), metrics, fingerprint)


def _shown(rollout: Rollout) -> list[Mapping[str, Any]]:
    """Of the first groups: the completion of the highest advantage, and the last one."""
    rows: list[Mapping[str, Any]] = []
    for sampled in rollout.sampled[:SHOWN]:
        written = sampled.written
        best = int(np.argmax(sampled.advantage))
        for n in dict.fromkeys((best, len(written.group) - 1)):
            row = {
                "problem_id": written.prompt.problem.problem_id,
                "question": written.prompt.problem.question,
                "completion": written.group.texts[n],
                "finished": written.group.finished[n],
                "reward": sampled.scores.total[n],
                "rewards": {name: scores[n] for name, scores in sampled.scores.parts.items()},
                "advantage": float(sampled.advantage[n]),
            }
            rows.append(row)
    return rows
