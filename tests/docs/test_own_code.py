"""The modules and the recipe of docs/own-code.md, run to the end with the tiny model: a task, template, reward, filter, two losses, token
weights, objective, engine and stage kind of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from page_blocks import ROOT, blocks
from project import command_line

TINY = ("stages.traces.problems=8", "stages.verdict.problems=2", "stages.kl.dtype=float32", "stages.rl.dtype=float32")


def test_the_pages_recipe_runs(tiny_dir: Path, tokenizer: Any, tmp_path: Path) -> None:
    for block in blocks(ROOT / "docs" / "own-code.md"):
        if block.file:
            (tmp_path / block.file).write_text(block.text)
    done = command_line(tmp_path, "run", "mine.yaml", f"models.base={tiny_dir}", *TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "mine"
    (shard,) = (run / "traces" / "traces").glob("*.parquet")
    rows = pq.read_table(shard).to_pylist()
    assert len(rows) == 8
    for row in rows:  # the task's problems, the template's prompt, and the reward
        assert " * " in row["messages"][-1]["content"]
        assert "Answer with the number alone." in tokenizer.decode(row["prompt_ids"])
        earned = {one["name"]: one["value"] for one in row["rewards"]}["short"]
        assert earned == (min(1.0, 6 / row["completion_tokens"]) if row["finish_reason"] == "stop" else 0.0)
    assert "tokens/s" in (run / "traces" / "log.txt").read_text()
    stages = {one["name"]: one for one in json.loads((run / "report.json").read_text())["stages"]}
    assert stages["merged"]["kind"] == "mystage:Average"
    assert {one["status"] for one in stages.values()} == {"done"}
