"""A prompt written in the recipe: shown, tried, recorded with the traces, and part of what a stage rests on."""

from __future__ import annotations

import json

import jsonschema
import pytest
from project import REFERENCE, SUMS, Project

from distill.recipe import json_schema
from distill.traces.reader import open_traces

TEXT = {"system": "Solve it and write ANSWER: and the number.", "answer": r"ANSWER:\s*(\S+)"}


@pytest.fixture(scope="module")
def project(tiny_dir, tmp_path_factory) -> Project:
    tree = {
        "name": "own",
        "models": {"base": str(tiny_dir)},
        "tasks": {"sums": {**SUMS, "template": TEXT}},
        "stages": {
            "traces": {
                "kind": "generate", "model": "base", "task": "sums", "problems": 2, "sampling": {"max_tokens": 4},
                "engine": REFERENCE,
            }
        },
    }  # fmt: skip
    project = Project(tmp_path_factory.mktemp("own"), tree)
    done = project.run()
    assert done.returncode == 0, done.stderr
    return project


def test_traces_record_it_and_another_text_makes_the_stage_due_again(project):
    assert json.loads(open_traces(project.run_dir / "traces" / "traces").metadata.template) == TEXT
    assert "done already" in project.run().stdout
    changed = project.distill("run", "own.yaml", "tasks.sums.template.system=Solve it.")
    assert changed.returncode == 0, changed.stderr
    assert "traces: generate (redo: task (sums) changed)" in changed.stdout


def test_check_shows_it_and_mistakes_are_one_message(project):
    shown = project.distill("check", "own.yaml", "--show")
    assert "Solve it and write ANSWER:" in shown.stdout.replace("\n", " ")
    for override, said in (
        (
            "tasks.sums.template.answer=boxd",
            "tasks.sums.template.answer: there is no answer 'boxd'. Did you mean 'boxed'?",
        ),
        ("tasks.sums.template=7", "tasks.sums.template: a template is a name from `distill ls templates`"),
        ("tasks.sums.template.question=What?", "tasks.sums.template: question: write {question} once"),
    ):
        refused = project.distill("check", "own.yaml", override)
        assert refused.returncode == 2
        assert said in refused.stderr
        assert len([line for line in refused.stderr.splitlines() if not line.startswith("  ")]) == 1  # beside progress


def test_editors_know_it(project):
    validator = jsonschema.Draft202012Validator(json_schema.as_tree())
    assert validator.is_valid(project.tree)
    for template in ({"system": "x"}, {**TEXT, "sytem": "y"}, 7):
        tree = {**project.tree, "tasks": {"sums": {**SUMS, "template": template}}}
        assert not validator.is_valid(tree)
