"""grpo: a model learns from rewards on its own completions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill import engines, models
from distill.recipe import GrpoStage
from distill.records import Task, UserError, draw_seed
from distill.reports.flops import ModelShape
from distill.stages.context import Context, Result, save_model
from distill.stages.costs import tally_cost
from distill.stages.resolve import resolve_objective, resolve_rewards
from distill.stages.sampling import ROOM, completion_text, context_limit
from distill.tasks.scoring import Rewards
from distill.training import loop
from distill.training.rollout import Prompt, Rollout, Rollouts

MISMATCH_ALARM = 0.01
"""KL between engine and trainer, nats a token, above which the user is told."""
FIRST_REWARD = 5
"""How many times the limit a reward's first call may take: it may have a model to load."""
SHOWN = 3
"""Completions shown of a rollout."""


def run(config: GrpoStage, context: Context) -> Result:
    where = f"stages.{context.name}"
    objective = resolve_objective(config, where)
    rewards = Rewards(
        resolve_rewards(config, where),
        limit_s=config.reward_seconds,
        first_limit_s=FIRST_REWARD * config.reward_seconds,
        max_failed=config.max_failed_rewards,
    )
    folder, trust = context.model_dir(config.model), context.trusts(config.model)
    tokenizer = models.load_tokenizer(folder, trust_remote_code=trust)
    task = context.task(config.task)
    models.check_template(tokenizer, task.template, f"tasks.{config.task}")
    limit = context_limit(config.engine, folder)
    pool = PromptPool.of(config, context, task, tokenizer, limit)
    longest = max(len(prompt.ids) for prompt in pool.prompts) + config.sampling.max_tokens

    context.say(f"starting the {config.engine.fn} engine")
    engine = engines.open_engine(
        config.engine,
        folder,
        max_model_len=min(limit, -(-longest // ROOM) * ROOM),
        max_top_k=0,
    )
    try:
        model = models.load(folder, dtype=config.dtype, trust_remote_code=trust)
        if config.lora is not None:
            model = models.add_lora(model, config.lora)
        samples = Samples(context, config)
        rollouts = Rollouts(
            engine=engine,
            config=config,
            objective=objective,
            template=task.template,
            prompts=pool,
            judge=task.verify,
            decode=lambda ids: completion_text(tokenizer, ids),
            rewards=rewards,
            seed=draw_seed(context.seed, context.name, "rollouts"),
            watch=samples,
        )
        progress = Progress(context, config)
        tally = loop.train(
            model,
            rollouts.steps,
            objective,
            config,
            num_steps=config.steps,
            vocab_size=len(tokenizer),
            folder=context.folder,
            name=context.name,
            show=progress,
        )
        progress.close()
    finally:
        engine.close()
    if config.lora is not None:
        model = model.merge_and_unload()
    fingerprint = save_model(model, tokenizer, context.folder)
    shape = ModelShape.from_config(models.config_of(context.folder / "model"))
    metrics = _metrics(context.folder, config, tally) | {
        "prompts_too_long": pool.too_long,
        "rewards_failed": dict(rewards.failures),
    }
    return Result(tally_cost(config, shape, tally), metrics, fingerprint)


# ----------------------------------------------------------------------------------------------- prompts


@dataclass(frozen=True, slots=True, eq=False)
class PromptPool:
    """The train problems of a stage, and which of them each rollout takes.

    One epoch goes through them in the task's order, later ones in shuffled orders; groups that are sampled again
    take others at random.
    """

    prompts: list[Prompt]
    a_rollout: int
    seed: int
    too_long: int = 0

    @staticmethod
    def of(
        config: GrpoStage, context: Context, task: Task, tokenizer: Any, limit: int
    ) -> PromptPool:
        """Rendered problems that leave room for a completion in the context; UserError where too few do."""
        a_rollout = config.prompts * config.mini_batches
        num = config.problems or config.steps // config.passes * config.prompts
        try:
            problems = list(task.problems("train", num, context.seed))
        except UserError as error:
            hint = (
                ""
                if config.problems
                else f" Set stages.{context.name}.problems to go over fewer again."
            )
            raise UserError(f"{error}{hint}") from None
        prompts = [
            Prompt(p, models.render_prompt(tokenizer, task.template, p.messages)) for p in problems
        ]
        fitting = [prompt for prompt in prompts if len(prompt.ids) < limit]
        too_long = len(prompts) - len(fitting)
        if too_long:
            context.say(f"{too_long} prompts left out: longer than the context of {limit} tokens")
        if len(fitting) < min(a_rollout, num):
            raise UserError(
                f"stages.{context.name}: only {len(fitting)} of {num} prompts fit the context of {limit} tokens; a "
                f"rollout takes {a_rollout}."
            )
        seed = draw_seed(context.seed, context.name, "prompts")
        return PromptPool(fitting, a_rollout, seed, too_long)

    def __call__(self, rollout: int, attempt: int, num: int) -> Sequence[Prompt]:
        """`num` prompts of a rollout; the same for the same arguments."""
        size = len(self.prompts)
        first = range(rollout * self.a_rollout, (rollout + 1) * self.a_rollout)
        regular = [self._order(slot // size)[slot % size] for slot in first]
        if attempt == 0:
            return [self.prompts[n] for n in regular[:num]]
        others = np.setdiff1d(np.arange(size), regular)
        candidates = others if len(others) >= num else np.arange(size)
        rng = np.random.default_rng(draw_seed(self.seed, rollout, attempt))
        chosen = rng.choice(candidates, num, replace=len(candidates) < num)
        return [self.prompts[n] for n in chosen]

    def _order(self, epoch: int) -> np.ndarray[Any, Any]:
        if epoch == 0:
            return np.arange(len(self.prompts))
        return np.random.default_rng(draw_seed(self.seed, epoch)).permutation(len(self.prompts))


# ---------------------------------------------------------------------------------------------- watching


class Samples:
    """Every few rollouts, some completions with what they earned: in the log, and in samples.jsonl."""

    def __init__(self, context: Context, config: GrpoStage) -> None:
        self.path = context.folder / "samples.jsonl"
        self.every = config.samples_every * config.mini_batches * config.passes
        self.fresh = True

    def __call__(self, step: int, rollout: Rollout) -> None:
        if self.fresh:
            loop.drop_lines_after(self.path, step - 1)
            self.fresh = False
        if (step - 1) % self.every:
            return
        rows = []
        for sampled in rollout.sampled[:SHOWN]:
            best = int(np.argmax(sampled.advantage))
            for n in dict.fromkeys((best, len(sampled.group) - 1)):
                scores = {name: values[n] for name, values in sampled.scores.parts.items()}
                rows.append(
                    {
                        "step": step,
                        "problem_id": sampled.prompt.problem.problem_id,
                        "question": sampled.prompt.problem.question,
                        "completion": sampled.group.texts[n],
                        "finished": sampled.group.finished[n],
                        "reward": sampled.scores.total[n],
                        "rewards": scores,
                        "advantage": float(sampled.advantage[n]),
                    }
                )
                print(f"step {step}: {json.dumps(rows[-1], ensure_ascii=False)}", flush=True)
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


class Progress:
    """The live line, and one word of warning where engine and trainer disagree."""

    def __init__(self, context: Context, config: GrpoStage) -> None:
        self.context = context
        self.live = context.live(config.steps, "steps")
        self.warned = False

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        shown = {key: metrics[key] for key in ("reward", "length") if key in metrics}
        self.live.update(step, **shown, seconds=metrics["seconds"])
        if not self.warned and metrics.get("kl_engine", 0.0) > MISMATCH_ALARM:
            self.warned = True
            self.context.say(
                f"warning: at step {step} the engine's and the trainer's probabilities for the same weights differ by "
                f"{metrics['kl_engine']:.3f} nats a token (KL; expected below {MISMATCH_ALARM}); kl_engine in "
                "metrics.jsonl has the course of it"
            )

    def close(self) -> None:
        self.live.close()


def _metrics(folder: Path, config: GrpoStage, tally: loop.Tally) -> dict[str, Any]:
    """The last rollouts' means, the first's beside them."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    window = max(1, len(lines) // 10)

    def mean(key: str, rows: list[dict[str, float]]) -> float | None:
        values = [row[key] for row in rows if key in row]
        return float(np.mean(values)) if values else None

    return {
        "steps": config.steps,
        "completions": tally.completions,
        "bad_steps": tally.bad_steps,
        "seconds_a_step": tally.seconds / config.steps,
        **{
            f"{key}_{at}": mean(key, rows)
            for key in ("reward", "length", "truncated", "all_equal")
            for at, rows in (("first", lines[:window]), ("last", lines[-window:]))
        },
        "kl_engine": mean("kl_engine", lines),
        "kl_ref": mean("kl_ref", lines[-window:]),
    }
