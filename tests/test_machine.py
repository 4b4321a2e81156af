"""The measurement behind dtype: auto: on this machine, on one with slow bfloat16, and the choice from given rates."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from distill import machine
from distill.machine import Machine, Rates, choose

AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
"""Environment that limits a processor with AVX-512 or AMX to AVX2."""


def made_up(bfloat16: float | None, device: str = "cpu") -> Machine:
    """A machine whose float32 products run at 100 GFLOP/s and whose bfloat16 ones at `bfloat16`."""
    rates = {"float32": Rates(*[100e9] * 4)}
    if bfloat16 is not None:
        rates["bfloat16"] = Rates(*[bfloat16] * 4)
    return Machine("key", device, "made up", 2, 16e9, 1e10, {"64x256": rates})


@pytest.mark.parametrize(
    ("rate", "device", "setting", "dtype", "why"),
    [
        (400e9, "cpu", "auto", "bfloat16", "bfloat16 400, float32 100 GFLOP/s"),
        (20e9, "cpu", "auto", "float32", "bfloat16 20, float32 100 GFLOP/s"),
        (20e9, "cpu", "bfloat16", "bfloat16", "5 times slower here than float32"),
        (90e9, "cpu", "bfloat16", "bfloat16", "as the recipe says"),
        (400e9, "cpu", "float32", "float32", "4 times slower here than bfloat16"),
        (50e9, "cuda", "auto", "bfloat16", "made up) has bfloat16"),
        (None, "cuda", "auto", "float32", "made up) lacks bfloat16"),
        (None, "cuda", "bfloat16", "bfloat16", "does not support bfloat16 in hardware"),
    ],
)
@pytest.mark.parametrize("purpose", ["training", "engine"])
def test_auto_takes_the_faster_dtype_and_a_slow_setting_is_kept_and_said(
    rate: float | None, device: str, setting: str, dtype: str, why: str, purpose: str
) -> None:
    choice = choose(made_up(rate, device), (64, 256), setting, purpose)
    assert choice.dtype == dtype
    assert why in choice.why


def test_training_weighs_all_three_products_and_an_engine_the_forward_one() -> None:
    """bfloat16 that is fast forward and very slow backward, as with AVX2: the engine's choice, not the trainer's."""
    rates = {
        "float32": Rates(100e9, 100e9, 100e9, 100e9),
        "bfloat16": Rates(150e9, 2e9, 150e9, 150e9),
    }
    half = Machine("key", "cpu", "made up", 2, 16e9, 1e10, {"64x256": rates})
    assert rates["bfloat16"].training == pytest.approx(3 / (2 / 150e9 + 1 / 2e9))
    assert choose(half, (64, 256), "auto", "training").dtype == "float32"
    assert choose(half, (64, 256), "auto", "engine").dtype == "bfloat16"


@pytest.mark.parametrize(
    ("config", "width"),
    [
        ({"hidden_size": 576, "intermediate_size": 1536}, (576, 1536)),
        ({"n_embd": 768, "n_inner": None}, (768, 3072)),
        ({"text_config": {"hidden_size": 640, "intermediate_size": 2048}}, (640, 2048)),
        ({"d_model": 512, "ffn_dim": 2048}, (512, 2048)),
    ],
)
def test_a_models_width_is_read_off_its_config(config: dict, width: tuple[int, int]) -> None:
    assert machine.width_of(config) == width


def test_a_measurement_is_taken_once_and_kept_by_cache_and_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    run.mkdir()
    (run / "environment.json").write_text(json.dumps({"distill": "1"}))
    first = machine.of_run(run, [(64, 256)], cache)
    assert "machine" not in json.loads((run / "environment.json").read_text())
    assert machine.in_stage(run, (64, 256), cache) == first
    kept = json.loads((run / "environment.json").read_text())
    assert kept["distill"] == "1"
    assert Machine.from_json(kept["machine"]) == first
    assert first.rates["64x256"].keys() == {"float32", "bfloat16"}
    assert all(rate > 1e6 for rate in kept["machine"]["rates"]["64x256"]["float32"].values())

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("measured a second time")

    monkeypatch.setattr(machine.subprocess, "run", refuse)
    assert machine.of_run(run, [(64, 256)], tmp_path / "no cache") == first
    assert machine.in_stage(run, (64, 256), tmp_path / "no cache") == first
    assert machine.measured([(64, 256)], cache) == first
    for file in cache.iterdir():
        os.utime(file, (0, 0))
    with pytest.raises(AssertionError, match="second time"):
        machine.measured([(64, 256)], cache)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    with pytest.raises(AssertionError, match="second time"):
        machine.of_run(run, [(64, 256)], tmp_path / "no cache")
    # A stage with other environment variables than its parent uses the parent's measurement.
    assert machine.in_stage(run, (64, 256), tmp_path / "no cache") == first
    with pytest.raises(AssertionError, match="second time"):
        machine.in_stage(run, (32, 64), tmp_path / "no cache")


def test_measuring_takes_well_under_a_second_also_where_bfloat16_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine limited to AVX2, training uses float32."""
    for key, value in AVX2.items():
        monkeypatch.setenv(key, value)
    found = machine.measured([(576, 1536)], tmp_path)
    rates = found.at((576, 1536))
    assert choose(found, (576, 1536), "auto", "training").dtype == "float32"
    assert rates["float32"].training > 2 * rates["bfloat16"].training


def test_the_measurement_itself_is_short() -> None:
    machine.measure([(64, 256)])
    began = time.process_time()
    machine.measure([(576, 1536)])
    # CPU seconds of two threads: other work on the machine does not count.
    assert time.process_time() - began < 2.0
