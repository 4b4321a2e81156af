"""The live page: what it says of a run that waits, runs, is killed, goes on and ends; who may read it; what it never does."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from project import REFERENCE, SUMS, Project

from distill import progress
from distill.errors import MachineError
from distill.run.live import Looker
from distill.stages.shown_completions import ShownCompletions
from distill.tools import watch

PATIENCE = 600


def get(port: int, path: str, host: str = "") -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection(watch.HOST, port, timeout=PATIENCE)
    connection.request("GET", path, headers={"Host": host or f"{watch.HOST}:{port}"})
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), dict(answer.getheaders())


def state(port: int) -> dict:
    return json.loads(get(port, "/state")[1])


def wait_for(ready):
    deadline = time.monotonic() + PATIENCE
    while not (found := ready()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


class Watcher:
    """`distill watch` in a process of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "distill.cli", "watch", *arguments],
            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.said = self.process.stdout.readline()
        self.port = int(re.search(r":(\d+)/", self.said)[1])


@pytest.fixture
def started():
    """Processes that are killed at the end, if a test failed before it ended them."""
    found: list[subprocess.Popen] = []
    yield found
    for process in found:
        process.kill()
        process.wait()


@pytest.fixture
def tree(tiny_dir) -> dict:
    traces = {
        "kind": "generate", "model": "base", "task": "sums", "problems": 60, "sampling": {"max_tokens": 12}, "shard_rows": 8,
        "engine": {**REFERENCE, "batch_size": 1},
    }  # fmt: skip
    return {"name": "road", "models": {"base": str(tiny_dir)}, "tasks": {"sums": SUMS}, "stages": {"traces": traces}}


def test_a_run_is_watched_from_before_its_start_through_a_kill_to_its_end(tree, tmp_path, visit_address, started):
    """Two watchers and a browser; the run is killed and resumed."""
    project = Project(tmp_path, tree)
    first, second = Watcher(tmp_path, "road"), Watcher(tmp_path, "runs/road")
    started += [first.process, second.process]
    assert "waiting for runs/road to begin" in first.said
    assert first.port != second.port
    assert state(first.port)["status"] == "absent"
    page = visit_address(f"http://{watch.HOST}:{first.port}/")
    page.set_default_timeout(PATIENCE * 1000)
    page.wait_for_selector("#live[data-status=absent]")
    command = project.command("run", "road.yaml", "--no-trials")
    started.append(subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL))
    page.wait_for_selector("#completions:not([hidden])")
    now = wait_for(lambda: (s := state(second.port))["stages"] and s["stages"][0]["share"] and s)
    os.kill(started[-1].pid, signal.SIGKILL)
    started[-1].wait()
    (stage,) = now["stages"]
    assert (now["status"], stage["name"], stage["status"]) == ("running", "traces", "running")
    assert 0 < stage["share"] < 1
    assert now["seconds_left"] == stage["seconds_left"] > 0
    assert "/60 traces" in stage["doing"]
    assert 1 <= len(now["completions"]) <= 4
    page.wait_for_selector("#live[data-status=stopped]")
    assert page.locator("#live .state").inner_text() == "Stopped; `distill run` continues it: traces"
    page.wait_for_selector("#report main")
    page.locator("#report details summary").first.click()
    opened = page.locator("#report details[open] summary").first.inner_text()
    started.append(subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL))
    page.wait_for_selector("#live[data-status=done]")
    assert started[-1].wait() == 0
    assert page.locator("#report details[open] summary").first.inner_text() == opened
    assert len(project.rows("traces")) == 60
    for watcher in (first, second):
        said, errors = watcher.process.communicate(timeout=PATIENCE)  # each ends by itself
        assert "has ended; its report: runs/road/report.html" in said
        assert errors == ""
    again = project.distill("watch", "road")
    assert again.returncode == 0
    assert "has ended; its report" in again.stdout


@pytest.fixture
def begun(tmp_path) -> Path:
    """The folder of a run whose only stage is under way, as its files say; the process that holds it is this one."""
    tree = {
        "name": "r", "models": {"base": "a/b"},
        "stages": {"kl": {"kind": "train", "model": "base", "data": "./rows.jsonl", "steps": 10, "lr": 1e-3}},
    }  # fmt: skip
    import socket

    import yaml

    from distill import recipe, run_folder

    run = tmp_path / "r"
    (run / "kl").mkdir(parents=True)
    resolved = recipe.validate(tree)
    (run / "resolved.yaml").write_text(yaml.safe_dump(resolved.model_dump(mode="json")))
    config = resolved.stages["kl"].model_dump(mode="json")
    run_folder.write(run / "kl", run_folder.State("train", config, {}, began=time.time(), attempts=1))
    (run / ".lock.holder").write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    (run / "predicted.json").write_text('{"kl": 100.0}')
    (run / "kl" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n')
    return run


def test_the_state_follows_from_the_files(begun):
    look = Looker(begun)
    now = look.now()
    assert (now.status, now.stages[0].status, now.seconds_left) == ("running", "running", 100.0)
    screen = progress.Screen(open(os.devnull, "w"), "kl", file=begun / "kl" / progress.FILE)  # noqa: SIM115
    live = screen.live(10, "steps")
    live.update(4, loss=1.5)
    screen.tick()
    now = look.now()
    assert now.stages[0].share == 0.4
    assert now.stages[0].doing.startswith("4/10 steps  loss 1.5  ETA")
    assert now.seconds_left == pytest.approx(live.seconds_left())
    shown = ShownCompletions(begun / "kl")
    for number in range(6):
        shown.first(f"{number}?", "<b>&", number % 2 == 0)
    assert [(q, c) for q, _, c in look.now().completions] == [("0?", True), ("1?", False), ("2?", True), ("3?", False)]
    (begun / ".lock.holder").unlink()
    assert (look.now().status, look.now().stages[0].status) == ("stopped", "stopped")
    (begun / "kl" / "stage.json").write_text("{")
    assert "stage.json: not as written" in look.now().fault
    shutil.rmtree(begun)
    assert look.now().status == "absent"


def test_only_this_machine_under_its_own_name_reads_the_page(begun):
    listening = watch.listen(0)
    port = listening.getsockname()[1]
    assert listening.getsockname()[0] == "127.0.0.1"
    before = {path: path.stat().st_mtime_ns for path in begun.rglob("*")}
    process = subprocess.Popen(
        [sys.executable, "-m", "distill.tools.watch", str(begun), str(listening.fileno()), str(os.getpid())],
        pass_fds=[listening.fileno()],
    )
    with listening:
        for host in (f"localhost:{port}", f"127.0.0.1:{port}", "localhost"):
            assert get(port, "/", host)[0] == 200
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "0.0.0.0", "x"):
            for path in ("/", "/state", "/report"):
                status, body, _ = get(port, path, host)
                assert (status, "loss" in body, "kl" in body) == (403, False, False)
        assert get(port, "/../kl/stage.json")[0] == 404
        _, html, headers = get(port, "/")
        assert "'nonce-" in headers["Content-Security-Policy"]
        assert not re.search(r"""(src|href)=["'](?!data:)""", html)
        assert state(port)["stages"][0]["name"] == "kl"
        wait_for(lambda: state(port)["report"])
        status, report, _ = get(port, "/report")
        assert status == 200
        assert "loss" in report
        with pytest.raises(MachineError, match=f"--port {port}: Address already in use"):
            watch.listen(port)
        # A read-only folder would do: nothing in it has changed.
        assert {path: path.stat().st_mtime_ns for path in begun.rglob("*")} == before
    process.terminate()
    process.wait()


def test_run_live_says_its_address_and_its_page_ends_with_it(tree, tmp_path, started):
    tree["stages"]["traces"]["problems"] = 2
    project = Project(tmp_path, tree)
    command = project.command("run", "road.yaml", "--live", "--no-trials")
    run = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    started.append(run)
    port = int(re.search(r"live: http://127\.0\.0\.1:(\d+)/", run.stdout.readline())[1])
    assert state(port)["status"] in ("absent", "running")
    assert wait_for(lambda: (s := state(port))["ended"] and s)["status"] == "done"
    assert get(port, "/report")[1] == (project.run_dir / "report.html").read_text()
    run.communicate()
    assert run.returncode == 0

    def gone() -> bool:
        try:
            state(port)
        except OSError:
            return True
        return False

    assert wait_for(gone)
    refused = project.distill("run", "road.yaml", "--port", "9999")
    assert refused.returncode == 2
    assert "--live" in refused.stderr
