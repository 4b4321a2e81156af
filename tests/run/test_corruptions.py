"""Every file that a run leaves may be damaged: it is noticed, mended or harmless (FAULTS 1, 2, 29).

DISTILL_CORRUPTIONS=all tries every file in every way; without it a sample is tried, chosen by a fixed seed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import tiny_llama
from corruption import KINDS, Outcome, corrupt, files_of
from project import REFERENCE, SUMS, Project

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]

SHORT = {"max_tokens": 6}
TRAIN = {"steps": 2, "batch_traces": 2, "dtype": "float32", "checkpoint_every": 1, "keep_truncated": True}
SAMPLED, SAMPLED_BEFORE = 20, 6
"""Corruptions that are tried by default: of a finished run, and of one whose students are still to be trained."""


def tree(base: Path, rows: Path) -> dict:
    return {
        "name": "whole",
        "models": {"base": str(base)},
        "tasks": {"sums": SUMS},
        "stages": {
            "cold": {"kind": "train", "model": "base", "task": "sums", "data": str(rows), "loss": {"fn": "cross_entropy"}, **TRAIN},
            "rl": {"kind": "grpo", "model": "cold", "task": "sums", "rewards": [{"fn": "length", "cache": 4}], "steps": 2, "prompts": 2,
                   "group_size": 2, "sampling": SHORT, "engine": REFERENCE, "dtype": "float32", "checkpoint_every": 1, "snapshot_every": 1},
            "traces": {"kind": "generate", "model": "rl", "task": "sums", "problems": 10, "sampling": SHORT, "top_logprobs": 8,
                       "engine": REFERENCE, "shard_rows": 4},
            "unseen": {"kind": "generate", "model": "rl", "task": "sums", "split": "held_out", "problems": 4, "sampling": SHORT,
                       "top_logprobs": 8, "engine": REFERENCE},
            "clean": {"kind": "filter", "data": "traces", "keep": [{"fn": "length", "min_tokens": 1}]},
            "scored": {"kind": "score", "model": "base", "data": "traces", "top_logprobs": 8, "engine": REFERENCE},
            "student": {"kind": "prune", "model": "rl", "layers": 2},
            "kl": {"kind": "train", "model": "student", "data": "clean", "loss": {"fn": "forward_kl"}, **TRAIN},
            "own": {"kind": "on_policy", "model": "kl", "teacher": "rl", "task": "sums", "steps": 1, "prompts": 2, "sampling": SHORT,
                    "engine": REFERENCE, "dtype": "float32", "loss": {"fn": "reverse_kl"}},
            "verdict": {"kind": "compare", "arms": {"teacher": "rl", "kl": "kl", "own": "own"}, "task": "sums", "problems": 6,
                        "sampling": {"temperature": 0, "max_tokens": 4}, "targets": "unseen", "engine": REFERENCE},
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(tokenizer, tmp_path_factory) -> tuple[Project, Path]:
    folder = tmp_path_factory.mktemp("whole")
    base = tiny_llama.save(tokenizer, folder / "base", layers=3)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n} + 1?", "completion": f"{n + 1}"}) + "\n" for n in range(8)))
    project = Project(folder, tree(base, rows))
    done = project.run()
    assert done.returncode == 0, done.stderr + done.stdout
    again = project.run()
    assert again.returncode == 0, again.stderr
    pristine = folder / "pristine"
    shutil.copytree(project.run_dir, pristine, symlinks=True)
    return project, pristine


def outcomes_of(finished: tuple[Project, Path], sampled: int, missing: tuple[str, ...] = ()) -> list[Outcome]:
    """Try every file that is not of a missing stage, or a sample."""
    project, pristine = finished
    files = [file for file in files_of(pristine) if file.parts[0].partition(".")[0] not in missing]
    every = [(file, kind) for file in files for kind in KINDS]
    if os.environ.get("DISTILL_CORRUPTIONS") != "all":
        rng = random.Random(int(os.environ.get("DISTILL_SEED", "16")))
        every = rng.sample(every, int(os.environ.get("DISTILL_SAMPLED", sampled)))
    outcomes = []
    for number, (file, kind) in enumerate(every):
        outcomes.append(corrupt(project, pristine, file, kind, number, missing))
        print(number, outcomes[-1], flush=True)
    print({word: sum(one.word == word for one in outcomes) for word in sorted({one.word for one in outcomes})})
    return outcomes


@pytest.mark.fault(1, 2, 29)
def test_no_damaged_file_of_a_run_changes_a_number_or_ends_in_a_traceback(finished):
    outcomes = outcomes_of(finished, SAMPLED)
    assert not [one for one in outcomes if one.fault]
    assert any(one.word == "noticed" for one in outcomes)


@pytest.mark.fault(1, 2)
def test_what_later_stages_read_is_noticed_or_gives_the_same_numbers(finished):
    """The students, and what is measured of them, are still to be made from what the earlier stages have left."""
    outcomes = outcomes_of(finished, SAMPLED_BEFORE, ("kl", "own", "verdict"))
    assert not [one for one in outcomes if one.fault]
    assert any(one.word == "noticed" for one in outcomes)
