"""Ctrl-C and SIGTERM: the run ends soon, even inside C code, leaves no processes behind and says how to continue."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import psutil
import pytest
from needs import slowness
from project import Project

from distill import interrupt
from distill.run.unfinished import kept

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden" / "v1"
SOON = 10.0
"""Seconds from the signal to the end of the command: 2 on an idle machine, more on a busy one. A process that is not
killed would never end."""
MARK = "DISTILL_TEST_RUN"

MODULE = '''
"""A filter and a loss that stay in C code while the file `stay` exists, with a child process in its own session."""
import ctypes, subprocess, time
from pathlib import Path
import numpy as np

def stay(library):
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    lock = (ctypes.c_long * 16)()  # a mutex, unlocked
    library.pthread_mutex_lock(lock)
    Path("inside").write_text(str(child.pid))
    library.pthread_mutex_lock(lock)  # by the thread that holds it: no signal ends this

def sits(group, *, holding: bool = False):
    """holding: whether the C code holds the GIL, so that no Python thread runs."""
    if Path("stay").exists():
        stay((ctypes.PyDLL if holding else ctypes.CDLL)(None))
    return np.ones(len(group), bool)

steps = 0

def slow_loss(student, targets):
    global steps
    steps += 1
    if Path("stay").exists() and steps == 3:
        stay(ctypes.CDLL(None))
    return -student.label_T
'''

WAYS = {
    # how the command is launched, whether the C code holds Python's lock, the signal, to whom, the exit status
    "ctrl-c at a terminal": ([], False, signal.SIGINT, "group", 130),
    "SIGINT to the command alone": ([], True, signal.SIGINT, "command", 130),
    "from a script that ignores SIGINT": (["sh", "-c", 'trap "" INT; "$@"; exit $?', "sh"], True, signal.SIGINT, "group", 130),
    "SIGTERM to the command alone": ([], False, signal.SIGTERM, "command", 143),
}  # fmt: skip


@pytest.fixture
def project(tmp_path) -> Project:
    (tmp_path / "sitting.py").write_text(MODULE)
    (tmp_path / "stay").touch()
    tree = {
        "name": "sit",
        "stages": {"clean": {"kind": "filter", "data": str(GOLDEN), "keep": [{"fn": "sitting:sits"}]}},
    }
    return Project(tmp_path, tree)


class Started:
    """A run on the real command line in its own process group, with its output so far."""

    def __init__(self, project: Project, launcher: list[str]) -> None:
        self.folder, self.mark = project.folder, uuid.uuid4().hex
        self.process = subprocess.Popen(
            [*launcher, *project.command("run", project.recipe.name)],
            cwd=project.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env={**os.environ, MARK: self.mark},
            # Whoever runs the tests in the background hands down an ignored SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        self.lines: list[tuple[float, str]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append((time.time(), line))

    @property
    def said(self) -> str:
        return "".join(line for _, line in self.lines)

    def wait_until_inside(self) -> None:
        """Wait until its stage is in the C code that never returns."""
        deadline = time.monotonic() + 300
        while not (self.folder / "inside").exists():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.01)
        time.sleep(0.2)

    def left(self) -> list[psutil.Process]:
        """The running processes that were started for it, found by their environment."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != "zombie":
                    found.append(process)
            except (psutil.AccessDenied, psutil.NoSuchProcess):
                continue
        return found

    def nothing_left(self) -> bool:
        """Whether all its processes are gone; on a busy machine a killed process takes a moment to end."""
        deadline = time.monotonic() + SOON
        while self.left() and time.monotonic() < deadline:
            time.sleep(0.05)
        return not self.left()

    def send(self, number: int, to: str) -> float:
        """Send a signal; return the seconds until the end."""
        began = time.monotonic()
        if to == "group":
            os.killpg(self.process.pid, number)
        else:
            os.kill(self.process.pid, number)
        self.process.wait(60)
        return time.monotonic() - began

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.left():
            process.kill()


@pytest.mark.parametrize("way", WAYS)
def test_a_stage_in_c_code_ends_soon_with_all_its_descendants(project, way):
    launcher, holding, number, to, status = WAYS[way]
    project.tree["stages"]["clean"]["keep"][0]["holding"] = holding
    project.rewrite()
    with Started(project, launcher) as run:
        run.wait_until_inside()
        assert len(run.left()) >= 3  # the command, the stage, its child
        assert run.send(number, to) < SOON
        assert run.nothing_left()
    assert run.process.returncode == status
    assert "interrupted in clean; run the same command again to continue" in run.said
    assert "Traceback" not in run.said
    standing = project.state("clean")
    assert standing["status"] == "failed"
    assert standing["seconds"] > 0
    if way != "SIGTERM to the command alone":
        return
    (project.folder / "stay").unlink()
    again = project.run_alone()
    assert again.returncode == 0, again.stdout + again.stderr
    after = project.state("clean")
    assert after["status"] == "done"
    assert after["seconds"] > standing["seconds"]


def test_an_interrupted_training_step_says_what_is_kept(project, tiny_dir):
    rows = [f'{{"messages": [{{"role": "user", "content": "{n}?"}}, {{"role": "assistant", "content": "{n}"}}]}}' for n in range(4)]  # fmt: skip
    (project.folder / "rows.jsonl").write_text("\n".join(rows))
    project.tree["models"] = {"base": str(tiny_dir)}
    project.tree["stages"] = {
        "sft": {"kind": "train", "model": "base", "data": "rows.jsonl", "loss": {"fn": "sitting:slow_loss"}, "steps": 4,
                "batch_traces": 2, "checkpoint_every": 2, "lr": 1e-3, "dtype": "float32"}
    }  # fmt: skip
    project.rewrite()
    with Started(project, []) as run:
        run.wait_until_inside()
        said = run.said
        assert run.send(signal.SIGINT, "command") < SOON
        assert run.nothing_left()
    assert (
        "interrupted in sft, which keeps the checkpoint of step 2 of 4; run the same command again to continue"
        in run.said
    )
    order = ["[1/1] sft", "loading the libraries", "reading the traces", "loading base", "0/4 steps  first under way"]  # fmt: skip
    places = [said.find(words) for words in order]
    assert -1 not in places, said
    assert places == sorted(places)
    at = {words: next(t for t, line in run.lines if words in line) for words in order[:2]}
    assert at["loading the libraries"] - at["[1/1] sft"] < 5
    (project.folder / "stay").unlink()
    again = project.run_alone()
    assert again.returncode == 0, again.stdout + again.stderr
    assert "2/4 steps  next under way" in again.stdout
    assert len(project.losses("sft")) == 4


def stubborn_child() -> subprocess.Popen[bytes]:
    """A process that prints "ready" and ignores SIGINT and SIGTERM."""
    code = (
        "import signal, time\n"
        "for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)\n"
        "print('ready', flush=True)\ntime.sleep(1000)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"ready\n"
    return child


def test_a_second_signal_ends_it_at_once(monkeypatch):
    monkeypatch.setattr(interrupt, "GRACE", 600.0)
    child = stubborn_child()
    with interrupt.interruptible():
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        began = time.monotonic()
        interrupt.end(child)
        assert 0.4 < time.monotonic() - began < 60 * slowness()
    assert child.returncode == -signal.SIGKILL


def test_a_child_that_leaves_in_time_is_not_killed():
    code = (
        "import sys, time\ntry:\n print('ready', flush=True)\n time.sleep(1000)\nexcept KeyboardInterrupt: sys.exit(7)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert child.stdout.readline() == b"ready\n"
    interrupt.end(child)
    assert child.returncode == 7


def test_held_back_signals_are_raised_at_the_end_and_handlers_restored():
    before = signal.getsignal(signal.SIGTERM)
    reached = []

    # A thread that does not block the signals receives them first.
    threading.Thread(target=time.sleep, args=(5,), daemon=True).start()

    def work() -> None:
        with interrupt.interruptible():
            with interrupt.held_back():
                os.kill(os.getpid(), signal.SIGTERM)
                reached.append("inside")
            reached.append("after")

    with pytest.raises(interrupt.Interrupted) as stopped:
        work()
    assert reached == ["inside"]
    assert stopped.value.status == 143
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_kept_progress_is_described_in_words(tmp_path):
    class Config:
        steps, problems, samples = 24, 320, 2

    assert kept(tmp_path, Config) == ""
    (tmp_path / "traces").mkdir()
    manifest = (GOLDEN / "manifest-0.json").read_bytes()
    (tmp_path / "traces" / "manifest-0.json").write_bytes(manifest)
    rows = sum(shard["rows"] for shard in json.loads(manifest)["shards"])
    assert kept(tmp_path, Config) == f"{rows} of 640 traces"
    for step in (5, 10):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"step-{step:08d}" / "state.json").touch()
    (tmp_path / "checkpoints" / "step-00000015").mkdir()  # without its state: not whole
    assert kept(tmp_path, Config) == "the checkpoint of step 10 of 24"
