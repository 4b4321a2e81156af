"""A user's task with unlimited problems in a module beside the recipe: used to generate, filter, evaluate and score."""

from __future__ import annotations

import json

from project import REFERENCE, Project

MODULE = '''
"""A task with an unlimited number of problems: double a number."""

import itertools

from distill.records import Problem, Verdict, draw_seed
from distill.tasks import splits, templates


class Doubles:
    is_endless = True
    fingerprint = "doubles 1"

    def __init__(self, name):
        self.name = name
        self.template = templates.find("think_answer", "template")

    def problems(self, split, num, seed):
        assert num is not None, "there is no end to them"
        return itertools.islice(self._of(split, seed), num)

    def _of(self, split, seed):
        for n in itertools.count():
            question = f"Double {draw_seed(seed, n) % 100_000}."
            if splits.split_of(question) == split:
                message = {"role": "user", "content": question}
                yield Problem(splits.problem_id("doubles", question), self.name, question, (message,), gold="even")

    def holds_out(self, question):
        return splits.is_held_out(question)

    def judge(self, problem, completion, finished=True):
        return Verdict(bool(len(completion) % 2), float(len(completion) % 2), completion[:3])

    def same_answer(self, one, other):
        return one == other


def doubles(name):
    return Doubles(name)
'''


def test_a_task_of_ones_own_without_end(tiny_dir, tmp_path):
    (tmp_path / "owntasks.py").write_text(MODULE)
    few = {"sampling": {"max_tokens": 5}, "engine": REFERENCE}
    rows = [{"question": f"Double {n}.", "completion": str(2 * n), "answer": str(2 * n)} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    tree = {
        "name": "endless",
        "models": {"base": str(tiny_dir)},
        "tasks": {"doubles": {"fn": "owntasks:doubles"}},
        "stages": {
            "traces": {"kind": "generate", "model": "base", "task": "doubles", "problems": 5, "top_logprobs": 4, **few},
            "clean": {"kind": "filter", "data": "traces", "keep": [{"fn": "decontaminate", "against": "doubles", "ngram": 1}]},
            "scored": {"kind": "score", "model": "base", "data": "./rows.jsonl", "task": "doubles", "engine": REFERENCE},
            "verdict": {"kind": "eval", "model": "base", "task": "doubles", "problems": 4, **few},
        },
    }  # fmt: skip
    project = Project(tmp_path, tree)
    checked = project.distill("check", "endless.yaml")
    assert checked.returncode == 0, checked.stderr
    done = project.run()
    assert done.returncode == 0, done.stderr
    assert len(project.rows("traces")) == 5
    assert {row["correct"] for row in project.rows("traces")} <= {True, False}
    # The task judges only its own problems; rows from elsewhere get no verdict.
    assert {row["correct"] for row in project.rows("scored")} == {None}
    assert project.state("verdict")["metrics"]["accuracy"]["n"] == 4
    assert project.state("clean")["metrics"]["rows"] == 5
