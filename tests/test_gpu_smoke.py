"""`make gpu-smoke`: the script runs on a CPU, a crash or a hang ends one check only, and without a GPU it says so."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "gpu" / "smoke.py"
BAD = """
import ctypes, json, os, subprocess, sys, time
name, device, folder, result = sys.argv[1:]
if name == "crash":
    ctypes.string_at(0)
if name == "hang":
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    time.sleep(60)
if name == "exit":
    sys.exit("out of something")
open(result, "w").write(json.dumps({"status": "ok", "detail": "fine", "error": "", "peak_gib": 1.5}))
"""


@pytest.fixture(scope="module")
def smoke():
    spec = importlib.util.spec_from_file_location("gpu_smoke", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_it_says_so_and_exits_with_3(smoke, capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert smoke.main(["--report", str(tmp_path / "report.json")]) == 3
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("no GPU: torch ")
    assert not (tmp_path / "report.json").exists()


def test_kernels_and_attention_on_a_cpu(smoke, capsys, tmp_path):
    file = tmp_path / "report.json"
    names = ["machine", "kernels", "attention", "vllm_engine"]
    assert smoke.main(["--cpu", "--only", *names, "--report", str(file)]) == 0
    report = json.loads(file.read_text())
    assert [check["name"] for check in report["checks"]] == names
    assert [check["status"] for check in report["checks"]] == ["ok", "ok", "ok", "skipped"]
    assert report["checks"][0]["versions"]["torch"] == torch.__version__
    assert report["checks"][2]["ways"][1:3] == ["window by blocks", "soft cap by blocks"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [[check["status"], check["name"]] for check in report["checks"]]


@pytest.mark.slow
def test_all_that_a_cpu_can_check(smoke, tmp_path):
    file = tmp_path / "report.json"
    assert smoke.main(["--cpu", "--report", str(file)]) == 0, file.read_text()
    found = {check["name"]: check["status"] for check in json.loads(file.read_text())["checks"]}
    assert [name for name, status in found.items() if status == "skipped"] == list(smoke.ON_A_GPU)
    assert tuple(found) == smoke.NAMES


def test_a_check_that_crashes_or_hangs_ends_alone(smoke, tmp_path):
    script = tmp_path / "checks.py"
    script.write_text(BAD)
    results = {name: smoke.run_check(name, "cpu", tmp_path, 3, script) for name in ("crash", "hang", "exit", "well")}
    assert [result["status"] for result in results.values()] == ["failed", "failed", "failed", "ok"]
    assert "SIGSEGV" in results["crash"]["detail"]
    assert results["hang"]["detail"] == "not done after 3 seconds"
    assert results["hang"]["seconds"] < 20
    assert results["exit"]["error"].strip() == "out of something"
    assert smoke.line(results["well"]).split() == [
        "ok",
        "well",
        f"{results['well']['seconds']:.1f}",
        "s",
        "1.5",
        "GiB",
        "fine",
    ]


def test_a_failed_check_makes_the_exit_code_1(smoke, tmp_path, monkeypatch):
    script, file = tmp_path / "checks.py", tmp_path / "report.json"
    script.write_text(BAD)
    run_check = smoke.run_check
    monkeypatch.setattr(smoke, "NAMES", ("exit", "well"))
    monkeypatch.setattr(smoke, "run_check", lambda *arguments: run_check(*arguments, script))
    assert smoke.main(["--cpu", "--only", "exit", "well", "--report", str(file)]) == 1
    assert json.loads(file.read_text())["failed"] == ["exit"]
