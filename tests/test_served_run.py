"""A whole run with a served teacher through the command line: its price, its journal, and a key that is nowhere."""

from __future__ import annotations

import json
import os

import pytest
import yaml
from project import REFERENCE, SUMS, Project
from stub_server import Stub

KEY = "sk-very-secret-5f3e99"


def project(folder, stub: Stub, model_dir) -> Project:
    engine = {
        "fn": "openai", "base_url": stub.url, "model": "tiny", "key": "$SERVED_RUN_KEY", "batch_size": 4, "max_retries": 2,
        "price": {"input": 100, "output": 1000},
    }  # fmt: skip
    asked = {"model": "teacher", "task": "sums", "problems": 6, "sampling": {"max_tokens": 6}, "engine": engine}
    stages = {
        "traces": {"kind": "generate", **asked, "top_logprobs": 5},
        "kl": {
            "kind": "train", "model": "base", "data": "traces", "loss": {"fn": "forward_kl"}, "keep_truncated": True,
            "steps": 2, "batch_traces": 3, "lr": 1e-3, "dtype": "float32",
        },
        "tested": {"kind": "eval", **asked},
        "verdict": {
            "kind": "compare", "arms": {"start": "base", "kl": "kl"}, "task": "sums", "problems": 4,
            "sampling": {"max_tokens": 4}, "engine": REFERENCE,
        },
    }  # fmt: skip
    models = {"teacher": str(model_dir), "base": str(model_dir)}
    return Project(folder, {"name": "served", "models": models, "tasks": {"sums": SUMS}, "stages": stages})


def everything(folder) -> bytes:
    return b"\n".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.timeout(600)
def test_a_served_teacher_in_a_run(tokenizer, tiny_dir, tmp_path, monkeypatch):
    said = []
    with Stub(tokenizer, key=KEY) as stub:
        made = project(tmp_path, stub, tiny_dir)
        monkeypatch.delenv("SERVED_RUN_KEY", raising=False)
        refused = made.run()
        said.append(refused)
        assert refused.returncode == 3
        assert "the environment variable SERVED_RUN_KEY is not set" in refused.stderr
        assert not stub.asked

        monkeypatch.setenv("SERVED_RUN_KEY", KEY + "-wrong")
        refused = made.run()
        said.append(refused)
        assert refused.returncode == 2
        assert "Check the key in the environment variable SERVED_RUN_KEY" in refused.stderr

        monkeypatch.setenv("SERVED_RUN_KEY", KEY)
        checked = made.distill("check", made.recipe.name)
        said.append(checked)
        assert checked.returncode == 0, checked.stderr
        assert "cost" in checked.stdout
        assert "$" in checked.stdout

        stub.faults = {len(stub.asked) + 2: (400, f"bad request of Bearer {KEY}")}
        broken = made.run()
        said.append(broken)
        assert broken.returncode == 2
        assert "bad request of Bearer [key]" in broken.stderr
        paid_before = len(stub.asked)

        finished = made.run()
        said.append(finished)
        assert finished.returncode == 0, finished.stderr
        assert len(stub.asked) <= paid_before + 12
        assert max(stub.answered.values()) == 1
    report = json.loads((made.run_dir / "report.json").read_text())
    stages = {stage["name"]: stage for stage in report["stages"]}
    rows = made.rows("traces")
    paid = sum(len(row["prompt_ids"]) * 100 + len(row["completion_ids"]) * 1000 for row in rows) / 1e6
    assert stages["traces"]["cost"]["dollars"] == pytest.approx(paid)
    assert stages["traces"]["predicted"]["dollars"] > 0
    assert stages["traces"]["predicted"]["flops"] == stages["traces"]["cost"]["flops"] == 0
    assert report["arms"]["kl"]["cost"]["with_inference"]["dollars"] == pytest.approx(paid)
    assert report["arms"]["kl"]["cost"]["student"]["dollars"] == 0
    assert "paid" in (made.run_dir / "report.md").read_text()
    assert "paid" in (made.run_dir / "report.html").read_text()
    shown = made.distill("show", str(made.run_dir))
    said.append(shown)
    assert "paid" in shown.stdout
    assert KEY.encode() not in everything(tmp_path)
    assert all(KEY not in each.stdout + each.stderr for each in said)


def test_a_key_in_the_recipe_is_refused_without_being_repeated(tokenizer, tiny_dir, tmp_path):
    with Stub(tokenizer) as stub:
        made = project(tmp_path, stub, tiny_dir)
    for wrong in (KEY, 123456789012, [KEY], "$" + KEY):
        made.tree["stages"]["traces"]["engine"]["key"] = wrong
        made.rewrite()
        refused = made.run()
        assert refused.returncode == 2
        assert "stages.traces.engine.key" in refused.stderr
        assert KEY not in refused.stderr + refused.stdout
        assert "123456789012" not in refused.stderr + refused.stdout
    assert not made.run_dir.exists() or KEY.encode() not in everything(made.run_dir)
    assert os.environ.get("SERVED_RUN_KEY") is None
    assert yaml.safe_load(made.recipe.read_text())["stages"]["traces"]["engine"]["key"] == "$" + KEY
