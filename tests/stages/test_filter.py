"""Decontamination in the filter stage: the questions that `against` refers to."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from distill import recipe
from distill.progress import Screen
from distill.recipe import Input
from distill.records import Problem, UserError
from distill.run import decide
from distill.stages.context import Context, make_task
from distill.stages.filter import held_out

SUMS = {
    "fn": "reasoning_gym",
    "dataset": "chain_sum",
    "options": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
}


def context(run: Path, against: str, *, test: bool = True, tasks: dict | None = None) -> Context:
    stages: dict = {
        "traces": {"kind": "generate", "model": "base", "task": "sums", "problems": 4},
        "clean": {
            "kind": "filter",
            "data": "traces",
            "keep": [{"fn": "correct"}, {"fn": "decontaminate", "against": against}],
        },
    }
    if test:
        stages["test"] = {"kind": "eval", "model": "base", "task": "sums", "problems": 20}
    tree = {
        "name": "t",
        "models": {"base": "a/b"},
        "tasks": {"sums": SUMS, **(tasks or {})},
        "stages": stages,
    }
    return Context(recipe=recipe.validate(tree), run=run, name="clean", screen=Screen(io.StringIO()))


def questions(ctx: Context, split: str, num: int) -> list[Problem]:
    task = make_task("sums", ctx.recipe.tasks["sums"])
    return list(task.problems(split, num, ctx.seed))  # type: ignore[arg-type]


def test_of_a_generated_task_it_is_what_the_recipe_evaluates_on(tmp_path):
    ctx = context(tmp_path, "sums")
    known = held_out("sums", ctx)
    assert len(known) == 20
    assert all(known.holds(problem.question, 3) for problem in questions(ctx, "held_out", 20))
    assert not any(known.holds(problem.question, 3) for problem in questions(ctx, "train", 50))
    with pytest.raises(UserError, match=r"clean\.keep\.against.*no eval or compare stage"):
        held_out("sums", context(tmp_path, "sums", test=False))


def test_of_a_file_it_is_its_questions_word_runs_included(tmp_path):
    rows = tmp_path / "exam.jsonl"
    question = "A train leaves the station at noon and goes west at forty miles an hour. How far?"
    rows.write_text(
        json.dumps({"messages": [{"role": "user", "content": question}]})
        + "\n"
        + json.dumps({"question": "What is 5 + 5?", "answer": "10"})
        + "\n"
    )
    ctx = context(tmp_path, str(rows))
    known = held_out(str(rows), ctx)
    assert len(known) == 2
    assert known.holds("what is 5 + 5?", 10)
    assert known.holds("Noon. A train leaves the station at noon and goes west slowly.", 10)
    assert not known.holds("Noon. A train leaves the station at noon and turns west slowly.", 10)
    tasks = {"exam": {"fn": "jsonl", "path": str(rows), "held_out": "all"}}
    rows.write_text(json.dumps({"question": question, "answer": "40"}) + "\n")
    assert held_out("exam", context(tmp_path, "exam", tasks=tasks)).holds(question[:60], 10)


def test_mistakes_in_the_set_are_named(tmp_path):
    with pytest.raises(UserError, match=r"keep\.1\.against: there is no task 'sunms'"):
        context(tmp_path, "sunms")
    missing = tmp_path / "none.jsonl"
    with pytest.raises(UserError, match="neither a task of the recipe nor a JSONL file"):
        held_out(str(missing), context(tmp_path, str(missing)))
    missing.write_text('{"question": "a?"}\n{"answer": 1}\n')
    with pytest.raises(
        UserError, match="line 2: no known layout: its columns are answer; a column of questions is missing"
    ):
        held_out(str(missing), context(tmp_path, str(missing)))


def test_another_content_of_the_set_is_another_input_of_the_stage(tmp_path):
    rows = tmp_path / "exam.jsonl"
    rows.write_text('{"question": "a?"}\n')
    ctx = context(tmp_path, str(rows))
    assert Input("questions", str(rows), "keep.1.against") in list(ctx.recipe.stages["clean"].inputs())
    before = decide.input_fingerprint(ctx.recipe, tmp_path, str(rows))
    rows.write_text('{"question": "b?"}\n')
    assert decide.input_fingerprint(ctx.recipe, tmp_path, str(rows)) != before != ""
