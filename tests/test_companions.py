"""Torch's companions of another build are invisible; those that fit are left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distill import companions

ROOT = Path(__file__).resolve().parents[1]


def packages(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / f"{name}.dist-info").mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("installed", "machine", "hidden"),
    [
        (["torch-2.13.0+cpu", "torchvision-0.28.0"], "x86_64", {"torchvision": "0.28.0"}),
        (["torch-2.13.0+cpu", "torchvision-0.28.0+cpu", "torchaudio-2.11.0"], "x86_64", {"torchaudio": "2.11.0"}),
        (["torch-2.13.0+cpu", "torchcodec-0.17.0+cu130"], "x86_64", {"torchcodec": "0.17.0+cu130"}),
        (["torch-2.13.0", "torchvision-0.28.0"], "x86_64", {}),
        (["torch-2.13.0+cu130", "torchvision-0.28.0"], "x86_64", {}),
        (["torch-2.13.0+cpu", "torchvision-0.28.0"], "aarch64", {}),
        (["torchvision-0.28.0"], "x86_64", {}),
    ],
)
def test_builds_for_cuda_beside_a_cpu_torch_are_misfits(tmp_path, installed, machine, hidden):
    assert companions.misfits([str(packages(tmp_path, *installed)), str(tmp_path / "none")], machine) == hidden


def test_the_first_path_counts(tmp_path):
    first = packages(tmp_path / "a", "torchvision-0.28.0+cpu", "torch-2.13.0+cpu")
    second = packages(tmp_path / "b", "torchvision-0.28.0")
    assert companions.misfits([str(first), str(second)], "x86_64") == {}
    assert companions.misfits([str(second), str(first)], "x86_64") == {"torchvision": "0.28.0"}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="builds for CUDA have the same names only on x86_64")
def test_a_misfit_is_not_there_for_libraries_and_version_says_so(tmp_path):
    """A torchvision that raises when it is imported, as the real one does; what looks for it finds nothing."""
    packages(tmp_path, "torch-2.13.0+cpu", "torchvision-0.28.0")
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    code = "import distill, importlib.util; print(importlib.util.find_spec('torchvision')); import torchvision"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "None"
    assert "ModuleNotFoundError" in done.stderr
    version = [sys.executable, "-m", "distill.cli", "--version"]
    said = subprocess.run(version, env=env, capture_output=True, text=True, check=True).stdout
    assert "hidden, because they are not builds for this torch: torchvision 0.28.0" in said
