"""The environment of an engine's process, and the modules that importing the package must not load."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
from project import SUMS

from distill import engines, recipe
from distill.recipe import EngineConfig
from distill.records import UserError
from distill.run.nodes import nodes
from distill.run.readiness import check_ready

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


def test_draws_run_on_the_runner_that_gives_them_unless_the_user_asks_for_the_other(monkeypatch):
    config = EngineConfig(fn="vllm")
    monkeypatch.delenv(engines.RUNNER_V2, raising=False)
    assert engines.RUNNER_V2 not in engines.environment(config)
    assert engines.environment(config, tail_draws=4)[engines.RUNNER_V2] == "0"
    monkeypatch.setattr(engines, "_is_cpu_build", lambda: False)
    engines.check_draws(config, 4)
    monkeypatch.setenv(engines.RUNNER_V2, "1")
    assert engines.RUNNER_V2 not in engines.environment(config, tail_draws=4)
    engines.check_draws(config, 0)
    engines.check_draws(EngineConfig(fn="transformers"), 4)
    with pytest.raises(UserError, match=r"tail_draws: .*unset VLLM_USE_V2_MODEL_RUNNER"):
        engines.check_draws(config, 4)


def test_draws_that_the_environment_prevents_are_refused_before_the_run(monkeypatch):
    monkeypatch.setenv(engines.RUNNER_V2, "1")
    monkeypatch.setattr(engines, "_is_cpu_build", lambda: False)
    stage = {"kind": "generate", "model": "base", "task": "sums", "problems": 2, "tail_draws": 4, "engine": "vllm"}
    tree = {"name": "a", "models": {"base": "owner/name"}, "tasks": {"sums": SUMS}, "stages": {"traces": stage}}
    (node,) = nodes(recipe.validate(tree))
    with pytest.raises(UserError, match=r"stages\.traces\.tail_draws: .*unset VLLM_USE_V2_MODEL_RUNNER"):
        check_ready(node)


@pytest.mark.skipif(
    not os.environ.get("CI") or sys.platform != "linux" or platform.machine() not in WHEELS,
    reason="elsewhere vLLM may be missing",
)
def test_continuous_integration_has_vllm():
    """Setup succeeds without vLLM; in CI that would skip most engine tests unnoticed."""
    assert engines.expected(EngineConfig()) == "vllm"
