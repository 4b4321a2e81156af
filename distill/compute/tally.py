"""The work that a training stage counted, as a `Cost`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from distill.compute.flops import ModelShape, forward_flops, generate_flops, train_flops
from distill.recipe import OptimStage
from distill.records import Cost

if TYPE_CHECKING:
    from distill.training.loop import WorkCounts
    from distill.training.policy import Teacher


def tally_cost(config: OptimStage, shape: ModelShape, tally: WorkCounts) -> Cost:
    """The cost of a stage's training, scoring and own sampling, in tokens and FLOPs.

    Prompts are counted for every completion, though an engine may share them within a group.
    """
    trained = train_flops(
        shape,
        tally.tokens,
        _mean_context(tally.squared_lengths, tally.tokens),
        tally.head_tokens,
        lora=config.lora is not None,
        checkpointing=config.gradient_checkpointing,
    )
    scored = forward_flops(
        shape,
        tally.scored_tokens,
        _mean_context(tally.scored_squared_lengths, tally.scored_tokens),
        tally.scored_head_tokens,
    )
    sampled = generate_flops(shape, tally.prompt_tokens, tally.generated_tokens, tally.completions)
    return Cost(
        tokens_trained=tally.tokens,
        tokens_scored=tally.scored_tokens,
        tokens_generated=tally.generated_tokens,
        tokens_prompt=tally.prompt_tokens,
        flops=trained + scored + sampled,
        judge_seconds=tally.judge_seconds,
        samples_failed=tally.samples_failed,
    )


def _mean_context(squared_lengths: int, tokens: int) -> float:
    """Mean number of positions a token attends to, itself included, from the sum of squared lengths of causal
    traces."""
    return (squared_lengths / tokens + 1) / 2 if tokens else 0.0


def teachers_cost(teachers: Sequence[Teacher], tally: WorkCounts) -> Cost:
    """The cost of teachers in the trainer: each reads every token that is trained on, or the same texts in its own
    tokens."""
    tokens, head, squared = tally.tokens, tally.head_tokens, tally.squared_lengths
    if any(teacher.shared is not None for teacher in teachers):
        tokens, head = tally.taught_tokens, tally.taught_head_tokens
        squared = tally.taught_squared_lengths
    flops = sum(
        forward_flops(
            ModelShape.from_config(teacher.model.config.to_dict()),
            tokens,
            _mean_context(squared, tokens),
            head,
        )
        for teacher in teachers
    )
    return Cost(tokens_scored=len(teachers) * tokens, flops=flops)
