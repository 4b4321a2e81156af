"""Models and data sets by hub id, from a hub of ours: new, check, run, and what a run keeps to when the hub changes or is gone."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_llama
import yaml
from project import REFERENCE
from stub_hub import StubHub

pytestmark = [pytest.mark.slow]

ROWS = [
    {"question": f"What is {a} plus {b}?", "answer": f"{a}+{b}={a + b}\n#### {a + b}"}
    for a in range(20)
    for b in range(6)
]
TREE = {
    "name": "hubbed",
    "models": {"base": "me/tiny"},
    "tasks": {"sums": {"fn": "hub", "dataset": "me/sums"}},
    "stages": {
        "sft": {"kind": "train", "model": "base", "task": "sums", "data": "me/sums", "loss": {"fn": "cross_entropy"}, "steps": 1,
                "batch_traces": 2, "dtype": "float32"},
        "start": {"kind": "eval", "model": "base", "task": "sums", "problems": 2, "sampling": {"max_tokens": 3}, "engine": REFERENCE},
    },
}  # fmt: skip


def parquet(rows: list[dict[str, str]]) -> bytes:
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), table)
    return table.getvalue()


@pytest.fixture
def hub(tiny_dir: Path) -> Iterator[StubHub]:
    with StubHub() as stub:
        card = b"---\nlicense: apache-2.0\n---\n# Tiny\n"
        stub.add(
            "me/tiny",
            {**{file.name: file.read_bytes() for file in tiny_dir.iterdir() if file.is_file()}, "README.md": card},
        )
        splits = {"train": parquet(ROWS[:100]), "test": parquet(ROWS[100:])}
        data = {f"data/{split}-00000-of-00001.parquet": content for split, content in splits.items()}
        stub.add("me/sums", {"README.md": b"---\nlicense: mit\n---\n", **data}, kind="dataset")
        yield stub


class Home:
    """A working directory with an empty cache of the hub's files, and the command line in it."""

    def __init__(self, folder: Path, hub: StubHub) -> None:
        self.folder, self.env = folder, {**os.environ, **hub.environment(token=""), "HF_HOME": str(folder / "home")}

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "distill.cli", *arguments]
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=600,
            stdin=subprocess.DEVNULL,
        )

    def json(self, path: str) -> dict:
        return json.loads((self.folder / path).read_text())


def test_a_run_keeps_to_the_commit_that_it_began_with(hub: StubHub, tmp_path: Path) -> None:
    distill = Home(tmp_path, hub)
    (tmp_path / "hubbed.yaml").write_text(yaml.safe_dump(TREE))
    first = hub.commit_of("me/tiny")
    done = distill("run", "hubbed.yaml", "--only", "sft")
    assert done.returncode == 0, done.stderr
    assert distill.json("runs/hubbed/commits.json")["me/tiny"] == first
    assert distill.json("runs/hubbed/sft/stage.json")["inputs"]["data"] == hub.commit_of("me/sums")

    hub.repos["me/tiny"]["files"]["config.json"] = b"{}"  # a commit that cannot be used
    done = distill("run", "hubbed.yaml")
    assert done.returncode == 0, done.stderr
    assert "sft: done already" in done.stdout
    assert distill.json("runs/hubbed/start/stage.json")["metrics"]["problems"] == 2
    card = (tmp_path / "runs/hubbed/sft/model/README.md").read_text()
    assert f"It starts from me/tiny, commit {first}." in card
    assert {"license: apache-2.0", "base_model: me/tiny", "- me/sums"} <= {*card.splitlines()}

    hub.__exit__()
    done = distill("run", "hubbed.yaml", "--redo", "start")
    assert done.returncode == 0, done.stderr
    assert "start took" in done.stdout + done.stderr

    commits = tmp_path / "runs/hubbed/commits.json"
    commits.write_text(commits.read_text().replace(first[:8], "00000000"))
    done = distill("run", "hubbed.yaml", "--redo", "start")
    assert done.returncode == 4
    assert "commits.json: not as written" in done.stderr


def test_what_is_on_the_hub_is_known_before_it_is_downloaded(hub: StubHub, tmp_path: Path) -> None:
    distill = Home(tmp_path, hub)
    unlike = {**TREE, "models": {"base": "me/tiny", "other": "me/missing"}}
    unlike["stages"] = {**TREE["stages"], "more": {**TREE["stages"]["start"], "model": "other"}}
    (tmp_path / "hubbed.yaml").write_text(yaml.safe_dump(unlike))
    done = distill("check", "hubbed.yaml")
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "'me/tiny'" not in said
    assert "models.other unverified: 'me/missing': the hub has no model of this name, or it is private" in said
    asked = [line for line in hub.sent if "me/tiny/resolve" in line]
    assert asked
    assert all(line.endswith("config.json") for line in asked)


def test_a_new_recipe_for_a_data_set_and_models_of_the_hub(hub: StubHub, tokenizer: Any, tmp_path: Path) -> None:
    distill = Home(tmp_path, hub)
    deep = tiny_llama.save(tokenizer, tmp_path / "deep", layers=4)
    hub.add("me/deep", {file.name: file.read_bytes() for file in deep.iterdir() if file.is_file()})
    done = distill(
        "new",
        "mine",
        "--data",
        "me/sums",
        "--teacher",
        "me/deep",
        "--student",
        "me/tiny",
        "--max-tokens",
        "8",
        "--yes",
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "100 questions to learn from, 20 held out to measure on" in " ".join(done.stdout.split())
    tree = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    assert (
        tree["tasks"]["questions"] | {"dataset": "me/sums", "train_split": "train", "held_out_split": "test"}
        == tree["tasks"]["questions"]
    )
    assert distill("check", "mine.yaml").returncode == 0
