"""The environment of an engine's process, and the modules that importing the package must not load."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from distill import engines
from distill.recipe import EngineConfig

WHEELS = ("x86_64", "aarch64")


def test_importing_the_package_loads_neither_torch_nor_vllm():
    code = "import sys, distill.engines; print(sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_the_environment_keeps_vllm_in_process_and_what_the_user_set(monkeypatch):
    for key in ("OMP_NUM_THREADS", "VLLM_LOGGING_LEVEL"):
        monkeypatch.delenv(key, raising=False)
    config = EngineConfig(fn="vllm")
    wanted = engines.environment(config)
    assert wanted["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert wanted["VLLM_LOGGING_LEVEL"] == "WARNING"
    assert all(isinstance(value, str) for value in wanted.values())
    if "OMP_NUM_THREADS" in wanted:
        assert wanted["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    assert "VLLM_LOGGING_LEVEL" not in engines.environment(config)
    assert engines.environment(EngineConfig(fn="reference")) == {}


@pytest.mark.skipif(
    not os.environ.get("CI") or sys.platform != "linux" or platform.machine() not in WHEELS,
    reason="elsewhere vLLM may be missing",
)
def test_continuous_integration_has_vllm():
    """Setup succeeds without vLLM; in CI that would skip most engine tests unnoticed."""
    assert engines.expected(EngineConfig()) == "vllm"
