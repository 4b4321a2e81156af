"""A recipe in a working directory of its own, driven through the command line; and the task most tests use."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import pyarrow.parquet as pq
import yaml

SUMS = {
    "fn": "reasoning_gym",
    "dataset": "basic_arithmetic",
    "options": {
        "min_terms": 2,
        "max_terms": 2,
        "min_digits": 2,
        "max_digits": 2,
        "operators": ["+"],
        "allow_parentheses": False,
        "allow_negation": False,
    },
}
REFERENCE = {"fn": "reference", "dtype": "float32"}


@cache
def warm() -> subprocess.Popen[str]:
    """The process that does commands in forks of itself (see warm.py); it ends with this one, when its stdin does."""
    return subprocess.Popen(
        [sys.executable, Path(__file__).parent / "warm.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def command_line(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One `distill` command in a folder, in a fork of the warm process."""
    with tempfile.TemporaryDirectory() as scratch:
        out, err = Path(scratch, "out"), Path(scratch, "err")
        out.touch()
        err.touch()
        asked = {"arguments": arguments, "folder": str(folder), "env": dict(os.environ)}
        server = warm()
        print(json.dumps({**asked, "out": str(out), "err": str(err)}), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(arguments, status, out.read_text(), err.read_text())


class Project:
    """A working directory with one recipe, and the command line in it.

    `run` and `distill` skip the start of Python and the imports, on which most of a small stage's time goes;
    `run_alone` and `kill_when` are the real command line with a real process a stage.
    """

    def __init__(self, folder: Path, tree: dict) -> None:
        self.folder, self.tree = folder, tree
        self.run_dir = folder / "runs" / tree["name"]
        self.recipe = folder / f"{tree['name']}.yaml"
        self.recipe.write_text(yaml.safe_dump(tree, sort_keys=False))

    def rewrite(self) -> Project:
        """Put the recipe down again, after its tree was changed."""
        self.recipe.write_text(yaml.safe_dump(self.tree, sort_keys=False))
        return self

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "distill.cli", *arguments]

    def distill(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return command_line(self.folder, *arguments)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.distill("run", self.recipe.name, *arguments)

    def run_alone(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command("run", self.recipe.name, *arguments),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    def kill_when(self, ready, *arguments: str) -> None:
        """Start a run and kill it -9, with nothing of it left, as soon as ready() is true."""
        process = subprocess.Popen(
            self.command("run", self.recipe.name, *arguments),
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 600
        while not ready():
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(1)

    def rows(self, stage: str) -> list[dict]:
        return self.rows_in(self.run_dir / stage / "traces")

    def rows_in(self, folder: Path) -> list[dict]:
        files = sorted(folder.glob("*.parquet"))
        return sorted(
            (row for file in files for row in pq.read_table(file).to_pylist()),
            key=lambda row: row["trace_id"],
        )

    def state(self, stage: str) -> dict:
        return json.loads((self.run_dir / stage / "stage.json").read_text())

    def losses(self, stage: str) -> list[float]:
        return [json.loads(line)["loss"] for line in (self.run_dir / stage / "metrics.jsonl").read_text().splitlines()]
