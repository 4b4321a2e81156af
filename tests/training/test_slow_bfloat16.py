"""A machine whose processor has no quick bfloat16 (made so where it is not one): training and generation are still quick."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench" / "bench_machine.py"
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


@pytest.mark.slow
def test_training_and_generation_reach_a_third_of_the_float32_multiplier(tmp_path: Path) -> None:
    """Shares are by CPU time, of the better of float32 and bfloat16 as measured in the same process."""
    done = subprocess.run(
        [sys.executable, BENCH, "--rounds", "1", "--tokens", "512", "--batch", "16", "--busy", "--out", tmp_path],
        env={**os.environ, **AVX2},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["what"]: row for row in json.loads((tmp_path / "machine.json").read_text())["rows"]}
    assert rows["dtype, training"]["figure"] == "float32"
    assert rows["dtype, engine"]["figure"] == "float32"
    for work in ("train, CE", "train, KL", "score in the trainer", "generate, top 64"):
        assert rows[work]["best share"] > 1 / 3, done.stdout
