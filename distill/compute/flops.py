"""FLOPs and memory of training and generation, from a model's shape.

Pure functions of counts, used for the prediction (`distill check`) and for what was measured. FLOPs are two a
multiply-add: 2N a token forward, 6N trained, N = parameters in matmuls with the head and without the
embedding, attention on top. Not counted: norms, rotary embeddings, softmax and the optimiser's
arithmetic (below 1% of a step), routers, and the recurrence of state-space layers beside their matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from distill.models.shape import ModelShape as ModelShape

# -------------------------------------------------------------------------------------------------- FLOPs


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
    checkpointing: bool = False,
) -> float:
    """FLOPs of forward and backward passes: 6N a token and three times the attention.

    lora: no gradient of the frozen weights, so 4N (the adapters' own matmuls, about 1%, are left out).
    checkpointing: the layers' forward pass is computed twice.
    """
    forward = forward_flops(shape, tokens, mean_context, head_tokens)
    attention = attention_flops(shape, tokens, mean_context)
    total = (2.0 if lora else 3.0) * (forward - attention) + 3.0 * attention
    if checkpointing:
        total += forward_flops(shape, tokens, mean_context, 0)
    return total


def generate_flops(shape: ModelShape, prompt_tokens: float, new_tokens: float, sequences: float) -> float:
    """FLOPs of prefill and decoding of `sequences` completions; token counts are totals over all of them.

    Prompts pass the layers only; each new token costs 2N. Attention is taken at the mean lengths. Where an
    engine shares a prompt between samples, count the prompt tokens that it computed.
    """
    if sequences <= 0:
        return 0.0
    prompt, new = prompt_tokens / sequences, new_tokens / sequences
    prefill = forward_flops(shape, prompt_tokens, (prompt + 1) / 2, 0)
    return prefill + forward_flops(shape, new_tokens, prompt + (new + 1) / 2)


# ------------------------------------------------------------------------------------------------- memory


BYTES = {"bfloat16": 2, "float32": 4}
PROCESS_BYTES = 0.6e9
"""python, torch and transformers, before any weight."""
ENGINE_BYTES = {"vllm": 0.7e9}
"""What an engine's own libraries and buffers take besides."""
SCORE_ROWS = {"vllm": 1024}
"""Positions whose logits an engine holds at once in scoring."""
QUANTISED_BYTES = {"nf4": 0.5625, "int8": 1.0}
"""Bytes of a layer's weight under an adapter."""
LOGIT_COPIES = 3
"""fp32 rows as long as the vocabulary that an engine holds for a sequence: logits, probabilities, scratch."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of memory by use. frozen: weights that are not trained (of teachers, the reference, an engine)."""

    weights: float = 0.0
    masters: float = 0.0
    moments: float = 0.0
    frozen: float = 0.0
    gradients: float = 0.0
    activations: float = 0.0
    head: float = 0.0
    cache: float = 0.0
    process: float = 0.0

    @property
    def total(self) -> float:
        return float(sum(astuple(self)))

    @property
    def least(self) -> float:
        """A lower bound: weights, masters and moments are all held at once from the first step to the last."""
        return self.weights + self.masters + self.moments + self.frozen

    def __add__(self, other: Memory) -> Memory:
        return Memory(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def lora_params(shape: ModelShape, rank: int) -> float:
    """Parameters of adapters on all linear layers but the head."""
    hidden, inner = shape.hidden, shape.intermediate
    query, value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = 2 * (hidden + query) + 2 * (hidden + value)
    mlp = (3 if shape.gated else 2) * (hidden + inner)
    return float(shape.layers * rank * (attention + mlp))


def train_memory(
    shape: ModelShape,
    micro_tokens: int,
    *,
    dtype: str = "bfloat16",
    lora_rank: int | None = None,
    quantised: str | None = None,
    frozen_params: float = 0.0,
    checkpointing: bool = False,
    head_rows: int = 512,
    on_cpu: bool = True,
) -> Memory:
    """Memory of training with AdamW: a parameter takes 20 bytes in bfloat16 and 16 in float32 while gradients are held.

    bfloat16: 2 weight, 4 master, 8 moments, 4 fp32 and 2 bf16 gradients; float32 parameters are their own masters.
    lora_rank: adapters alone are trained (in float32), the weights are frozen, in fewer bytes where `quantised`.
    frozen_params: of teachers and a reference. Activations are a rough count of what a Llama-like layer keeps for its
    backward pass; the head keeps one fp32 chunk of logits of `head_rows` tokens and its product.
    """
    size = BYTES[dtype]
    trained = float(shape.params_total)
    weights, masters = size * trained, 0.0 if size == 4 else 4 * trained
    gradients = (4 if size == 4 else 6) * trained
    if lora_rank is not None:
        trained = lora_params(shape, lora_rank)
        layer_bytes = QUANTISED_BYTES[quantised] if quantised else size
        weights += (layer_bytes - size) * shape.params_body + 4 * trained
        masters, gradients = 0.0, 4 * trained
    attention = shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    mlp = (4 if shape.gated else 2) * shape.intermediate
    # Two norms keep their input in fp32; six tensors of the residual's width stay in the compute dtype.
    layer = size * (6 * shape.hidden + attention + mlp) + 8 * shape.hidden
    if lora_rank is not None:
        # Each adapter keeps its input in float32.
        layer += 4 * (6 * shape.hidden + shape.intermediate)
    kept = size * shape.hidden * shape.layers + layer if checkpointing else layer * shape.layers
    rows = min(head_rows, micro_tokens)
    return Memory(
        weights=weights,
        masters=masters,
        moments=8 * trained,
        frozen=size * frozen_params,
        gradients=gradients,
        activations=micro_tokens * kept,
        head=(4.0 + (size if size == 2 else 0)) * rows * shape.vocab + 8.0 * micro_tokens * shape.hidden,
        process=PROCESS_BYTES if on_cpu else 0.0,
    )


def generate_memory(
    shape: ModelShape,
    sequences: int,
    max_len: int,
    *,
    dtype: str = "bfloat16",
    engine: str = "vllm",
    cache_gib: float | None = 1.0,
    scored: bool = False,
    on_cpu: bool = True,
) -> Memory:
    """Memory of an engine: weights, the key-value cache, rows of logits, its libraries.

    The cache holds 2 x layers x kv_heads x head_dim values a token, grouped heads once. cache_gib: what vLLM
    reserves (None: what `sequences` need, as transformers does). scored: rows of logits of SCORE_ROWS positions.
    """
    size = BYTES[dtype]
    cache = float(kv_bytes(shape, dtype) * max_len * sequences)
    if engine == "vllm" and cache_gib is not None:
        cache = cache_gib * 2**30
    rows = SCORE_ROWS.get(engine, 256) if scored else sequences
    # A bfloat16 engine on a CPU keeps its head in float32 too.
    head = 4.0 * shape.params_head if size == 2 and on_cpu else 0.0
    return Memory(
        weights=float(size * shape.params_total),
        head=head + 4.0 * LOGIT_COPIES * shape.vocab * rows,
        cache=cache,
        process=PROCESS_BYTES + ENGINE_BYTES.get(engine, 0.0) if on_cpu else 0.0,
    )


def kv_bytes(shape: ModelShape, dtype: str) -> int:
    """Bytes of one token's keys and values."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * BYTES[dtype]
