"""GPUs by name, and predicted speed on them against published and measured figures."""

from __future__ import annotations

import pytest

from distill.compute import cards, estimate, flops
from distill.models.architectures import known_config
from distill.models.shape import ModelShape
from distill.recipe import DistributedConfig
from distill.records import UserError


def tokens_per_second(model: str, tokens: int, context: float, heads: float, processes: int = 1) -> float:
    """Predicted training speed of one H100, one micro-batch a step; heads: share of the tokens that have a loss."""
    found = known_config(model)
    assert found is not None
    shape = ModelShape.from_config(found[1])
    machine = cards.parse("h100").machine([(shape.hidden, shape.intermediate)])
    work = 100 * flops.train_flops(shape, tokens, context, heads * tokens)

    def seconds(steps: int) -> float:
        done = steps / 100
        parallel = DistributedConfig(processes=processes, strategy="fsdp2")
        own = estimate.predict_train_seconds(shape, work * done, 100 * tokens * done, steps, machine, checkpoints=0)
        return own + estimate.exchange_seconds(shape, None, steps, 1, machine, "bfloat16", parallel)

    return 100 * tokens / (seconds(200) - seconds(100))


@pytest.mark.parametrize(("model", "measured"), [("SmolLM2-135M", 147_700), ("Qwen2.5-1.5B", 38_300)])
def test_training_on_an_h100_takes_what_was_measured(model: str, measured: float) -> None:
    """tests/bench/RESULTS.md: 16,384 packed tokens a step, traces of about 500 tokens."""
    assert tokens_per_second(model, 16384, 250, 0.75) == pytest.approx(measured, rel=0.1)


def test_llama_on_eight_h100_is_near_torchtitan() -> None:
    """torchtitan's benchmarks/llama3_h100_202412_torchtitan.md, table 1: Llama 3.1 8B, FSDP2, 2 x 8,192 tokens a GPU: 5,762
    tokens/s each, 6,667 with torch.compile, on H100s with less memory bandwidth and power than the table's."""
    assert 5_762 < tokens_per_second("Llama-3.1-8B", 16384, 4096, 1.0, 8) < 1.35 * 6_667


def test_a_name_and_a_count_are_read() -> None:
    many = cards.parse("H100:8")
    assert (many.key, many.count, many.name) == ("h100", 8, "NVIDIA H100 SXM 80 GB")
    assert cards.parse("4090").count == 1
    assert 39 < cards.parse("a100-40").memory / cards.GIB < 40


@pytest.mark.parametrize("text", ["h1000", "h100:80GB", "h100:0", "h100:", "", "gpu:8"])
def test_anything_else_is_refused_with_the_names(text: str) -> None:
    with pytest.raises(UserError, match=r"Known: h100, .*a100-40.*mi300x"):
        cards.parse(text)
