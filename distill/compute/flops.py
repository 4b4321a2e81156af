"""FLOPs of training and generation, from a model's shape.

Pure functions of counts, used for the prediction (`distill check`) and for what was measured. FLOPs are two a
multiply-add: 2N a token forward, 6N trained, N = parameters in matmuls with the head and without the
embedding, attention on top. Not counted: norms, rotary embeddings, softmax and the optimiser's
arithmetic (below 1% of a step), routers, and the recurrence of state-space layers beside their matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

from distill.models.shape import ModelShape as ModelShape

BYTES = {"bfloat16": 2, "float32": 4}
"""Bytes of a value."""


def causal_context(lengths: Sequence[int]) -> float:
    """Mean number of positions a token attends to, itself included, in causal sequences of these lengths."""
    total = sum(lengths)
    return sum(n * (n + 1) / 2 for n in lengths) / total if total else 0.0


def attention_flops(shape: ModelShape, tokens: float, mean_context: float) -> float:
    """FLOPs of attention scores and weighted values: per layer, two products of heads x head_dim a token and attended
    position."""
    return 4.0 * shape.layers * shape.heads * shape.head_dim * tokens * shape.attended(mean_context)


def forward_flops(shape: ModelShape, tokens: float, mean_context: float, head_tokens: float | None = None) -> float:
    """FLOPs of one forward pass. head_tokens: positions that the lm_head is applied to (None = all)."""
    head_tokens = tokens if head_tokens is None else head_tokens
    matmuls = 2.0 * (shape.params_body * tokens + shape.params_head * head_tokens)
    return matmuls + attention_flops(shape, tokens, mean_context)


def train_flops(
    shape: ModelShape,
    tokens: float,
    mean_context: float,
    head_tokens: float | None = None,
    *,
    lora: bool = False,
    adapters: float = 0.0,
    checkpointing: bool = False,
) -> float:
    """FLOPs of forward and backward passes: 6N a token and three times the attention.

    lora: no gradient of the frozen weights, so 4N, and 6 for each of the `adapters`' parameters.
    checkpointing: the layers' forward pass is computed twice.
    """
    forward = forward_flops(shape, tokens, mean_context, head_tokens)
    attention = attention_flops(shape, tokens, mean_context)
    total = (2.0 if lora else 3.0) * (forward - attention) + 3.0 * attention + 6.0 * adapters * tokens
    if checkpointing:
        total += forward_flops(shape, tokens, mean_context, 0) + 2.0 * adapters * tokens
    return total


def generate_flops(shape: ModelShape, prompt_tokens: float, new_tokens: float, sequences: float) -> float:
    """FLOPs of prefill and decoding of `sequences` completions; token counts are totals over all of them.

    The head is applied once for each new token: first to the prompt's last position, then to every new token but the last, which no
    pass reads. Attention is taken at the mean lengths. Where an engine shares a prompt between samples, count the prompt tokens
    that it computed.
    """
    if sequences <= 0:
        return 0.0
    prompt, new = prompt_tokens / sequences, new_tokens / sequences
    prefill = forward_flops(shape, prompt_tokens, (prompt + 1) / 2, 0)
    return prefill + forward_flops(shape, max(new_tokens - sequences, 0.0), prompt + new / 2, new_tokens)
