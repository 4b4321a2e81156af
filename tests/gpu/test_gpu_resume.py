"""Training on a GPU that goes on in another process equals training in one go."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("resumed_training.py")


def trained(tiny_dir, folder, dtype, stop_after=-1):
    command = [sys.executable, str(SCRIPT), str(tiny_dir), str(folder), dtype, str(stop_after)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    weights = folder / "weights.pt"
    return done.stdout, torch.load(weights) if weights.is_file() else None


def farthest(a, b):
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_resumed_equals_uninterrupted(tiny_dir, tmp_path, dtype):
    """A GPU adds some sums in another order each time: two uninterrupted runs say by how much their weights differ."""
    _, whole = trained(tiny_dir, tmp_path / "whole", dtype)
    _, again = trained(tiny_dir, tmp_path / "again", dtype)
    _, nothing = trained(tiny_dir, tmp_path / "cut", dtype, stop_after=5)
    assert nothing is None
    said, resumed = trained(tiny_dir, tmp_path / "cut", dtype)
    assert "resumed on {'cuda'}" in said
    noise = farthest(again, whole)
    print(f"{dtype}: two runs differ by {noise:.2g}, the resumed one by {farthest(resumed, whole):.2g}")
    assert farthest(resumed, whole) <= 10 * noise
