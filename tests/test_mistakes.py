"""Typical mistakes of a first day, typed at the command line: one message that says what to do, and an exit status."""

from __future__ import annotations

import json
import shutil

import pytest
from project import Project

QUESTIONS = 37
SHORT = {"max_tokens": 8}


@pytest.fixture(scope="module")
def project(tiny_dir, tmp_path_factory):
    """A recipe with its own file of 37 questions, of which two are held out, and files that are no questions."""
    folder = tmp_path_factory.mktemp("mistakes")
    rows = [{"question": f"What is {n}+{n}?", "answer": str(2 * n)} for n in range(QUESTIONS)]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "empty.jsonl").write_text("")
    (folder / "prose.jsonl").write_text("hello\nworld\n")
    (folder / "columns.jsonl").write_text('{"a": 1}\n')
    bare = shutil.copytree(tiny_dir, folder / "bare")
    for file in bare.glob("*token*"):
        file.unlink()
    engine = {"model": "base", "task": "q", "sampling": SHORT, "engine": "transformers"}
    tree = {
        "name": "mine",
        "models": {"base": str(tiny_dir)},
        "tasks": {"q": {"fn": "jsonl", "path": "q.jsonl", "template": "boxed"}},
        "stages": {
            "traces": {"kind": "generate", "problems": 20, "top_logprobs": 8, **engine},
            "kl": {"kind": "train", "model": "base", "data": "traces", "loss": "forward_kl", "lr": 1e-4, "epochs": 1},
            "verdict": {"kind": "eval", "problems": 2, **engine, "model": "kl"},
        },
    }
    return Project(folder, tree)


TYPED = {
    "a recipe's name": ("check quickstrt", 2, ["Did you mean 'quickstart'"]),
    "a folder": ("check bare", 2, ["no such file", "distill ls recipes"]),
    "a file of questions": ("check q.jsonl", 2, ["not valid YAML"]),
    "a verb": ("chek mine.yaml", 2, ["Did you mean 'check'"]),
    "an option of a trainer": ("run mine.yaml --lr 1e-4", 2, ["stages.kl.lr=1e-4"]),
    "an option of another framework": ("run mine.yaml --learning-rate=1e-4", 2, ["stages.kl.lr=1e-4"]),
    "a dotted option": ("run mine.yaml --stages.kl.lr 1e-4", 2, ["stages.kl.lr=1e-4", "without dashes"]),
    "a seed": ("run mine.yaml --seed 3", 2, ["seed=3"]),
    "a field without its stage": ("run mine.yaml lr=0.1", 2, ["stages.kl.lr=0.1"]),
    "a stage": ("check mine.yaml stages.kll.lr=1e-4", 2, ["no stage 'kll'", "Did you mean 'kl'"]),
    "a field": ("check mine.yaml stages.kl.lrr=1e-4", 2, ["Did you mean 'lr'"]),
    "a number": ("check mine.yaml stages.kl.lr=fast", 2, ["stages.kl.lr", "valid number", "'fast'"]),
    "a loss": ("check mine.yaml stages.kl.loss=forwardkl", 2, ["Did you mean 'forward_kl'"]),
    "a space": ("check mine.yaml stages.kl.lr 1e-4", 2, ["key=value"]),
    "a name": ("check mine.yaml name=my/run", 2, ["'my/run' is no name", "letters, digits"]),
    "a section": ("check mine.yaml stages.kl=3", 2, ["is a section with keys"]),
    "a data stage": ("check mine.yaml stages.kl.data=tracess", 2, ["Did you mean 'traces'"]),
    "a run": ("show mine", 2, ["no such folder, here or in runs/"]),
    "no traces": ("traces verify mine/traces", 2, ["no such file or folder, here or in runs/"]),
    "no file": ("check mine.yaml tasks.q.path=nosuch.jsonl", 2, ["no such file", "recipe's folder"]),
    "no tokenizer": ("check mine.yaml models.base=bare", 4, ["holds no tokenizer", "copy the tokenizer"]),
    "too many problems": (
        "check mine.yaml stages.traces.problems=500",
        1,
        ["500 training problems", "has 35", "one problem in 10", "stages.traces.problems=35 or fewer"],
    ),
    "too few held-out problems": (
        "run mine.yaml stages.verdict.problems=50",
        2,
        ["50 held-out problems", "has 2", "held_out: all"],
    ),
    "top-k beyond the vocabulary": (
        "check mine.yaml stages.traces.top_logprobs=60000",
        1,
        ["60,000 entries", "of 49,152 tokens"],
    ),
    "more tokens than the context": (
        "check mine.yaml stages.traces.sampling.max_tokens=4096",
        1,
        ["would fail: stages.traces: context", "Lower sampling.max_tokens to 473"],
    ),
    "an empty file": ("check mine.yaml tasks.q.path=empty.jsonl", 1, ["would fail", "no usable problem"]),
    "no JSON": ("check mine.yaml tasks.q.path=prose.jsonl", 1, ["would fail", "not JSON"]),
    "unknown columns": ("check mine.yaml tasks.q.path=columns.jsonl", 1, ["would fail", "its columns are a"]),
}


@pytest.mark.parametrize("what", TYPED)
def test_a_mistake_is_one_message_with_its_remedy(project, what):
    command, status, words = TYPED[what]
    done = project.distill(*command.split(" "))
    said = done.stderr + done.stdout
    assert done.returncode == status, said
    for word in words:
        assert word in " ".join(said.split())
    assert "Traceback" not in said
    assert not list((project.folder / "runs").glob("*/*/stage.json"))  # nothing was begun


def test_the_recipe_itself_is_right(project):
    done = project.distill("check", "mine.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "would fail" not in done.stdout


def test_traces_are_found_by_stage_and_by_run(project):
    done = project.distill("run", "mine.yaml", "--only", "traces")
    assert done.returncode == 0, done.stderr
    for where in ("mine/traces", "mine", "runs/mine/traces", "runs/mine/traces/traces"):
        done = project.distill("traces", "verify", where)
        assert done.returncode == 0, done.stderr
        assert "20 traces" in done.stdout
        assert "whole" in done.stdout
    shutil.copytree(project.run_dir / "traces", project.run_dir / "more")
    several = project.distill("traces", "stats", "mine")
    assert several.returncode == 2
    assert "name one of: runs/mine/more, runs/mine/traces" in several.stderr
    assert project.distill("traces", "verify", "mine").stdout.count("whole") == 2
    shutil.rmtree(project.folder / "runs")
