"""Two nodes, as two network namespaces of this machine: a rendezvous over a link between them, and a node that is lost."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from needs import missing, slowness
from processes import base_tree, checkpoints, environment, gaps, stage_process, training, wait_for
from project import Project

NODES = ("10.77.31.1", "10.77.31.2")
RENDEZVOUS = f"{NODES[0]}:29431"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def nodes():
    """The commands that start a program on each node."""
    if shutil.which("ip") is None:
        missing("ip", "iproute2 is not installed")
    names = [f"distill-{os.getpid()}-{n}" for n in range(2)]
    links = [f"d{os.getpid()}n{n}"[-15:] for n in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for name, link, address in zip(names, links, NODES, strict=True):
            ip("link", "set", link, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        missing("ip", f"network namespaces cannot be made: {error.stderr.decode().strip()}")
    else:
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def make(tiny_dir: Path, folder: Path, **changes: object) -> Project:
    folder.mkdir()
    project = Project(folder, base_tree(tiny_dir, tiny_dir, {"kl": training(**changes)}))
    done = project.run("--only", "traces")
    assert done.returncode == 0, done.stdout + done.stderr
    return project


def start(project: Project, nodes: list[list[str]]) -> list[subprocess.Popen[str]]:
    """Start `distill run` on the first node, and on the second what it says."""
    first = subprocess.Popen(
        [*nodes[0], *project.command("run", project.recipe.name, "--only", "kl")],
        cwd=project.folder,
        env=environment(PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in first.stdout:
        if "on each of the other 1 nodes" in line:
            there = shlex.split(line.rpartition(": ")[2])
            assert there[0] == sys.executable
            second = subprocess.Popen([*nodes[1], *there], cwd=project.folder, env=environment())
            return [first, second]
    raise AssertionError("it did not say how to start the other node")


def test_two_nodes_give_the_numbers_of_one_process(tiny_dir, tmp_path, nodes):
    two = {"processes": 1, "nodes": 2, "rendezvous": RENDEZVOUS}
    both = make(tiny_dir, tmp_path / "two", distributed=two)
    one = make(tiny_dir, tmp_path / "one")
    stage_process(one, "kl")
    started = start(both, nodes)
    try:
        out, _ = started[0].communicate(timeout=200)
        assert started[0].returncode == 0, out
        assert started[1].wait(60) == 0
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert both.state("kl")["metrics"]["processes"] == 2
    assert max(gaps(one, both, "kl")) <= 1e-5


def test_a_lost_node_ends_the_other(tiny_dir, tmp_path, nodes):
    two = {"processes": 1, "nodes": 2, "rendezvous": RENDEZVOUS}
    project = make(tiny_dir, tmp_path / "lost", distributed=two, steps=5000, checkpoint_every=5)
    first, second = start(project, nodes)
    try:
        wait_for(lambda: checkpoints(project, "kl"), first)
        (rank,) = [p for p in psutil.Process(second.pid).children(recursive=True) if "RANK" in p.environ()]
        number = rank.environ()["RANK"]
        os.kill(rank.pid, signal.SIGKILL)
        began = time.monotonic()
        out, _ = first.communicate(timeout=60)
        assert time.monotonic() - began < 5 * slowness()
        assert first.returncode == 1
        assert f"process {number} of 2 was ended by SIGKILL" in out
        assert second.wait(30) == 1
    finally:
        for process in (first, second):
            process.kill()
            process.wait()
