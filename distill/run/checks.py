"""Checks of a stage before the run starts, one public function per stage kind: `kind(name, config, recipe)`.

Each raises UserError for a loss, objective, reward or filter that does not exist or does not accept its options.
"""

from __future__ import annotations

from distill import plug
from distill.recipe import (
    CompareStage,
    EvalStage,
    FilterStage,
    GenerateStage,
    GrpoStage,
    OnPolicyStage,
    PruneStage,
    Recipe,
    ScoreStage,
    TrainStage,
)
from distill.records import UserError

UNJUDGED = (
    "measure how near to the teacher a student is, with a stage of kind divergence on its traces of held-out questions"
)


def generate(name: str, config: GenerateStage, recipe: Recipe) -> None:
    from distill.stages.captured_positions import keep_positions
    from distill.stages.inputs.named_rewards import combined_reward

    if config.rewards:
        combined_reward(config, f"stages.{name}")
    keep_positions(config, f"stages.{name}")


def score(name: str, config: ScoreStage, recipe: Recipe) -> None:
    from distill.stages.captured_positions import keep_positions

    keep_positions(config, f"stages.{name}")


def train(name: str, config: TrainStage, recipe: Recipe) -> None:
    from distill.stages.inputs import own_traces
    from distill.stages.inputs.learned_tokens import check_stored
    from distill.stages.inputs.matched_layers import check_hidden
    from distill.stages.inputs.resolve import is_cross_tokenizer, resolve_loss
    from distill.stages.inputs.tails import check_tail

    resolve_loss(config, f"stages.{name}")
    own_traces.check(name, config, recipe)
    check_stored(config, f"stages.{name}", recipe)
    check_hidden(config, f"stages.{name}", recipe)
    if not is_cross_tokenizer(config):
        check_tail(config, f"stages.{name}", recipe)


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
        writer = recipe.stages.get(config.data)
        if keep.fn == "correct" and isinstance(writer, GenerateStage) and not writer.rewards:
            _check_judged(writer.task, recipe, f"stages.{name}.keep.{number}", "remove the filter")


def eval(name: str, config: EvalStage, recipe: Recipe) -> None:
    _check_judged(config.task, recipe, f"stages.{name}", UNJUDGED)


def _check_judged(task: str, recipe: Recipe, where: str, instead: str) -> None:
    """Refuse a stage that counts right answers of a task that judges none."""
    if task in recipe.tasks and recipe.tasks[task].options.get("judge") == "none":
        raise UserError(f"{where}: tasks.{task} judges no answer (judge: none), so none can be right; {instead}.")


def prune(name: str, config: PruneStage, recipe: Recipe) -> None:
    """Refuse data that is no traces, and traces without the distributions that `by: importance` compares."""
    from distill.stages.context import find_data
    from distill.stages.inputs.score_inputs import is_traces
    from distill.traces.reader import open_traces

    if config.data is None:
        return
    where, data = f"stages.{name}.data", config.data
    while isinstance(made := recipe.stages.get(data), FilterStage):
        data = made.data
    if made is None and not is_traces(find_data(data)):
        raise UserError(
            f"{where}: {data!r} holds no traces; name a stage of kind generate, score or filter, or a folder of shards. A stage of "
            "kind score makes traces of conversations."
        )
    entries = open_traces(find_data(data) or data).metadata.top_k if made is None else getattr(made, "top_logprobs", 1)
    if config.by == "importance" and entries == 0:
        raise UserError(
            f"{where}: by: importance compares with the traces' distributions, and {data!r} has none (top_logprobs: 0); generate "
            "with top_logprobs > 0, or use by: block_influence."
        )


def compare(name: str, config: CompareStage, recipe: Recipe) -> None:
    from distill.stages.compare import check_start

    check_start(config, recipe)
    _check_judged(config.task, recipe, f"stages.{name}", UNJUDGED)
