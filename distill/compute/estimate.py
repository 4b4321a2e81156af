"""Time estimates: token counts and FLOPs turned into seconds on a measured `Machine`.

Input: token counts, FLOPs (`flops`) and a `Machine` (`distill.machine`). Output: seconds on an otherwise idle machine,
and bytes.

An estimate is the sum of matrix products at the measured rate of their dtype, a term per token for elementwise work, a term
per parameter for the optimiser and files, and a term per step for Python. The constants are fitted to SmolLM2-135M on two
cores, in bfloat16 and float32; tests/bench/bench_predictions.py measures them again. Estimates aim to be right within a
factor of two; every report prints them beside the measured values. On a GPU elementwise work is counted as memory traffic,
and a pass takes at least as long as the host needs to start its kernels; these two constants are fitted to training steps
of a 135M and a 1.5B model on one H100 (tests/bench/RESULTS.md). Exchanges between GPUs are not measured.
"""

from __future__ import annotations

import math

from distill.compute.flops import BYTES, ModelShape, generate_flops
from distill.machine import Dtype, Machine, Rates
from distill.recipe import DistributedConfig

PROCESS_START = 5.0
"""Seconds for a stage's process to import torch and transformers and to load a small model."""
ENGINE_START = {"vllm": 8.0, "transformers": 1.0, "reference": 1.0}
"""Seconds from a loaded process to an engine's first token (import, weights, cache, warm-up)."""
REOPENED = 0.5
"""Start of a further engine in the same process, as a share of ENGINE_START."""
LIGHT_START = 0.4
"""Seconds for a stage that loads no model."""
FILE_RATE = 0.6e9
"""Bytes/s of serialising, writing and hashing weights and optimiser state."""

TRAIN_EFFICIENCY = 0.95
"""Share of the measured product rates that a packed forward and backward pass reaches."""
TRAIN_ELEMENTS = 2000.0
"""Elementwise work of training, as float32 product FLOPs per token, layer and unit of width (hidden + intermediate)."""
LORA_ELEMENTS = 1.6
"""Factor on the elementwise work when LoRA adapters are trained."""
ACCUMULATE_BYTES = 18
"""Bytes moved per parameter and micro-batch: a bf16 gradient is read and added to the fp32 sum, in fresh memory."""
OPTIMISER_BYTES = 36
"""Bytes moved per parameter and optimiser step: fp32 weight, two moments and gradient read and written, bf16 copy."""
STREAMING = 0.35
"""Share of the measured memory bandwidth that a pass over the whole model reaches."""
STATE_BYTES = 12
"""Bytes of a checkpoint per trained parameter: fp32 weight and two moments."""

PROOF_SECONDS = 1.0
"""Time to prove a small model's forward pass; every stage that runs a model in the trainer does."""
PREFILL_EFFICIENCY = 0.9
"""Share of the measured product rate reached in prefill and scoring."""
DECODE_EFFICIENCY = 0.9
"""Share of the measured product rate reached in decoding, with a few dozen rows."""
FORWARD_ELEMENTS = 600.0
"""Elementwise work of a forward pass, in the unit of TRAIN_ELEMENTS."""
DECODE_STEP_OVERHEAD = {"vllm": 0.02, "transformers": 0.05}
"""Seconds per decoding step outside the model: scheduling, sampling, the Python calls of thirty layers."""
TOKEN_SECONDS = 2e-9
"""Seconds per generated token and vocabulary entry: softmax and sampling."""
SYNC_BYTES = 4
"""Bytes moved per parameter when a policy's weights are copied into its engine."""
GPU_ELEMENT_BYTES = 80.0
"""On a GPU: bytes of memory traffic per token, layer and unit of width in training."""
LAUNCH_SECONDS = 3.5e-3
"""On a GPU: the least seconds of a layer's forward and backward pass, however few its tokens."""
VERIFY_SECONDS = 0.002
"""Seconds of a rule-based verdict on one completion."""
SHARD_BYTES = 8000
"""Bytes of a nearly empty shard: its schema twice (Parquet's and Arrow's) and the header of each column."""
ROW_BYTES = 36
"""Bytes per trace: two ids that do not compress (18), the question as text and ids, answer, verdicts."""
POSITION_BYTES = 2.5
"""Bytes per completion position: text, id and log-probability. 1.2 for the same formula over and over, 5 for prose."""
CAPTURED_BYTES = 1.4
"""Additional bytes per position with a stored distribution: its number of entries and its tail."""
ENTRY_BYTES = 2.0
"""Bytes per stored entry: its id and log-probability. 0.8 for a confident, repetitive model, up to 2.6 otherwise."""
DRAW_BYTES, DRAW_COUNT_BYTES = 2.5, 0.2
"""Bytes per draw from the tail (its id and rounded log-probability), and per position for their number."""


# ------------------------------------------------------------------------------------------------ seconds


def rates(shape: ModelShape, machine: Machine, dtype: Dtype) -> Rates:
    """The measured rates of a dtype at a model's width; those of the slowest dtype if it was not measured."""
    known = machine.at((shape.hidden, shape.intermediate))
    return known.get(dtype) or min(known.values(), key=lambda each: each.training)


def _elements_seconds(shape: ModelShape, tokens: float, machine: Machine, flops_each: float) -> float:
    """Seconds of all work but matrix products: norms, rotary embeddings, activations, residuals, casts, Python calls."""
    units = tokens * shape.layers * (shape.hidden + shape.intermediate)
    if machine.device == "cuda":
        share = flops_each / TRAIN_ELEMENTS
        return units * share * GPU_ELEMENT_BYTES / machine.bandwidth
    return units * flops_each / rates(shape, machine, "float32").training


def predict_train_seconds(
    shape: ModelShape,
    flops: float,
    tokens: float,
    steps: int,
    machine: Machine,
    dtype: Dtype = "bfloat16",
    *,
    micro_batches: int = 1,
    trained: float | None = None,
    checkpoints: int = 1,
    share: float = 1.0,
) -> float:
    """Seconds of a train stage: process start, forward and backward passes, optimiser steps, checkpoints.

    flops: as `train_flops` counts them. tokens: trained on in total. Both are those of one process. micro_batches: forward
    and backward passes per step.
    trained: number of parameters with a gradient (None: all; for LoRA, the adapters'). checkpoints: those that training waits
    for. share: of the optimiser's state, what one process holds.
    """
    lora = trained is not None
    trained = float(shape.params_total) if trained is None else trained
    products = flops / (rates(shape, machine, dtype).training * TRAIN_EFFICIENCY)
    each = TRAIN_ELEMENTS * (LORA_ELEMENTS if lora else 1.0)
    elements = _elements_seconds(shape, tokens, machine, each)
    if machine.device == "cuda":
        elements = max(elements, steps * micro_batches * shape.layers * LAUNCH_SECONDS - products)
    moved = OPTIMISER_BYTES + ACCUMULATE_BYTES * micro_batches
    optimiser = steps * moved * trained * share / (machine.bandwidth * STREAMING)
    written = checkpoints * STATE_BYTES * trained * share + 2.0 * shape.params_total
    return PROCESS_START + products + elements + optimiser + written / FILE_RATE


def exchange_seconds(
    shape: ModelShape,
    trained: float | None,
    steps: int,
    micro_batches: int,
    machine: Machine,
    dtype: Dtype,
    parallel: DistributedConfig,
) -> float:
    """Seconds that processes wait for each other's weights and gradients; 0 where the link is not known.

    ddp sends the fp32 gradients twice a step (reduce-scatter and all-gather). fsdp2 gathers the weights for both passes of
    every micro-batch, half of it hidden behind the computation, and reduces fp32 gradients once a step.
    """
    size = parallel.world_size
    if size == 1 or not machine.link:
        return 0.0
    part = (size - 1) / size
    gradients = 4.0 * (shape.params_total if trained is None else trained)
    if parallel.strategy == "ddp":
        return steps * 2 * part * gradients / machine.link
    gathered = 2 * micro_batches * BYTES[dtype] * shape.params_total / 2
    return steps * part * (gathered + gradients) / machine.link


def predict_generate_seconds(
    shape: ModelShape,
    sequences: int,
    prompt_tokens: float,
    new_tokens: float,
    machine: Machine,
    *,
    batch_size: int = 64,
    dtype: Dtype = "bfloat16",
    engine: str = "vllm",
    verify_seconds: float = VERIFY_SECONDS,
) -> float:
    """Seconds of a generate or eval stage: process and engine start, prefill, decoding and verdicts.

    Token counts are totals. A decoding step yields one token per running sequence and takes at least as long as reading
    the weights.
    """
    start = PROCESS_START + engine_start(engine)
    if sequences <= 0:
        return start
    return start + sampling_seconds(
        shape,
        sequences,
        prompt_tokens,
        new_tokens,
        machine,
        batch_size=batch_size,
        dtype=dtype,
        engine=engine,
        verify_seconds=verify_seconds,
    )


def engine_start(engine: str) -> float:
    """Seconds from a loaded process to an engine's first token."""
    return ENGINE_START.get(engine, ENGINE_START["vllm"])


def sampling_seconds(
    shape: ModelShape,
    sequences: float,
    prompt_tokens: float,
    new_tokens: float,
    machine: Machine,
    *,
    batch_size: int,
    dtype: Dtype,
    engine: str,
    verify_seconds: float = VERIFY_SECONDS,
) -> float:
    """Seconds of prefill, decoding and verdicts with an engine that is already running."""
    rate = rates(shape, machine, dtype)
    decode_flops = generate_flops(shape, prompt_tokens, new_tokens, sequences)
    prefill_flops = 2.0 * shape.params_body * prompt_tokens
    width = min(batch_size, sequences)
    decode_steps = math.ceil(new_tokens / width)
    # A step reads all weights once, and the keys and values of every sequence.
    context = (prompt_tokens + new_tokens / 2) / sequences
    weights = BYTES[dtype] * (shape.params_total + width * shape.cached_values(context))
    arithmetic = (decode_flops - prefill_flops) / (rate.decode * DECODE_EFFICIENCY)
    decode = max(arithmetic, decode_steps * weights / machine.bandwidth)
    prefill = prefill_flops / (rate.forward * PREFILL_EFFICIENCY)
    elements = _elements_seconds(shape, prompt_tokens + new_tokens, machine, FORWARD_ELEMENTS)
    logits = 0.0 if machine.device == "cuda" else new_tokens * shape.vocab * TOKEN_SECONDS
    overhead = DECODE_STEP_OVERHEAD.get(engine, DECODE_STEP_OVERHEAD["vllm"])
    verdicts = sequences * verify_seconds
    return prefill + decode + elements + logits + decode_steps * overhead + verdicts


def predict_rollouts_seconds(
    shape: ModelShape,
    rollouts: float,
    sequences: float,
    prompt: float,
    reply: float,
    machine: Machine,
    *,
    batch_size: int,
    dtype: Dtype,
    engine: str,
) -> float:
    """Seconds of a policy stage's rollout engine: its start, then per rollout `sequences` completions and a weight update.

    prompt, reply: mean tokens of a prompt and of a completion.
    """
    each = sampling_seconds(
        shape,
        sequences,
        sequences * prompt,
        sequences * reply,
        machine,
        batch_size=batch_size,
        dtype=dtype,
        engine=engine,
    )
    sync = SYNC_BYTES * shape.params_total / (machine.bandwidth * STREAMING)
    return engine_start(engine) + rollouts * (each + sync)


def forward_seconds(shape: ModelShape, flops: float, tokens: float, machine: Machine, dtype: Dtype) -> float:
    """Seconds of a forward pass in the trainer: of a teacher, the reference model or the rollout policy."""
    products = flops / (rates(shape, machine, dtype).forward * TRAIN_EFFICIENCY)
    return products + _elements_seconds(shape, tokens, machine, FORWARD_ELEMENTS)


def predict_score_seconds(
    shape: ModelShape,
    flops: float,
    tokens: float,
    scored: float,
    machine: Machine,
    dtype: Dtype = "bfloat16",
    engine: str = "vllm",
) -> float:
    """Seconds of a score stage: process and engine start, and one forward pass over `tokens`.

    flops: as `forward_flops` counts them. scored: the tokens whose logits are computed.
    """
    products = flops / (rates(shape, machine, dtype).forward * PREFILL_EFFICIENCY)
    elements = _elements_seconds(shape, tokens, machine, FORWARD_ELEMENTS)
    logits = 0.0 if machine.device == "cuda" else scored * shape.vocab * TOKEN_SECONDS
    return PROCESS_START + engine_start(engine) + products + elements + logits


def predict_divergence_seconds(
    shape: ModelShape, flops: float, tokens: float, measured: float, machine: Machine, dtype: Dtype
) -> float:
    """Seconds of a divergence stage: process start, reading the model, its forward proof, and one forward pass over `tokens`.

    measured: the tokens whose logits are computed.
    """
    loaded = 2.0 * shape.params_total / FILE_RATE
    logits = 0.0 if machine.device == "cuda" else measured * shape.vocab * TOKEN_SECONDS
    return PROCESS_START + loaded + PROOF_SECONDS + forward_seconds(shape, flops, tokens, machine, dtype) + logits


def predict_prune_seconds(shape: ModelShape) -> float:
    """Seconds to read a model and write it in bfloat16."""
    return PROCESS_START + 2.0 * shape.params_total / FILE_RATE


def predict_filter_seconds(traces: int, seconds_a_trace: float = 1e-4) -> float:
    """Seconds to read the verdict columns of traces and filter them."""
    return LIGHT_START + traces * seconds_a_trace


def predict_trace_bytes(
    traces: int,
    positions: float,
    entries_a_position: float,
    *,
    shard_rows: int = 256,
    share: float = 1.0,
    draws_a_position: float = 0.0,
) -> float:
    """Bytes of compressed shards. entries_a_position: mean number of stored entries, 0 without distributions. share: of the
    positions, those that have a distribution.

    draws_a_position: mean number of draws from the tail.

    Not counted: the overhead of smaller shards that a slow writer closes every half minute.
    """
    shards = math.ceil(traces / shard_rows)
    kept = CAPTURED_BYTES + ENTRY_BYTES * entries_a_position if entries_a_position else 0.0
    drawn = DRAW_COUNT_BYTES + DRAW_BYTES * draws_a_position if draws_a_position else 0.0
    return shards * SHARD_BYTES + traces * ROW_BYTES + positions * (POSITION_BYTES + share * kept + drawn)
