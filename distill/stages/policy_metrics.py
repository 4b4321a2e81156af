"""Output of stages that learn from their own completions: logged completions, the live line, final metrics."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill import world
from distill.recipe import PolicyStage
from distill.stages.context import Context
from distill.stages.inputs.student import live_steps
from distill.training import loop
from distill.training.step import Budget, Length, WorkCounts

LOGGED_GROUPS = 3
"""The number of groups of a rollout whose completions are logged."""
MISMATCH_ALARM = 0.01
"""The KL between engine and trainer, in nats per token, above which a warning is printed."""


class CompletionLog:
    """Writes some completions of every few rollouts to completions.jsonl and the log; the very first to the screen too."""

    def __init__(self, context: Context, config: PolicyStage) -> None:
        self.context, self.path = context, context.folder / "completions.jsonl"
        self.every = config.log_completions_every * config.steps_a_rollout
        self.fresh = True

    def __call__(self, step: int, rows: Callable[[], list[Mapping[str, Any]]]) -> None:
        """Log the rollout that starts at this step, if it is due. rows: makes the rows to log; called only if due."""
        if self.fresh and world.is_main():
            loop.drop_lines_after(self.path, step - 1)
            self.fresh = False
        if (step - 1) % self.every or not world.is_main():
            return
        made = rows()
        if step == 1 and made:
            self.context.say(f"first completion: {' '.join(made[0]['completion'].split())[:160]}")
        lines = [json.dumps({"step": step, **row}) for row in made]
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)
        print("\n".join(lines), flush=True)


class PolicyProgress:
    """The live line, and one warning if the engine's and the trainer's probabilities disagree."""

    def __init__(self, context: Context, length: Length | Budget, shown: Sequence[str]) -> None:
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
                f"{metrics['kl_engine']:.3f} nats per token (KL; expected below {MISMATCH_ALARM}); metrics.jsonl has "
                "kl_engine for every step"
            )

    def close(self) -> None:
        self.live.close()


def policy_metrics(
    context: Context, counts: WorkCounts, prompts_too_long: int, watched: Sequence[str]
) -> dict[str, Any]:
    """Return the stage's counts, and each watched metric at the start and at the end of training; on the main process."""
    if not world.is_main():
        return {}
    return {
        "steps": counts.steps,
        "completions": counts.completions,
        "bad_steps": counts.bad_steps,
        "seconds_a_step": counts.seconds / max(counts.steps, 1),
        "prompts_too_long": prompts_too_long,
        **_first_and_last(context.folder, watched),
    }


def _first_and_last(folder: Path, keys: Sequence[str]) -> dict[str, float | None]:
    """Return each key's mean over the first and over the last tenth of the steps in metrics.jsonl."""
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
