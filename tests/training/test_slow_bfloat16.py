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


# Products in slow bfloat16 would take 10 to 300 times as long. Generation of 16 completions at a time waits for the memory
# that holds the weights more than for the multiplier, the more so the wider the multiplier is.
LEAST = {"train, CE": 1 / 5, "train, KL": 1 / 5, "score in the trainer": 1 / 5, "generate, top 64": 1 / 8}
"""Share of the multiplier that each kind of work reaches at least."""


@pytest.mark.slow
def test_training_and_generation_reach_their_share_of_the_float32_multiplier(tmp_path: Path) -> None:
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
    for work, least in LEAST.items():
        assert rows[work]["best share"] > least, done.stdout
