"""train on the same traces as several teachers scored them, through the real command line."""

from __future__ import annotations

import json

import pytest
from project import REFERENCE, Project

from distill import recipe
from distill.records import UserError


@pytest.fixture(scope="module")
def finished(tiny_dir, other_dir, tmp_path_factory):
    """Eight traces scored by the student itself, and five of them, in reverse order, scored by another model."""
    folder = tmp_path_factory.mktemp("several")
    rows = [
        {"messages": [{"role": "user", "content": f"{n} + 1?"}, {"role": "assistant", "content": f"{n + 1}."}]}
        for n in range(10, 18)
    ]  # fmt: skip
    for name, some in (("all", rows), ("some", rows[6:1:-1]), ("none", [{**rows[0], "messages": [rows[0]["messages"][0], {"role": "assistant", "content": "no"}]}])):  # fmt: skip
        text = "".join(json.dumps(row) + "\n" for row in some)
        (folder / f"{name}.jsonl").write_text(text)
    score = {"kind": "score", "top_logprobs": 8, "mass": 1.0, "exact": True, "engine": REFERENCE, "shard_rows": 2}  # fmt: skip
    train = {
        "kind": "train", "model": "base", "epochs": 2, "batch_traces": 8, "dtype": "float32", "lr": 1e-4,
    }  # fmt: skip
    tree = {
        "name": "several",
        "models": {"base": str(tiny_dir), "other": str(other_dir)},
        "stages": {
            "own": {**score, "model": "base", "data": "./all.jsonl"},
            "its": {**score, "model": "other", "data": "./some.jsonl"},
            "apart": {**score, "model": "other", "data": "./none.jsonl"},
            "single": {**train, "data": "its"},
            "drawn": {
                **train,
                "data": "its",
                "teacher": "other",
                "loss": {"fn": "sampled_kd", "draws": 256},
            },
            "both": {**train, "data": {"own": 3.0, "its": 1.0}},
        },
    }
    made = Project(folder, tree)
    done = made.run()
    assert done.returncode == 0, done.stdout + done.stderr
    made.said = done.stdout
    return made


def test_the_student_as_its_own_teacher_adds_nothing_and_the_other_its_share(finished):
    own, other = finished.losses("both")[0], finished.losses("single")[0]
    assert other > 0.01
    assert own == pytest.approx(other / 4, rel=1e-3)


def test_drawn_targets_cost_the_kl_and_the_teachers_entropy(finished):
    """The cross entropy under sampled tokens is near the whole cross entropy, and above the KL alone."""
    first = json.loads((finished.run_dir / "drawn" / "metrics.jsonl").read_text().splitlines()[0])
    assert finished.losses("single")[0] < first["loss"] < 1.5 * first["label_nll"] + 10
    assert finished.state("drawn")["teacher_cost"]["flops"] > 0


def test_traces_that_one_set_lacks_are_left_out_and_counted(finished):
    assert finished.state("both")["metrics"]["examples"] == 5
    assert "3 traces left out: not in every set" in finished.said


def test_a_resumed_epoch_goes_on_where_it_stood(finished):
    from distill.stages.inputs.multi_teacher import join
    from distill.traces.reader import open_traces

    readers = [open_traces(finished.run_dir / name / "traces") for name in ("own", "its")]
    source, missing = join(readers, {"own": 1.0, "its": 1.0}, seed=3, where="data")
    assert missing == 3
    whole = [example.trace_id for example in source.epoch(1)]
    assert len(set(whole)) == 5
    assert [example.trace_id for example in source.epoch(1, skip=3)] == whole[3:]


def test_a_change_in_either_set_is_a_change(finished):
    inputs = finished.state("both")["inputs"]
    assert inputs["data"] not in ("", finished.state("single")["inputs"]["data"])


def test_sets_that_have_nothing_in_common_are_refused(finished):
    done = finished.run("stages.both.data={own: 1, apart: 1}", "--redo", "both", "--only", "both")
    assert done.returncode == 2
    assert "stages.both.data: own, apart have no trace in common" in done.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.both.data={own: 1, itts: 1}", "Did you mean 'its'"),
        ("stages.both.data={own: 1, its: 0}", "greater than 0"),
        ("stages.both.teacher=other", "which are not used with `teacher`"),
    ],
)
def test_mistakes_are_one_message(finished, override, message):
    with pytest.raises(UserError) as caught:
        recipe.load(finished.recipe, [override])
    assert message in str(caught.value)
