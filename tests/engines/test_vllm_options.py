"""The options that vLLM is started with: what they say, when a GPU has no room for them, and that vLLM's config takes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from vllm_sources import installed

from distill import engines
from distill.engines.vllm_options import Device, memory_share, options
from distill.recipe import EngineConfig
from distill.records import UserError

GIB = 2**30
CARD = Device("cuda", 80 * GIB, 79 * GIB)


@pytest.fixture(scope="module")
def long_dir(tmp_path_factory) -> Path:
    """The folder of a Qwen2 with a context of 32,768 tokens, without weights."""
    folder = tmp_path_factory.mktemp("long")
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
        "max_position_embeddings": 32768, "tie_word_embeddings": False, "dtype": "bfloat16", "rms_norm_eps": 1e-6,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def made(folder: Path, device: Device = CARD, processes: int = 1, length: int = 1024, **fields: Any) -> dict[str, Any]:
    config = EngineConfig(fn="vllm", dtype="bfloat16", **fields)
    return options(config, folder, max_model_len=length, max_top_k=64, seed=7, device=device, processes=processes)


def test_graphs_on_a_gpu_and_none_on_a_cpu_unless_the_recipe_says_otherwise(long_dir):
    cpu = Device()
    assert made(long_dir)["enforce_eager"] is False
    assert made(long_dir, eager=True)["enforce_eager"] is True
    assert made(long_dir, cpu)["enforce_eager"] is True
    assert made(long_dir, cpu, eager=False)["enforce_eager"] is False


def test_a_sized_cache_comes_with_a_share_that_is_free(long_dir):
    """vLLM's check at the start is of the share, and a cache's size does not lift it."""
    busy = Device("cuda", 80 * GIB, 30 * GIB)
    found = made(long_dir, busy, kv_cache_gib=4)
    assert found["kv_cache_memory_bytes"] == 4 * GIB
    assert found["gpu_memory_utilization"] * busy.total < busy.free
    assert made(long_dir, kv_cache_gib=4)["gpu_memory_utilization"] == 0.92
    with pytest.raises(UserError, match=r"engine\.kv_cache_gib: .* 40 GiB .*30\.0 of the GPU's 80\.0 GiB are free"):
        made(long_dir, busy, kv_cache_gib=40)


def test_a_share_that_is_not_free_is_refused_with_one_that_is(long_dir):
    busy = Device("cuda", 80 * GIB, 30 * GIB)
    for share in (None, 0.5):
        with pytest.raises(UserError, match=r"et (engine\.memory_share|it) to 0\.37\d? or less") as error:
            made(long_dir, busy, memory_share=share)
        advised = float(str(error.value).split(" to ")[1].split(" ")[0])
        assert made(long_dir, busy, memory_share=advised)["gpu_memory_utilization"] == advised
    assert memory_share(EngineConfig(memory_share=0.3), long_dir, busy) == 0.3


def test_what_a_cpu_cannot_do_is_refused_in_a_sentence(long_dir):
    with pytest.raises(UserError, match=r"engine\.sleep: .*no GPU here; remove the key"):
        made(long_dir, Device(), sleep=True)
    with pytest.raises(UserError, match=r"engine\.weight_transfer: .*no GPU here; remove the key"):
        made(long_dir, Device(), ray="local", weight_transfer="nccl")
    with pytest.raises(UserError, match=r"engine\.memory_share: .*no GPU here; set engine\.kv_cache_gib"):
        made(long_dir, Device(), memory_share=0.5)


def test_workers_of_a_split_engine_share_the_cores(monkeypatch):
    if engines.expected(EngineConfig()) != "vllm":
        pytest.skip("vLLM is not installed")
    monkeypatch.setattr(engines, "_is_cpu_build", lambda: True)
    monkeypatch.setattr(engines, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert engines.environment(EngineConfig())["OMP_NUM_THREADS"] == "8"
    assert engines.environment(EngineConfig(tensor_parallel=2))["OMP_NUM_THREADS"] == "4"


@pytest.mark.slow
@pytest.mark.skipif(installed() is None, reason="vLLM is not installed")
@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_vllms_own_config_takes_what_a_gpu_run_passes(long_dir, runner):
    """Through EngineArgs to VllmConfig for CUDA, with a faked card (faked_card.py says how far that goes)."""
    runs = {
        "generate": made(long_dir),
        "beside": made(long_dir, memory_share=0.45),
        "apart": made(long_dir, ray="auto", weight_transfer="nccl"),
        "sleeping": made(long_dir, memory_share=0.45, sleep=True),
        "split": made(long_dir, tensor_parallel=4),
        "of processes": made(long_dir, processes=8, memory_share=0.3, sleep=True),
        "long": made(long_dir, length=32768),
        "sized": made(long_dir, kv_cache_gib=2, eager=True),
        "wrong": made(long_dir, length=40000),
    }
    script = Path(__file__).with_name("faked_card.py")
    done = subprocess.run(
        [sys.executable, str(script), runner, json.dumps(list(runs.values()))],
        capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")] or [done.stdout + done.stderr]
    found = dict(zip(runs, json.loads(line.removeprefix("FOUND ")), strict=True))
    assert "max_model_len" in found.pop("wrong")["error"]
    for name, each in found.items():
        assert "error" not in each, (name, each)
        assert each["v2"] is (runner == "V2")
        assert each["device"] == "cuda"
        assert each["worker"] == "vllm.v1.worker.gpu_worker.Worker"
        assert each["head"] == "torch.float32"
        assert each["logprobs"] == [64, "raw_logprobs"]
        assert each["sequences"] == 64
        assert each["prefix"]
        assert each["chunked"]
        assert each["sharded_sampling"] is False
        assert each["graphs"] == ("NONE" if name == "sized" else "FULL_AND_PIECEWISE"), name
        assert each["sleep"] == [name in ("sleeping", "of processes")] * 2
    assert found["beside"]["share"] == 0.45
    assert found["split"]["executor"] == "mp"
    assert found["split"]["world"] == 4
    assert found["of processes"]["executor"] == "external_launcher"
    assert found["of processes"]["world"] == 1
    assert found["long"]["length"] == 32768
    assert found["sized"]["cache"] == 2 * GIB
