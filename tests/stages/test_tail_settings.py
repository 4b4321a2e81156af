"""Draws from the tail through the stages: generated and scored, learned from, and refused where they would be wrong."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from project import REFERENCE, SUMS

from distill import recipe
from distill.progress import Screen
from distill.records import UserError
from distill.run import checks
from distill.stages import filter as filtering
from distill.stages import generate, score, train
from distill.stages.context import Context
from distill.tail_draws import DRAW_MASS
from distill.traces.reader import open_traces
from distill.traces.verify import verify

TRACES = {
    "kind": "generate", "model": "base", "task": "sums", "problems": 5, "sampling": {"max_tokens": 5}, "top_logprobs": 8,
    "tail_draws": 4, "engine": REFERENCE,
}  # fmt: skip
STUDENT = {
    "kind": "train", "model": "base", "data": "traces", "keep_truncated": True, "steps": 2, "batch_traces": 4,
    "dtype": "float32", "loss": {"fn": "forward_kl"},
}  # fmt: skip


def context(run, name, base, stages, out=None):
    tree = {"name": "t", "models": {"base": str(base)}, "tasks": {"sums": SUMS}, "stages": stages}
    ctx = Context(recipe=recipe.validate(tree), run=run, name=name, screen=Screen(out or io.StringIO()))
    ctx.folder.mkdir(parents=True, exist_ok=True)
    return ctx


def do(kind, run, name, base, stages):
    ctx = context(run, name, base, stages)
    return kind.run(ctx.recipe.stages[name], ctx)


@pytest.fixture(scope="module")
def run(tiny_dir, tmp_path_factory):
    """Generated traces with draws, and the same scored with draws."""
    folder = tmp_path_factory.mktemp("run")
    again = {
        "kind": "score",
        "model": "base",
        "data": "traces",
        "top_logprobs": 8,
        "tail_draws": 4,
        "engine": REFERENCE,
    }
    stages = {"traces": TRACES, "again": again}
    do(generate, folder, "traces", tiny_dir, stages)
    do(score, folder, "again", tiny_dir, stages)
    return folder


def test_generated_and_scored_draws_are_of_the_tail(run):
    drawn = []
    for stage in ("traces", "again"):
        assert verify(run / stage / "traces").ok
        reader = open_traces(run / stage / "traces")
        assert (reader.metadata.schema_version, reader.metadata.tail_draws) == (2, 4)
        (block,) = reader.blocks()
        top, draws = block.top, block.draws
        # A random model is nearly uniform: everything is in the tail, and every position gets four draws.
        assert (np.exp(top.tail_T) > DRAW_MASS).all()
        assert (draws.count_T == 4).all()
        smallest = [top.slice(t, t + 1).logp_E.min() for t in range(len(top))]
        assert (draws.logp_E < np.repeat(smallest, 4) + 0.1).all()
        drawn.append({i: block.draws_of(n).ids_E for n, i in enumerate(block.trace_id)})
    assert drawn[0].keys() == drawn[1].keys()
    assert any((drawn[0][i] != drawn[1][i]).any() for i in drawn[0])


@pytest.mark.parametrize(("data", "loss"), [("again", {}), ("traces", {"tail": "own_token", "bucket_share": 0.5})])
def test_a_student_learns_from_them(run, tiny_dir, data, loss, tmp_path):
    """The student is its own teacher: the first step's loss is 0 but for the rounding of what was stored."""
    stages = {
        "traces": TRACES,
        "student": STUDENT | {"loss": {"fn": "forward_kl", **loss}, "data": str(run / data / "traces")},
    }
    out = io.StringIO()
    ctx = context(tmp_path, "student", tiny_dir, stages, out)
    checks.train("student", ctx.recipe.stages["student"], ctx.recipe)
    result = train.run(ctx.recipe.stages["student"], ctx)
    assert result.metrics["steps"] == 2
    first, _ = [json.loads(line) for line in (ctx.folder / "metrics.jsonl").read_text().splitlines()]
    assert abs(first["loss"]) < 0.03
    said = "loss.tail: draws, 4 a position, which the traces have" in out.getvalue()
    assert said == ("tail" not in loss)


OWN = {"loss": {"fn": "forward_kl", "tail": "own_token"}}
CLEAN = {"kind": "filter", "data": "traces", "keep": [{"fn": "correct"}]}


@pytest.mark.parametrize(
    ("traces", "student", "wanted"),
    [
        ({"tail_draws": 0}, {"loss": {"fn": "forward_kl", "tail": "draws"}}, "tail: draws needs draws.*tail_draws: 4"),
        ({"tail_draws": 0}, {"loss": {"fn": "ce_kl", "tail": "draws"}}, "draws needs draws"),
        ({"sampling": {"temperature": 0}}, OWN, "decoded greedily"),
        ({"sampling": {"temperature": 0.7}}, OWN, "temperature 0.7 and top_p 1"),
        ({"sampling": {"top_p": 0.9}}, OWN, "temperature 1 and top_p 0.9"),
        ({}, OWN | {"data": "clean"}, r"selected by what they led to \(correct\)"),
        ({}, OWN | {"data": "again"}, "scored the traces"),
        ({}, OWN | {"keep_truncated": False}, "set keep_truncated: true"),
        ({}, OWN | {"data": {"traces": 0.5, "again": 0.5}}, "several teachers"),
        ({}, OWN | {"teacher": "base"}, "no tail to estimate"),
        ({}, {"loss": {"fn": "forward_kl", "tail": "bucket", "bucket_share": 0.5}}, "nothing to mix"),
        ({"tail_draws": 0}, {"loss": {"fn": "forward_kl", "bucket_share": 0.5}}, "the bucket alone"),
        ({}, {"loss": {"fn": "forward_kl", "tail": "tokens"}}, "tail"),
        ({}, {"loss": {"fn": "reverse_kl", "tail": "draws"}}, "unknown key"),
    ],
)
def test_what_would_be_wrong_is_refused_before_anything_runs(tmp_path, tiny_dir, traces, student, wanted):
    again = {"kind": "score", "model": "base", "data": "traces", "tail_draws": 4, "engine": REFERENCE}
    stages = {"traces": TRACES | traces, "again": again, "clean": CLEAN, "student": STUDENT | student}
    ctx = context(tmp_path, "student", tiny_dir, stages)
    with pytest.raises(UserError, match=wanted):
        checks.train("student", ctx.recipe.stages["student"], ctx.recipe)


def test_filters_of_the_prompt_leave_the_own_token_a_draw(tmp_path, tiny_dir):
    asked = {"kind": "filter", "data": "traces", "keep": [{"fn": "decontaminate", "against": "sums"}]}
    ctx = context(
        tmp_path, "student", tiny_dir, {"traces": TRACES, "clean": asked, "student": STUDENT | OWN | {"data": "clean"}}
    )
    checks.train("student", ctx.recipe.stages["student"], ctx.recipe)
    drawn = STUDENT | {"data": "clean", "loss": {"fn": "forward_kl", "tail": "draws"}}
    ctx = context(tmp_path, "student", tiny_dir, {"traces": TRACES, "clean": CLEAN, "student": drawn})
    checks.train("student", ctx.recipe.stages["student"], ctx.recipe)


def test_a_folder_says_what_chose_its_traces(run, tiny_dir, tmp_path):
    """The same refusal by what lies in a selection's folder, at the check and when the stage opens it."""
    kept = {
        "kind": "filter",
        "data": str(run / "traces" / "traces"),
        "keep": [{"fn": "paragraphs", "max_words": 10000}],
    }
    do(filtering, tmp_path, "clean", tiny_dir, {"clean": kept})
    stages = {"student": STUDENT | OWN | {"data": str(tmp_path / "clean" / "traces")}}
    ctx = context(tmp_path, "student", tiny_dir, stages)
    for refuse in (lambda c: checks.train("student", c, ctx.recipe), lambda c: train.run(c, ctx)):
        with pytest.raises(UserError, match=r"selected by what they led to \(paragraphs\)"):
            refuse(ctx.recipe.stages["student"])
    too_long = STUDENT | OWN | {"data": str(run / "traces" / "traces"), "max_tokens": 5}
    ctx = context(tmp_path, "student", tiny_dir, {"student": too_long})
    with pytest.raises(UserError, match="max_tokens: 5 traces are longer"):
        train.run(ctx.recipe.stages["student"], ctx)


@pytest.mark.parametrize(
    ("loss", "changes", "wanted"),
    [
        ({"tail": "own_token"}, {"scoring": "engine"}, "tokens of an on_policy stage are the student's"),
        ({"tail": "draws"}, {"scoring": "engine"}, "returns no draws"),
        ({"tail": "draws"}, {}, "no tail to estimate"),
    ],
)
def test_on_policy_has_no_samples_of_the_teacher(tmp_path, tiny_dir, loss, changes, wanted):
    stage = {
        "kind": "on_policy", "model": "base", "teacher": "base", "task": "sums", "steps": 1,
        "loss": {"fn": "forward_kl", **loss}, **changes,
    }  # fmt: skip
    ctx = context(tmp_path, "student", tiny_dir, {"student": stage})
    with pytest.raises(UserError, match=wanted):
        checks.on_policy("student", ctx.recipe.stages["student"], ctx.recipe)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"top_logprobs": 0}, "needs top_logprobs > 0"),
        ({"tail_draws": 33}, "less than or equal to 32"),
        ({"engine": {"fn": "openai", "base_url": "http://x/v1", "model": "m"}}, "not draws from the others"),
    ],
)
def test_draws_that_no_engine_can_give_are_refused(tmp_path, tiny_dir, changes, wanted):
    with pytest.raises(UserError, match=wanted):
        context(tmp_path, "traces", tiny_dir, {"traces": TRACES | changes})
