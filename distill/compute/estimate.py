"""Time estimates: token counts and FLOPs turned into seconds on a measured `Machine`.

Input: token counts, FLOPs (`flops`) and a `Machine` (`distill.machine`). Output: seconds on an otherwise idle machine,
and bytes.

Seconds are the time of matrix products at the measured rate of their dtype, plus a term per token for elementwise work,
one per parameter for the optimiser and files, and one per step for Python. The constants are fitted to SmolLM2-135M on
two cores, in bfloat16 where that is fast and in float32 where it is not; tests/bench/bench_predictions.py measures them
again. Estimates are meant to be right within a factor of two, and every report prints them beside what was measured.
The elementwise work of a GPU is counted as memory traffic and has not been measured.
"""

from __future__ import annotations

import math

from distill.compute.flops import BYTES, ModelShape, generate_flops
from distill.machine import Dtype, Machine, Rates

PROCESS_START = 5.0
"""Seconds for a stage's own process to import torch and transformers and to load a small model."""
ENGINE_START = {"vllm": 8.0, "transformers": 1.0, "reference": 1.0}
"""Seconds from a loaded process to an engine's first token (import, weights, cache, warm-up)."""
REOPENED = 0.5
"""Share of that for another engine in the same process."""
LIGHT_START = 0.4
"""Seconds for a stage that loads no model."""
FILE_RATE = 0.6e9
"""Bytes/s at which weights and optimiser state are serialised, written and hashed."""

TRAIN_EFFICIENCY = 0.95
"""Share of the measured product rates that the products of a packed forward and backward pass reach."""
TRAIN_ELEMENTS = 2000.0
"""Elementwise work of training, in float32 product FLOPs a token, layer and unit of width (hidden + intermediate)."""
LORA_ELEMENTS = 1.6
"""Times as much elementwise work where adapters are trained."""
ACCUMULATE_BYTES = 18
"""Bytes moved a parameter and micro-batch: a bf16 gradient read and added to the fp32 sum, in fresh memory."""
OPTIMISER_BYTES = 36
"""Bytes moved a parameter and optimiser step: fp32 weight, two moments and gradient read and written, bf16 copy."""
STREAMING = 0.35
"""Share of the measured bandwidth that passes over the whole model reach."""
STATE_BYTES = 12
"""Bytes of a checkpoint a trained parameter: fp32 weight and two moments."""

PREFILL_EFFICIENCY = 0.9
DECODE_EFFICIENCY = 0.9
"""Share of the measured rates in prefill and scoring, and in decoding: matmuls of a few dozen rows."""
FORWARD_ELEMENTS = 600.0
"""Elementwise work of a forward pass, as TRAIN_ELEMENTS."""
DECODE_STEP_OVERHEAD = {"vllm": 0.02, "transformers": 0.05}
"""Seconds a decoding step spends outside the model: scheduling, sampling, the calls of thirty layers."""
TOKEN_SECONDS = 2e-9
"""Seconds a generated token and id of the vocabulary: logits turned into probabilities, the sampler's passes."""
SYNC_BYTES = 4
"""Bytes moved a parameter when a policy's weights are handed to its engine."""
GPU_ELEMENT_BYTES = 60.0
"""On a GPU: bytes of memory traffic a token, layer and unit of width in training; a third of it forward. Not
measured."""
VERIFY_SECONDS = 0.002
"""A rule-based verdict on one completion."""
SHARD_BYTES = 8000
"""Bytes of a shard with next to nothing in it: its schema twice (Parquet's and Arrow's) and each column's own
header."""
ROW_BYTES = 36
"""Bytes of a trace's own columns: two ids that do not compress (18), the question as text and ids, answer, verdicts."""
POSITION_BYTES = 2.5
"""Bytes of a completion's position: text, id and log-probability. One formula over and over takes 1.2, prose 5."""
CAPTURED_BYTES = 1.4
"""Bytes more of a position whose distribution is kept: its number of candidates and its tail."""
ENTRY_BYTES = 2.0
"""Bytes of one kept candidate: its id and log-probability. 0.8 where a model is sure and repeats itself, 2.6 where
not."""


# ------------------------------------------------------------------------------------------------ seconds


def rates(shape: ModelShape, machine: Machine, dtype: Dtype) -> Rates:
    """The measured rates of a dtype at a model's width; the slowest known ones where the dtype was not measured."""
    known = machine.at((shape.hidden, shape.intermediate))
    return known.get(dtype) or min(known.values(), key=lambda each: each.training)


def _elements_seconds(shape: ModelShape, tokens: float, machine: Machine, flops_each: float) -> float:
    """Seconds of everything but matrix products: norms, rotary embeddings, activations, residuals, casts, Python
    calls."""
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
) -> float:
    """Seconds of a train stage: process start, `flops` (as `train_flops` counts them) over `tokens`, `steps` optimiser
    steps, checkpoints.

    micro_batches: forward and backward passes per step. trained: parameters with a gradient (None: all; LoRA: the
    adapters).
    """
    lora = trained is not None
    trained = float(shape.params_total) if trained is None else trained
    products = flops / (rates(shape, machine, dtype).training * TRAIN_EFFICIENCY)
    each = TRAIN_ELEMENTS * (LORA_ELEMENTS if lora else 1.0)
    elements = _elements_seconds(shape, tokens, machine, each)
    moved = OPTIMISER_BYTES + ACCUMULATE_BYTES * micro_batches
    optimiser = steps * moved * trained / (machine.bandwidth * STREAMING)
    written = checkpoints * STATE_BYTES * trained + 2.0 * shape.params_total
    return PROCESS_START + products + elements + optimiser + written / FILE_RATE


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
    """Seconds of a generate or eval stage: process and engine start, prefill, decoding and verdicts. Token counts are
    totals.

    A decoding step yields one token of each running sequence and takes at least as long as reading the weights.
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
    weights = shape.params_total * BYTES[dtype]
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
    """Seconds of the rollout engine of a policy stage: its start, and per rollout `sequences` completions and one
    weight update.

    prompt, reply: tokens of each.
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
    """Seconds of a forward pass in the trainer, of a teacher, the reference or the rollout policy."""
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
    """Seconds of a score stage: process and engine start and one forward pass of `flops` (as `forward_flops` counts
    them) over `tokens`, of which `scored` have their logits read."""
    products = flops / (rates(shape, machine, dtype).forward * PREFILL_EFFICIENCY)
    elements = _elements_seconds(shape, tokens, machine, FORWARD_ELEMENTS)
    logits = 0.0 if machine.device == "cuda" else scored * shape.vocab * TOKEN_SECONDS
    return PROCESS_START + engine_start(engine) + products + elements + logits


def predict_prune_seconds(shape: ModelShape) -> float:
    """Seconds to read a model and write it in bfloat16."""
    return PROCESS_START + 2.0 * shape.params_total / FILE_RATE


def predict_filter_seconds(traces: int, seconds_a_trace: float = 1e-4) -> float:
    """Seconds to read the verdict columns of traces and filter them."""
    return LIGHT_START + traces * seconds_a_trace


def predict_trace_bytes(traces: int, positions: float, entries_a_position: float, *, shard_rows: int = 256) -> float:
    """Bytes of compressed shards. entries_a_position: mean number of entries kept (confident positions keep one), 0 for
    none captured.

    Not counted: the smaller shards of a slow writer, which closes one every half minute.
    """
    shards = math.ceil(traces / shard_rows)
    kept = CAPTURED_BYTES + ENTRY_BYTES * entries_a_position if entries_a_position else 0.0
    return shards * SHARD_BYTES + traces * ROW_BYTES + positions * (POSITION_BYTES + kept)
