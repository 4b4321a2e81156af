"""What the stages that learn from the policy's own completions share: the engine, its prompts, and what one watches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill import engines, models
from distill.recipe import PolicyStage
from distill.records import Array, Task, UserError, draw_seed
from distill.stages.context import Context
from distill.stages.inputs.student import live_steps
from distill.stages.sampling import ROOM, completion_text, context_limit
from distill.training import loop
from distill.training.rl.sampler import Prompt, Sampler

UNKNOWN_ROLLOUTS = 64
"""Rollouts that a budget is given fresh problems for; then they come round again."""
MISMATCH_ALARM = 0.01
"""KL between engine and trainer, nats a token, above which the user is told."""


@contextmanager
def open_sampler(config: PolicyStage, context: Context, tokenizer: Any) -> Iterator[tuple[Sampler, PromptPool]]:
    """The policy's engine, started on the stage's model, with the train problems it will be asked; closed at the end."""
    folder = context.model_dir(config.model)
    task = context.task(config.task)
    models.check_template(tokenizer, task.template, f"tasks.{config.task}")
    limit = context_limit(config.engine, folder)
    context.phase(f"reading the task {config.task}")
    pool = PromptPool.of(config, context, task, tokenizer, limit)
    longest = max(len(prompt.ids) for prompt in pool.prompts) + config.sampling.max_tokens
    context.phase(f"starting the {config.engine.fn} engine")
    engine = engines.open_engine(
        config.engine,
        folder,
        max_model_len=min(limit, -(-longest // ROOM) * ROOM),
        max_top_k=0,
    )

    def decode(ids_T: Array) -> str:
        return completion_text(tokenizer, ids_T)

    try:
        yield (
            Sampler(
                engine=engine,
                template=task.template,
                prompts=pool,
                judge=task.judge,
                decode=decode,
                sampling=config.sampling.record(),
                group_size=config.group_size,
                seed=draw_seed(context.seed, context.name, "rollouts"),
            ),
            pool,
        )
    finally:
        engine.close()


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
    def of(config: PolicyStage, context: Context, task: Task, tokenizer: Any, limit: int) -> PromptPool:
        """Rendered problems that leave room for a completion in the context; UserError where too few do."""
        a_rollout = config.prompts_a_rollout
        rollouts = config.steps // config.steps_a_rollout if config.steps else UNKNOWN_ROLLOUTS
        num = config.problems or rollouts * a_rollout
        try:
            problems = list(task.problems("train", num, context.seed))
        except UserError as error:
            hint = "" if config.problems else f" Set stages.{context.name}.problems to go over fewer again."
            raise UserError(f"{error}{hint}") from None
        prompts = [Prompt(p, models.render_prompt(tokenizer, task.template, p.messages)) for p in problems]
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
        orders = {epoch: self._order(epoch) for epoch in {slot // size for slot in first}}
        regular = [orders[slot // size][slot % size] for slot in first]
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
    """Every few rollouts, some completions: in the log, and in completions.jsonl; the first of all on the screen too."""

    def __init__(self, context: Context, config: PolicyStage) -> None:
        self.context, self.path = context, context.folder / "completions.jsonl"
        self.every = config.log_completions_every * config.steps_a_rollout
        self.fresh = True

    def __call__(self, step: int, rows: Callable[[], list[Mapping[str, Any]]]) -> None:
        """rows: makes what is to be shown of the rollout that starts at this step; asked only where it is."""
        if self.fresh:
            loop.drop_lines_after(self.path, step - 1)
            self.fresh = False
        if (step - 1) % self.every:
            return
        made = rows()
        if step == 1 and made:
            self.context.say(f"first completion: {' '.join(made[0]['completion'].split())[:160]}")
        lines = [json.dumps({"step": step, **row}) for row in made]
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)
        print("\n".join(lines), flush=True)


class Progress:
    """The live line, and one word of warning where engine and trainer disagree."""

    def __init__(self, context: Context, length: loop.Length | loop.Budget, shown: Sequence[str]) -> None:
        self.context, self.shown = context, shown
        self.live = live_steps(context, length)
        self.warned = False

    def __call__(self, step: int, num_steps: int, metrics: dict[str, float]) -> None:
        shown = {key: metrics[key] for key in self.shown if key in metrics}
        self.live.total = num_steps
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


def policy_metrics(
    context: Context,
    tally: loop.WorkCounts,
    pool: PromptPool,
    watched: Sequence[str],
) -> dict[str, Any]:
    """What such a stage reports: its counts, and the course of what one watches."""
    return {
        "steps": tally.steps,
        "completions": tally.completions,
        "bad_steps": tally.bad_steps,
        "seconds_a_step": tally.seconds / max(tally.steps, 1),
        "prompts_too_long": pool.too_long,
        **_first_and_last(context.folder, watched),
    }


def _first_and_last(folder: Path, keys: Sequence[str]) -> dict[str, float | None]:
    """Of metrics.jsonl: each key's mean over the first tenth of the steps and over the last."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    window = max(1, len(lines) // 10)

    def mean(key: str, rows: list[dict[str, float]]) -> float | None:
        values = [row[key] for row in rows if key in row]
        return float(np.mean(values)) if values else None

    return {
        f"{key}_{at}": mean(key, rows)
        for key in keys
        for at, rows in (("first", lines[:window]), ("last", lines[-window:]))
    }
