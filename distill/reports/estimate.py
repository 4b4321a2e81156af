"""How long work will take: this machine's speed, measured in under a second, and counts turned into seconds.

Comes in: token counts, FLOPs (`flops`) and a `Machine`. Goes out: seconds and bytes. The constants below
describe one two-core CPU machine and carry over to others only through the measured speeds: an estimate is
meant to be right within a factor of two, and every report prints it beside what was measured.
Left out on purpose: measuring accelerators (no torch here); a caller that has one builds its `Machine`.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from distill.reports.flops import ModelShape, generate_flops

Dtype = Literal["bfloat16", "float32"]

PROCESS_START = 12.0
"""Seconds for a stage's own process to import torch and transformers and to load a small model."""
ENGINE_START = {"vllm": 20.0, "transformers": 4.0, "reference": 1.0}
"""Seconds from a loaded process to an engine's first token (import, weights, cache, warm-up)."""
LIGHT_START = 3.0
"""Seconds for a stage that loads no model."""
TRAIN_EFFICIENCY = 0.45
"""Share of the matmul rate that a packed forward and backward pass reaches."""
PREFILL_EFFICIENCY = 0.35
DECODE_EFFICIENCY = 0.12
"""Share of the matmul rate in decoding: matmuls of a few dozen rows."""
DECODE_STEP_OVERHEAD = 0.008
"""Seconds a decoding step spends outside the model: scheduling, sampling, collecting log-probabilities."""
OPTIMISER_BYTES = 36
"""Bytes moved a parameter and optimiser step: fp32 weight, two moments and gradient read and written, bf16 copy."""
VERIFY_SECONDS = 0.002
"""A rule-based verdict on one completion."""
SHARD_BYTES = 8000
"""Bytes of a shard with next to nothing in it: its schema twice (Parquet's and Arrow's) and each column's own header."""
ROW_BYTES = 36
"""Bytes of a trace's own columns: two ids that do not compress (18), the question as text and ids, answer, verdicts."""
POSITION_BYTES = 2.5
"""Bytes of a completion's position: text, id and log-probability. One formula over and over takes 1.2, prose 5."""
CAPTURED_BYTES = 1.4
"""Bytes more of a position whose distribution is kept: its number of candidates and its tail."""
ENTRY_BYTES = 2.0
"""Bytes of one kept candidate: its id and log-probability. 0.8 where a model is sure and repeats itself, 2.6 where not."""

BF16_FACTORS = {"amx_bf16": 4.0, "avx512_bf16": 1.5, "": 0.6}
"""bf16 matmul rate over fp32's, by the CPU's flag; without either, bf16 is emulated."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What decides how long work takes here.

    matmul_flops: fp32 matmul rate, FLOP/s, with all threads. bf16_factor: bf16's rate over it. bandwidth:
    memory, bytes/s. memory: bytes.
    """

    device: str
    cores: int
    matmul_flops: float
    bf16_factor: float
    bandwidth: float
    memory: float

    def rate(self, dtype: Dtype) -> float:
        """Matmul FLOP/s in a dtype."""
        return self.matmul_flops * (self.bf16_factor if dtype == "bfloat16" else 1.0)


def calibrate(size: int = 1024, repeats: int = 4) -> Machine:
    """Measure this machine's CPU: the best of a few fp32 matmuls and memory copies, well under a second."""
    rng = np.random.default_rng(0)
    a, b = (rng.random((size, size), np.float32) for _ in range(2))
    source = np.ones(32 << 20, np.uint8)
    target = np.empty_like(source)

    def best(work: Callable[..., object], *args: object) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            work(*args)
            times.append(time.perf_counter() - start)
        return max(min(times), 1e-9)

    return Machine(
        device="cpu",
        cores=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        matmul_flops=2.0 * size**3 / best(np.matmul, a, b),
        bf16_factor=bf16_factor(_cpu_flags()),
        bandwidth=2.0 * source.nbytes / best(np.copyto, target, source),
        memory=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
    )


def bf16_factor(flags: set[str]) -> float:
    """bf16's matmul rate over fp32's on a CPU with these flags."""
    return next(factor for flag, factor in BF16_FACTORS.items() if not flag or flag in flags)


def _cpu_flags() -> set[str]:
    """Flags of the first CPU; empty where the system does not list them."""
    listing = Path("/proc/cpuinfo")
    if not listing.is_file():
        return set()
    for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return set()


# ------------------------------------------------------------------------------------------------ seconds


def predict_train_seconds(
    shape: ModelShape, flops: float, steps: int, machine: Machine, dtype: Dtype = "bfloat16"
) -> float:
    """A train stage: its process, `flops` (as `train_flops` counts them) and `steps` optimiser steps."""
    passes = flops / (machine.rate(dtype) * TRAIN_EFFICIENCY)
    optimiser = steps * OPTIMISER_BYTES * shape.params_total / machine.bandwidth
    return PROCESS_START + passes + optimiser


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
    """A generate or eval stage: process, engine start, prefill, decoding and verdicts. Token counts are totals.

    A decoding step yields one token of each sequence that runs; it cannot be quicker than reading the weights.
    """
    start = PROCESS_START + ENGINE_START.get(engine, ENGINE_START["vllm"])
    if sequences <= 0:
        return start
    decode_flops = generate_flops(shape, prompt_tokens, new_tokens, sequences)
    prefill_flops = 2.0 * shape.params_body * prompt_tokens
    width = min(batch_size, sequences)
    decode_steps = math.ceil(new_tokens / width)
    weights = shape.params_total * (2 if dtype == "bfloat16" else 4)
    arithmetic = (decode_flops - prefill_flops) / (machine.rate(dtype) * DECODE_EFFICIENCY)
    decode = max(arithmetic, decode_steps * weights / machine.bandwidth)
    prefill = prefill_flops / (machine.rate(dtype) * PREFILL_EFFICIENCY)
    return (
        start + prefill + decode + decode_steps * DECODE_STEP_OVERHEAD + sequences * verify_seconds
    )


def predict_score_seconds(
    shape: ModelShape,
    flops: float,
    machine: Machine,
    dtype: Dtype = "bfloat16",
    engine: str = "vllm",
) -> float:
    """A score stage: process, engine start and one forward pass of `flops` (as `forward_flops` counts them)."""
    start = PROCESS_START + ENGINE_START.get(engine, ENGINE_START["vllm"])
    return start + flops / (machine.rate(dtype) * PREFILL_EFFICIENCY)


def predict_prune_seconds(shape: ModelShape, machine: Machine) -> float:
    """Read a model and write it: its weights pass memory a few times."""
    return PROCESS_START + 4 * 2.0 * shape.params_total / machine.bandwidth


def predict_filter_seconds(traces: int, seconds_a_trace: float = 1e-3) -> float:
    """Read traces' verdict columns and decide."""
    return LIGHT_START + traces * seconds_a_trace


def predict_trace_bytes(
    traces: int, positions: float, entries_a_position: float, *, shard_rows: int = 256
) -> float:
    """Shards on disk, compressed. entries_a_position: candidates kept on average (confident positions keep one), 0 for none captured.

    Left out: what a slow writer adds, which closes a shard every half minute whatever is in it.
    """
    shards = math.ceil(traces / shard_rows)
    kept = CAPTURED_BYTES + ENTRY_BYTES * entries_a_position if entries_a_position else 0.0
    return shards * SHARD_BYTES + traces * ROW_BYTES + positions * (POSITION_BYTES + kept)
