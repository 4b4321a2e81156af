"""Checks of a stage before the run starts, one public function per stage kind: `kind(name, config, recipe)`.

Each raises UserError for a loss, objective, reward or filter that does not exist or does not accept its options.
"""

from __future__ import annotations

from distill import plug
from distill.recipe import CompareStage, FilterStage, GenerateStage, GrpoStage, OnPolicyStage, Recipe, TrainStage


def generate(name: str, config: GenerateStage, recipe: Recipe) -> None:
    from distill.stages.inputs.named_rewards import combined_reward

    if config.rewards:
        combined_reward(config, f"stages.{name}")


def train(name: str, config: TrainStage, recipe: Recipe) -> None:
    from distill.stages.inputs.resolve import resolve_loss

    resolve_loss(config, f"stages.{name}")


def on_policy(name: str, config: OnPolicyStage, recipe: Recipe) -> None:
    from distill.stages.inputs.resolve import resolve_loss

    resolve_loss(config, f"stages.{name}")


def grpo(name: str, config: GrpoStage, recipe: Recipe) -> None:
    from distill.stages.inputs.named_rewards import combined_reward
    from distill.stages.inputs.resolve import resolve_objective

    resolve_objective(config, f"stages.{name}")
    combined_reward(config, f"stages.{name}")


def filter(name: str, config: FilterStage, recipe: Recipe) -> None:
    for number, keep in enumerate(config.keep):
        plug.bind(keep.fn, keep.options, "distill.traces.filters", f"stages.{name}.keep.{number}")


def compare(name: str, config: CompareStage, recipe: Recipe) -> None:
    from distill.stages.compare import check_start

    check_start(config, recipe)
