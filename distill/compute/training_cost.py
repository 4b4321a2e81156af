"""The `Cost` of a training stage, from the work that its loop counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from distill.compute.adapters import lora_params
from distill.compute.flops import ModelShape, attention_flops, forward_flops, generate_flops, train_flops
from distill.recipe import OptimStage
from distill.records import Cost

if TYPE_CHECKING:
    from distill.training.policy import Teacher
    from distill.training.step import WorkCounts


def training_cost(config: OptimStage, shape: ModelShape, counts: WorkCounts) -> Cost:
    """The cost of a stage's training, scoring and rollouts, in tokens and FLOPs.

    A prompt counts once for every completion, although an engine may compute it once for a group.
    """
    trained = train_flops(
        shape,
        counts.tokens,
        _mean_context(counts.squared_lengths, counts.tokens),
        counts.head_tokens,
        lora=config.lora is not None,
        adapters=0.0 if config.lora is None else lora_params(shape, config.lora),
        checkpointing=config.gradient_checkpointing,
    )
    scored = forward_flops(
        shape,
        counts.scored_tokens,
        _mean_context(counts.scored_squared_lengths, counts.scored_tokens),
        counts.scored_head_tokens,
    )
    ranked = forward_flops(shape, 0, 0, counts.ranked_head_tokens)
    sampled = generate_flops(shape, counts.prompt_tokens, counts.generated_tokens, counts.completions)
    return Cost(
        tokens_trained=counts.tokens,
        tokens_scored=counts.scored_tokens,
        tokens_generated=counts.generated_tokens,
        tokens_prompt=counts.prompt_tokens,
        flops=trained + scored + ranked + sampled,
        judge_seconds=counts.judge_seconds,
        samples_failed=counts.samples_failed,
    )


def attention_share(shape: ModelShape) -> float:
    """Return half the compute of a token's attention to one position, in tokens of the rest of the model (`rank_split`)."""
    rest = forward_flops(shape, 1, 0)
    return attention_flops(shape, 1, 0.5) / rest


def _mean_context(squared_lengths: int, tokens: int) -> float:
    """Mean number of positions that a token attends to, itself included, from the sum of squared trace lengths."""
    return (squared_lengths / tokens + 1) / 2 if tokens else 0.0


def teachers_cost(teachers: Sequence[Teacher], counts: WorkCounts) -> Cost:
    """The cost of the forward passes of teachers in the trainer.

    Each teacher reads every token that is trained on or, with another tokenizer, the same text in its own tokens.
    """
    tokens, squared = counts.tokens, counts.squared_lengths
    head = counts.head_tokens + counts.ranked_head_tokens
    if any(teacher.shared is not None for teacher in teachers):
        tokens, head = counts.teacher_tokens, counts.teacher_head_tokens
        squared = counts.teacher_squared_lengths
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
