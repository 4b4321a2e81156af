"""grpo: train a model by reinforcement learning with rewards on its own completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from distill import models, world
from distill.compute.flops import ModelShape
from distill.compute.training_cost import attention_share, training_cost
from distill.recipe import GrpoStage
from distill.records import draw_seed
from distill.stages import beside
from distill.stages.budget import budget_of
from distill.stages.context import Context, Result
from distill.stages.inputs.forward_proof import prove_forward
from distill.stages.inputs.named_rewards import combined_reward
from distill.stages.inputs.resolve import resolve_objective
from distill.stages.inputs.student import load_student, save_student
from distill.stages.policy_metrics import LOGGED_GROUPS, CompletionLog, PolicyProgress, policy_metrics
from distill.stages.policy_sampling import open_policy_sampler, read_prompts
from distill.stages.snapshots import keep_snapshots
from distill.stages.sync_proof import prove_sync
from distill.training import loop
from distill.training.rl.reward_rollout import RewardRollouts, Rollout
from distill.training.step import Length

WATCHED = ("reward", "length", "clipped_ratio", "frac_reward_zero_std", "entropy", "kl_ref", "kl_engine")


def run(config: GrpoStage, context: Context) -> Result:
    where = f"stages.{context.name}"
    objective = resolve_objective(config, where)
    rewards = combined_reward(config, where)
    folder, trust = context.model_dir(config.model), context.trusts(config.model)
    tokenizer = models.load_tokenizer(folder, trust_remote_code=trust)
    vocab_size = models.vocabulary_size(tokenizer, models.config_of(folder))
    read = pool, _, max_model_len = read_prompts(config, context, tokenizer)
    settings, _ = beside.shared_engines(config, context, max_model_len, reference=objective.reference)
    model = beside.on_device(load_student(config, context), config)
    plan = prove_forward(model, config.model, vocab_size, context, max_model_len)
    with open_policy_sampler(config, context, tokenizer, settings, read) as sampler:
        prove_sync(sampler.engine, model, vocab_size, context, sleeps=config.engine.sleep)
        log = CompletionLog(context, config)
        rollouts = RewardRollouts(
            sampler=sampler,
            config=config,
            objective=objective,
            rewards=rewards,
            seed=draw_seed(context.seed, context.name, "rollouts"),
            on_rollout=lambda step, rollout: log(step, lambda: _logged(rollout)),
            attention=attention_share(ModelShape.from_config(models.config_of(folder))),
            journal=sampler.journal,
        )
        length = budget_of(config, context) or Length(config.steps or 0)
        progress = PolicyProgress(context, length, ("reward", "length"))
        counts = loop.train(
            model,
            rollouts.steps,
            objective,
            config,
            length=length,
            vocab_size=vocab_size,
            folder=context.folder,
            plan=plan,
            show=progress,
            keep=keep_snapshots(config, context),
            carried=sampler.journal,
            say=context.say,
        )
        progress.close()
    fingerprint, shape = save_student(model, tokenizer, config, context)
    metrics = policy_metrics(context, counts, pool.too_long, WATCHED)
    failed = world.gather(rewards.failures)
    metrics["rewards_failed"] = {name: sum(each.get(name, 0) for each in failed) for name in rewards.failures}
    return Result(training_cost(config, shape, counts), metrics, fingerprint)


def _logged(rollout: Rollout) -> list[Mapping[str, Any]]:
    """Return, for the first groups, the completion of the highest advantage and the last one."""
    rows: list[Mapping[str, Any]] = []
    for scored in rollout.groups[:LOGGED_GROUPS]:
        problem, group = scored.graded.prompt.problem, scored.graded.group
        best = int(np.argmax(scored.advantage))
        for n in dict.fromkeys((best, len(group) - 1)):
            row = {
                "problem_id": problem.problem_id,
                "question": problem.question,
                "completion": group.texts[n],
                "finished": group.finished[n],
                "reward": scored.scores.total[n],
                "rewards": {name: values[n] for name, values in scored.scores.parts.items()},
                "advantage": float(scored.advantage[n]),
            }
            rows.append(row)
    return rows
