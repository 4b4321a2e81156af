"""Memory by parts: against published figures (each with its source), torch's own counts, and counts by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distill.compute import memory
from distill.compute.adapters import lora_params, saved_params
from distill.compute.memory import Memory, cache_bytes, engine_memory, train_memory
from distill.models.architectures import entries, known_config
from distill.models.shape import ModelShape
from distill.recipe import DistributedConfig, LoraConfig

GIB = 2.0**30


def known(name: str) -> ModelShape:
    found = known_config(name)
    assert found is not None
    return ModelShape.from_config(found[1])


def fsdp2(processes: int, **more: Any) -> DistributedConfig:
    return DistributedConfig(processes=processes, strategy="fsdp2", **more)


# --------------------------------------------------------------------------------------------- published


def test_a_sharded_state_is_zeros_sixteen_bytes_a_parameter() -> None:
    """Rajbhandari et al. 2020, figure 1: a model of 7.5B parameters takes 120 GB, 16 bytes a parameter, and 1.9 GB sharded
    over 64 GPUs with ZeRO-3. Ours: 2 weight, 4 master, 8 moments, and 2 of bf16 gradient; sharded 4 weight, 8, 4."""
    shape = ModelShape.from_params(7.5e9)
    size = shape.params_total
    whole = train_memory(shape, 1, micro_batches=1, on_cpu=False)
    assert whole.weights + whole.masters + whole.moments + 2 * size == pytest.approx(120e9, rel=0.03)
    part = train_memory(shape, 1, micro_batches=1, parallel=fsdp2(64), on_cpu=False)
    assert part.weights + part.masters + part.moments + 4 * size / 64 == pytest.approx(1.9e9, rel=0.04)


def test_more_processes_free_what_torchtitan_measured() -> None:
    """torchtitan's benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3: Llama 3.1 8B with FSDP2 takes 77.0 GiB on 8
    and 62.0 GiB on 128 GPUs (82.4 and 67.0 without torch.compile)."""
    shape = known("Llama-3.1-8B")

    def state(processes: int) -> float:
        held = train_memory(shape, 16384, micro_batches=1, parallel=fsdp2(processes), on_cpu=False)
        return held.weights + held.masters + held.moments + 4 * shape.params_total / processes

    assert (state(8) - state(128)) / GIB == pytest.approx(15.0, rel=0.1)


@pytest.mark.parametrize(("model", "gigabytes"), [("SmolLM2-135M", 16), ("Qwen2.5-1.5B", 72)])
def test_a_training_step_takes_what_was_measured_on_an_h100(model: str, gigabytes: float) -> None:
    """tests/bench/RESULTS.md: one micro-batch of 16,384 tokens a step in bfloat16, torch's count of allocated bytes."""
    predicted = train_memory(known(model), 16384, micro_batches=1, on_cpu=False)
    assert (predicted.total - predicted.process) / 1e9 == pytest.approx(gigabytes, rel=0.05)


@pytest.mark.parametrize(
    ("model", "bytes_a_token"),
    [
        # 2 x layers x key-value heads x head size x 2 bytes, from the models' cards.
        ("Meta-Llama-3-8B", 131_072),
        ("Mistral-7B-v0.3", 131_072),
        ("Qwen2.5-7B-Instruct", 57_344),
        # Zhao et al. 2025 (Insights into DeepSeek-V3, arXiv:2505.09343), table 1.
        ("DeepSeek-V3", 70_272),
        ("Qwen2.5-72B", 327_680),
        ("Llama-3.1-405B", 516_096),
    ],
)
def test_a_token_in_the_cache(model: str, bytes_a_token: int) -> None:
    assert cache_bytes(known(model), "bfloat16", 1) == bytes_a_token


def test_the_cache_of_a_rollout() -> None:
    """512 sequences of 2,248 tokens on a 7B model with grouped heads."""
    held = engine_memory(known("Qwen2.5-7B"), 512, 2248, cache_gib=None, on_cpu=False)
    assert held.cache / GIB == pytest.approx(61.5, abs=0.1)
    assert held.engine == pytest.approx(2 * 7_615_616_512, rel=1e-3)


def test_layers_with_a_window_cache_the_window() -> None:
    """Gemma 3 (arXiv:2503.19786, section 2.2): five layers of six attend to 1,024 positions."""
    shape = known("gemma-3-27b-it")
    assert (shape.window, shape.windowed, shape.layers) == (1024, 52, 62)
    each = 2 * 2 * 16 * 128
    assert cache_bytes(shape, "bfloat16", 32768) == each * (10 * 32768 + 52 * 1024)


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry["names"][0])
def test_the_table_has_the_published_sizes(entry: dict[str, Any]) -> None:
    """The number of parameters in the safetensors' metadata on the hub; a tied head counts once."""
    shape = ModelShape.from_config(entry)
    assert shape.params_total == pytest.approx(entry["params"], rel=1e-3)


@pytest.mark.parametrize(
    ("model", "active"), [("DeepSeek-V3", 37e9), ("Qwen3-30B-A3B", 3.3e9), ("Qwen3-235B-A22B", 22e9)]
)
def test_the_experts_that_a_token_passes(model: str, active: float) -> None:
    """As the model's cards say, with embeddings."""
    shape = known(model)
    assert shape.params_matmul + shape.params_head == pytest.approx(active, rel=0.03)


def test_names_that_change_no_size_are_known_and_others_are_not() -> None:
    for name in ("Qwen/Qwen2.5-7B-Instruct", "me/qwen2.5-7b", "google/gemma-3-4b-it", "Qwen/Qwen3-4B-Instruct-2507"):
        assert known_config(name) is not None, name
    for name in (
        "Qwen/Qwen2.5-7B-Instruct-AWQ",
        "me/Qwen2.5-7B-pruned-4B",
        "me/Qwen2.5-70B",
        "meta-llama/Llama-3.2-11B-Vision",
    ):
        assert known_config(name) is None, name
    distilled, plain = known("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"), known("Qwen/Qwen2.5-1.5B")
    assert (distilled.tied, plain.tied) == (False, True)


# ---------------------------------------------------------------------------------------- torch's own counts


def tiny(kind: str, layers: int, dtype: torch.dtype = torch.float32, lora: LoraConfig | None = None) -> Any:
    config = AutoConfig.for_model(kind)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
    }
    for key, value in {**sizes, "num_hidden_layers": layers, "vocab_size": 128, "pad_token_id": 0}.items():
        setattr(config, key, value)
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * layers
    model = AutoModelForCausalLM.from_config(config).to(dtype).train()
    if lora is None:
        return model
    from distill.models import add_lora

    return add_lora(model, lora)


def saved_bytes(model: Any) -> float:
    """Bytes a token that autograd saves for the backward pass of the layers; docs of 32 tokens."""
    import numpy as np

    from distill.training.forward import ForwardPlan
    from distill.training.packing import Example, pack

    rng = np.random.default_rng(0)
    words = [rng.integers(3, 100, (2, 16)).astype(np.int32) for _ in range(8)]
    (batch,) = pack([Example(str(n), *each) for n, each in enumerate(words)], micro_tokens=1024)
    plan = ForwardPlan.of(model, 100)
    plan.apply(model)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, torch.Tensor] = {}  # kept, so that no address is used twice

    def pack_tensor(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_tensor, lambda tensor: tensor):
        held = plan.hidden(model, batch.to_torch("cpu"), torch.from_numpy(batch.weight_T.nonzero()[0]))
    del held
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values()) / len(batch.ids_T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_activations_are_what_autograd_saves(kind: str, lora: LoraConfig | None, dtype: torch.dtype) -> None:
    two, four = tiny(kind, 2, dtype, lora), tiny(kind, 4, dtype, lora)
    counted = (saved_bytes(four) - saved_bytes(two)) / 2
    shape = ModelShape.from_config({**two.config.to_dict(), "num_hidden_layers": 1})
    predicted = memory._activation_bytes(shape, dtype.itemsize, lora is not None, False, 32, True)
    assert predicted == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "olmo2", "phi3"])
def test_activations_of_other_layers_are_near_what_autograd_saves(kind: str) -> None:
    two, four = tiny(kind, 2, torch.bfloat16), tiny(kind, 4, torch.bfloat16)
    counted = (saved_bytes(four) - saved_bytes(two)) / 2
    shape = ModelShape.from_config({**two.config.to_dict(), "num_hidden_layers": 1})
    assert memory._activation_bytes(shape, 2, False, False, 32, True) == pytest.approx(counted, rel=0.2)


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("llama", "all-linear"),
        ("llama", ["q_proj", "v_proj"]),
        ("llama", r".*\.(up|down)_proj"),
        ("phi3", ["qkv_proj", "o_proj"]),
        ("phi3", "all-linear"),
        ("qwen3_moe", "all-linear"),
    ],
)
def test_adapters_have_the_parameters_that_peft_trains(kind: str, targets: str | list[str]) -> None:
    lora = LoraConfig(rank=3, target_modules=targets)
    model = tiny(kind, 2, lora=lora)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shape = ModelShape.from_config(model.config.to_dict())
    assert lora_params(shape, lora) == trained


def test_a_module_that_is_trained_whole_counts_whole() -> None:
    shape = known("Llama-3.1-8B")
    lora = LoraConfig(rank=8, modules_to_save=["lm_head"])
    assert saved_params(shape, lora) == shape.params_head
    held, adapters = train_memory(shape, 1024, lora=lora), lora_params(shape, lora)
    assert held.moments == 8 * (adapters + shape.params_head)
    assert held.masters == 4 * shape.params_head


def test_the_heads_chunk_is_the_trainers() -> None:
    from distill.training.loss.kernels import chunks, fused

    assert memory.CHUNK_BYTES == chunks.CHUNK_BYTES
    assert (memory.CHUNK_ROWS, memory.TILE) == (chunks.CPU_ROWS, fused.TILE)


# ------------------------------------------------------------------------------------------------ by hand


def test_gradients_take_the_memory_that_activations_free() -> None:
    shape = known("SmolLM2-135M")
    size = shape.params_total
    small = train_memory(shape, 1, micro_batches=1, on_cpu=False)
    assert small.gradients + small.activations + small.head == 4 * size
    several = train_memory(shape, 1, micro_batches=2, on_cpu=False)
    # The sum of the micro-batches before, and 2 bytes of the last one's own.
    assert several.gradients + several.activations + several.head == 6 * size
    large = train_memory(shape, 65536, micro_batches=1, on_cpu=False)
    assert large.gradients == 0


def test_shards_are_divided_and_gradients_of_several_micro_batches_are_whole() -> None:
    shape = known("Qwen2.5-7B")
    alone, many = (train_memory(shape, 4096, micro_batches=2, parallel=fsdp2(n), on_cpu=False) for n in (1, 8))
    assert many.moments == alone.moments / 8 == shape.params_total
    assert many.weights == alone.weights / 8
    assert many.gradients == alone.gradients >= 4 * shape.params_total
    once = train_memory(shape, 4096, micro_batches=1, parallel=fsdp2(8), on_cpu=False)
    assert once.gradients < 4 * shape.params_total / 8
    # A teacher is sharded too, but for its embedding and head.
    taught = train_memory(shape, 4096, teachers=[shape], parallel=fsdp2(8), on_cpu=False)
    assert taught.teachers == 2 * shape.params_total / 8
    assert taught.gathered - many.gathered == 2 * 2 * shape.params_head


def test_offloaded_shards_are_in_main_memory() -> None:
    shape = known("Qwen2.5-7B")
    held = train_memory(shape, 4096, micro_batches=1, parallel=fsdp2(4, offload=True), on_cpu=False)
    assert held.weights == held.moments == 0
    assert held.offloaded == 16 * shape.params_total / 4
    assert "offloaded" not in held.parts()


def test_parts_add_up() -> None:
    both = Memory(weights=1, cache=2) + Memory(weights=3, offloaded=5)
    assert (both.weights, both.total, both.offloaded) == (4, 6, 5)
