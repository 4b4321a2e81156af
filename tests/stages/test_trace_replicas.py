"""Actors that write their own traces: the rows of one engine, each once, whatever is killed, with any number of replicas."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from project import SUMS
from ray_processes import started

from distill.traces.reader import open_traces
from distill.traces.verify import verify

pytest.importorskip("ray", reason="Ray is not installed")
pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
DRIVER = """
import io, sys
from pathlib import Path
from distill import machine, recipe, run_folder
from distill.progress import Screen
from distill.stages import generate, trace_replicas
from distill.stages.context import Context
run, source, trace_replicas.DRIVER_WRITES = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
resolved = recipe.load(source)
if not (run / run_folder.RESOLVED).exists():
    run.mkdir()
    run_folder.write_recipe(run, resolved, source, machine.Machine("", "cpu", "test", 2, 8e9, 1e10))
context = Context(resolved, run, "traces", Screen(io.StringIO()))
context.folder.mkdir(exist_ok=True)
result = generate.run(resolved.stages["traces"], context)
print("result", result.metrics["traces"], result.metrics.get("rewards_failed"))
"""
REWARDS = """
def rank(group):
    order = sorted(range(len(group)), key=lambda n: (len(group.texts[n]), n))
    return [float(order.index(n)) for n in range(len(group))]
"""


class Drive:
    """A generate stage, driven in a process of its own. driver_writes: up to how many replicas the driver writes."""

    def __init__(self, folder: Path, tiny_dir: Path, **fields) -> None:
        self.folder, self.tiny_dir, self.fields = folder, tiny_dir, fields
        (folder / "rank_reward.py").write_text(REWARDS)

    def __call__(self, run: str, replicas: int, driver_writes: int = 1) -> Path:
        """Run to the end. Returns the traces' folder."""
        engine = {"fn": "counting_engine:engine", "dtype": "float32", "batch_size": 4}
        if replicas:
            engine |= {"replicas": replicas, "ray": "local"}
        stage = {
            "kind": "generate", "model": "base", "task": "sums", "problems": 150, "samples": 4, "top_logprobs": 4,
            "sampling": {"max_tokens": 30}, "engine": engine, "shard_rows": 16, **self.fields,
        }  # fmt: skip
        tree = {
            "name": "t",
            "models": {"base": str(self.tiny_dir)},
            "tasks": {"sums": SUMS},
            "stages": {"traces": stage},
        }
        source = self.folder / "recipe.yaml"
        source.write_text(yaml.safe_dump(tree))
        paths = (str(self.folder), str(HERE.parent / "engines"), os.environ.get("PYTHONPATH", ""))
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(self.folder / run), str(source), str(driver_writes)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
            stdout=(log := self.folder / "log.txt").open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.watch(driver, self.folder / run / "traces" / "traces")
        driver.wait(timeout=400)
        self.said = log.read_text()
        assert driver.returncode == (self.status), self.said
        return self.folder / run / "traces" / "traces"

    status = 0

    def watch(self, driver: subprocess.Popen[bytes], traces: Path) -> None:
        """What happens while the driver runs."""


def rows(folder: Path) -> dict[str, tuple]:
    found = {}
    for block in open_traces(folder).blocks():
        for n, trace_id in enumerate(block.trace_id):
            assert trace_id not in found
            found[trace_id] = (
                block.problem_id[n], block.completion_ids[n].tolist(), block.logprob[n].tolist(), block.reward[n],
            )  # fmt: skip
    return found


def num_rows(folder: Path) -> int:
    try:
        return sum(shard.rows for shard in open_traces(folder).shards)
    except Exception:
        return 0


class Killing(Drive):
    """Kills actors at random while the driver runs, until it has killed `kills`."""

    kills = 6

    def watch(self, driver: subprocess.Popen[bytes], traces: Path) -> None:
        draw, killed = random.Random(1), 0
        while driver.poll() is None and killed < self.kills:
            time.sleep(0.1)
            if num_rows(traces) < 60 * killed:
                continue
            if alive := sorted(started("TraceReplica", driver.pid)):
                os.kill(draw.choice(alive), signal.SIGKILL)
                killed += 1


class KillingDriver(Drive):
    """Kills the driver when it has written `rows` rows."""

    rows, status = 150, -signal.SIGKILL

    def watch(self, driver: subprocess.Popen[bytes], traces: Path) -> None:
        while driver.poll() is None and num_rows(traces) < self.rows:
            time.sleep(0.05)
        below = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
        # Ray's own agents look for their head every now and then only.
        _, alive = psutil.wait_procs(below, timeout=120)
        assert not alive, f"outlived the driver: {alive}"


def test_killed_actors_and_drivers_change_no_row(tiny_dir, tmp_path):
    """600 rows of two actors: as one engine's, though actors are killed, and though the driver is killed and goes on with
    three replicas. A reward over a problem's whole group sees the rows of dead actors too."""
    fields = {"rewards": [{"fn": "rank_reward:rank"}]}
    one = rows(Drive(tmp_path, tiny_dir, **fields)("one", replicas=0))
    assert len(one) == 600
    several = Killing(tmp_path, tiny_dir, **fields)
    folder = several("killed", replicas=2)
    assert rows(folder) == one
    assert several.said.count("it is replaced") >= 3
    assert {file.name.split("-")[1] for file in folder.glob("shard-*")} == {"r0", "r1"}
    assert verify(folder).ok
    KillingDriver(tmp_path, tiny_dir, **fields)("driver", replicas=2)
    folder = Drive(tmp_path, tiny_dir, **fields)("driver", replicas=3)
    assert rows(folder) == one
    assert {file.name.split("-")[1] for file in folder.glob("shard-*")} == {"r0", "r1", "r2"}


def test_the_driver_goes_on_where_actors_wrote(tiny_dir, tmp_path):
    """Nine replicas write themselves, fewer send their completions to the driver: a run may change from one to the other."""
    one = rows(Drive(tmp_path, tiny_dir, problems=40)("one", replicas=0))
    first = rows(Drive(tmp_path, tiny_dir, problems=20)("mixed", replicas=2))
    assert len(first) == 80
    folder = Drive(tmp_path, tiny_dir, problems=40)("mixed", replicas=2, driver_writes=8)
    assert rows(folder) == one
    assert {file.name.split("-")[1] for file in folder.glob("shard-*")} == {"r0", "r1", "0"}
