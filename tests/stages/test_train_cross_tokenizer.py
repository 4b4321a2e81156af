"""train and on_policy with a teacher that has another tokenizer (Mistral's beside SmolLM2's), through the real command line."""

from __future__ import annotations

import json

import pytest
from project import REFERENCE, SUMS, Project

from distill import recipe
from distill.records import UserError
from distill.run.plan import check_plugs


@pytest.fixture(scope="module")
def finished(tiny_dir, foreign_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unlike")
    rows = [
        {"messages": [{"role": "user", "content": f"{n} + 1?"}, {"role": "assistant", "content": f"Das wären {n + 1}."}]}
        for n in range(12, 18)
    ]  # fmt: skip
    (folder / "worked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = {
        "kind": "train", "model": "base", "teacher": "foreign", "steps": 3, "batch_traces": 6, "dtype": "float32",
        "lr": 1e-3, "warmup_ratio": 0.0,
    }  # fmt: skip
    traces = {
        "kind": "generate", "model": "base", "task": "sums", "problems": 6, "sampling": {"max_tokens": 6},
        "top_logprobs": 8, "engine": REFERENCE,
    }  # fmt: skip
    tree = {
        "name": "unlike",
        "models": {"base": str(tiny_dir), "foreign": str(foreign_dir)},
        "tasks": {"sums": SUMS},
        "stages": {
            "traces": traces,
            "sorted": {**train, "data": "./worked.jsonl", "loss": {"fn": "uld"}},
            "text": {**train, "data": "traces", "task": "sums", "keep_truncated": True, "loss": {"fn": "aligned"}},
            "own": {
                "kind": "on_policy", "model": "base", "teacher": "foreign", "task": "sums", "steps": 1, "prompts": 2,
                "group_size": 2, "sampling": {"max_tokens": 5}, "engine": REFERENCE, "dtype": "float32",
                "loss": {"fn": "aligned", "divergence": "jsd", "span_weight": 0},
            },
        },
    }  # fmt: skip
    made = Project(folder, tree)
    done = made.run()
    assert done.returncode == 0, done.stdout + done.stderr
    return made


def test_the_student_comes_nearer_to_a_teacher_with_another_tokenizer(finished):
    for stage in ("sorted", "text"):
        losses = finished.losses(stage)
        assert 0 < losses[-1] < losses[0]
        lines = (finished.run_dir / stage / "metrics.jsonl").read_text().splitlines()
        first = json.loads(lines[0])
        assert first["divergence"] == pytest.approx(first["loss"], rel=1e-5)
    assert finished.losses("own")[0] > 0


def test_what_the_teacher_read_is_counted_in_its_own_tokens(finished, mistral):
    """The teacher's cost in `sorted`: each conversation once per step, in the teacher's template, with an end token."""
    texts = [(f"[user] {n} + 1?\n[assistant] ", f"Das wären {n + 1}.") for n in range(12, 18)]
    each = [sum(len(mistral(part, add_special_tokens=False)["input_ids"]) for part in parts) + 1 for parts in texts]
    cost = finished.state("sorted")["teacher_cost"]
    assert cost["tokens_scored"] == 3 * sum(each)
    assert cost["flops"] > 0


def test_a_loss_that_compares_ids_is_refused_and_the_others_are_named(finished):
    done = finished.run("stages.sorted.loss={fn: forward_kl}", "--redo", "sorted", "--only", "sorted")
    assert done.returncode == 2
    assert "stages.sorted.loss: forward_kl compares token ids" in done.stderr
    assert "aligned or uld" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.text.teacher=null", "needs one teacher in the trainer"),
        ("stages.text.teacher={foreign: 1, base: 1}", "needs one teacher in the trainer"),
        ("stages.own.scoring=engine", "with scoring: trainer"),
        ("stages.text.loss={fn: aligned, spanweight: 1}", "Did you mean 'span_weight'"),
        ("stages.text.loss={fn: aligned, divergence: kl}", "stages.text.loss.divergence"),
    ],
)
def test_mistakes_are_one_message(finished, override, message):
    with pytest.raises(UserError) as caught:
        check_plugs(recipe.load(finished.recipe, [override]))
    assert message in str(caught.value)
