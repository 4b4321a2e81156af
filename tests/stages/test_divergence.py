"""divergence: the KL of a model to the teacher that sampled some traces, against the whole vocabulary."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from project import REFERENCE, SUMS, Project

from distill import models, recipe
from distill.progress import Screen
from distill.records import UserError
from distill.reports.divergence import TraceSums, kl_difference, summary
from distill.stages import divergence
from distill.stages.context import Context
from distill.traces import provenance
from distill.traces.reader import open_traces
from distill.training.loss.head import Targets, head_loss


def held_out(**changes) -> dict:
    return {
        "kind": "generate", "model": "teacher", "task": "sums", "split": "held_out", "problems": 5, "sampling": {"max_tokens": 6},
        "top_logprobs": 4, "mass": 1.0, "exact": True, "engine": REFERENCE, **changes,
    }  # fmt: skip


def tree(teacher: Path, student: Path, **stages) -> dict:
    verdict = {
        "kind": "compare", "arms": {"same": "teacher", "other": "student"}, "task": "sums", "problems": 4, "targets": "held",
        "sampling": {"max_tokens": 4, "temperature": 0}, "engine": REFERENCE,
    }  # fmt: skip
    return {
        "name": "far",
        "models": {"teacher": str(teacher), "student": str(student)},
        "tasks": {"sums": SUMS},
        "stages": {"held": held_out(), "verdict": verdict, **stages},
    }


@pytest.fixture(scope="module")
def other_dir(tiny_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    model = models.load(tiny_dir, dtype="float32")
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    models.save(model, models.load_tokenizer(tiny_dir), folder)
    return folder


def test_the_mean_over_the_teachers_draws_is_the_kl_over_the_whole_vocabulary():
    """Enumerated in fp64: at a position, each token of a vocabulary of 50 as the trace's own, weighted by the teacher."""
    torch.manual_seed(0)
    V, D, K = 50, 8, 6
    p_V = (3 * torch.randn(V, dtype=torch.float64)).softmax(0)
    hidden_D, weight_VD = torch.randn(D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)
    logq_V = (weight_VD @ hidden_D).log_softmax(0)
    whole = float((p_V * (p_V.log() - logq_V)).sum())
    top = p_V.topk(K)
    rest = (1 - top.values.sum()).log()
    targets = Targets(
        torch.arange(V), torch.ones(V), top.indices.expand(V, K), top.values.log().expand(V, K), rest.expand(V)
    )
    measures = head_loss(
        hidden_D.expand(V, D), weight_VD, divergence.divergences_of, targets, measure=divergence.divergences_of_token
    ).measures
    each = {name: value.numpy() for name, value in measures.items()}
    sums = divergence.trace_sums(
        tuple(f"{v:02}" for v in range(V)), [np.array([logp]) for logp in p_V.log().tolist()], each
    )
    expected = {name: float((p_V.numpy() * value_N).sum()) for name, value_N in sums.sums.items()}
    assert expected["kl"] == pytest.approx(whole, rel=1e-12)
    assert expected["bound"] < whole
    assert expected["label_nll"] == pytest.approx(float(-(p_V * logq_V).sum()), rel=1e-12)
    best = int(logq_V.argmax())
    assert expected["overconfidence"] == pytest.approx(float(logq_V[best].exp() - p_V[best]), rel=1e-12)


@pytest.fixture(scope="module")
def compared(tiny_dir, other_dir, tmp_path_factory) -> Project:
    project = Project(tmp_path_factory.mktemp("far"), tree(tiny_dir, other_dir))
    done = project.run()
    assert done.returncode == 0, done.stdout + done.stderr
    return project


def test_a_comparison_measures_its_arms_on_the_teachers_held_out_traces(compared, other_dir, tiny_dir):
    """Against the plain forward pass of both models, token by token."""
    report = json.loads((compared.run_dir / "report.json").read_text())
    same, other = (report["arms"][arm]["divergence"] for arm in ("same", "other"))
    assert same["traces"] == other["traces"] == 5
    assert same["kl"]["value"] == pytest.approx(0, abs=1e-4)
    teacher, student = (models.load(folder, dtype="float32").eval() for folder in (tiny_dir, other_dir))
    kl, num = 0.0, 0
    for block in open_traces(compared.run_dir / "held" / "traces").blocks():
        for n in range(len(block)):
            prompt, reply = block.prompt_ids[n], block.completion_ids[n]
            ids = torch.from_numpy(np.concatenate([prompt, reply]).astype(np.int64))[None]
            with torch.no_grad():
                logp_CV, logq_CV = (
                    m(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(1) for m in (teacher, student)
                )
            for t, token in enumerate(reply):
                kept = set(logp_CV[t].topk(4).indices.tolist())
                gap_V = logp_CV[t] - logq_CV[t]
                kl += sum(float(logp_CV[t, v].exp() * gap_V[v]) for v in kept)
                kl += 0.0 if int(token) in kept else float(gap_V[int(token)])
                num += 1
    assert other["kl"]["value"] == pytest.approx(kl / num, rel=1e-3, abs=1e-3)
    assert other["kl"]["low"] < other["kl"]["value"] < other["kl"]["high"]
    assert other["bound"]["value"] > 0
    text = (compared.run_dir / "report.md").read_text()
    assert "Held-out KL" in text
    rows = {row["name"]: row for row in report["stages"]}
    for child in ("verdict.same.divergence", "verdict.other.divergence"):
        assert rows[child]["kind"] == "divergence"
        assert rows[child]["cost"]["tokens_scored"] > 0
        assert rows[child]["predicted"]["flops"] > 0
    assert "done already" in compared.run().stdout


def test_held_out_traces_are_marked_and_no_stage_trains_on_them(compared, tiny_dir, other_dir):
    folder = compared.run_dir / "held" / "traces"
    assert provenance.is_held_out(open_traces(folder).metadata)
    train = {"kind": "train", "model": "student", "data": "held", "loss": {"fn": "forward_kl"}, "epochs": 1}
    with pytest.raises(UserError, match="held' generates traces of held-out problems"):
        recipe.validate(tree(tiny_dir, other_dir, kl=train))
    with pytest.raises(UserError, match="held' generates traces of held-out problems"):
        recipe.validate(
            tree(tiny_dir, other_dir, kl={**train, "data": "some"}, some={"kind": "filter", "data": "held", "keep": [{"fn": "correct"}]})
        )  # fmt: skip
    by_path = {**train, "data": str(folder), "keep_truncated": True}
    ctx = Context(
        recipe=recipe.validate(tree(tiny_dir, other_dir, kl=by_path)),
        run=compared.run_dir,
        name="kl",
        screen=Screen(io.StringIO()),
    )
    from distill.stages.inputs.train_examples import open_source

    with pytest.raises(UserError, match="holds traces of held-out problems"):
        open_source(ctx.recipe.stages["kl"], ctx, models.load_tokenizer(tiny_dir))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"split": "train"}, "train problems"),
        ({"top_logprobs": 0}, "stores no distributions"),
        ({"sampling": {"temperature": 0.0, "max_tokens": 6}}, "own distribution"),
        ({"sampling": {"top_p": 0.9, "max_tokens": 6}}, "own distribution"),
    ],
)
def test_targets_that_no_arm_can_be_measured_on_are_refused(tiny_dir, other_dir, changes, why):
    with pytest.raises(UserError, match=rf"stages\.verdict\.targets: .*{why}"):
        recipe.validate(tree(tiny_dir, other_dir, held=held_out(**changes)))


def test_a_selection_is_no_target(tiny_dir, other_dir):
    some = {"kind": "filter", "data": "held", "keep": [{"fn": "correct"}]}
    given = tree(tiny_dir, other_dir, some=some)
    given["stages"]["verdict"]["targets"] = "some"
    with pytest.raises(UserError, match="is not a generate stage"):
        recipe.validate(given)


def sums_of(kl_N, tokens_N) -> TraceSums:
    kl_N = np.array(kl_N, float)
    return TraceSums(
        [str(n) for n in range(len(kl_N))],
        np.array(tokens_N),
        dict.fromkeys(("kl", "bound", "label_nll", "overconfidence"), kl_N),
    )


def test_the_mean_is_over_tokens_and_differences_are_paired():
    found = summary([sums_of([2.0, 6.0, 1.0], [10, 20, 15])])
    assert found["kl"]["value"] == pytest.approx(9 / 45)
    rng = np.random.default_rng(0)
    noise_N = rng.normal(size=40)
    a, b = (sums_of(10 + 10 * noise_N + shift, [10] * 40) for shift in (0.5, 0.0))
    difference = kl_difference([a], [b])
    assert difference["value"] == pytest.approx(0.05)
    assert difference["high"] - difference["low"] < 1e-6
    seeds = [sums_of(10 + 10 * noise_N + shift, [10] * 40) for shift in (0.0, 1.0, 2.0)]
    over = summary(seeds)["kl"]
    assert over["method"] == "seeds and problems"
    assert over["high"] > 1.1
    paired = kl_difference(seeds, [sums_of(30 + 10 * noise_N + shift, [10] * 40) for shift in (0.0, 1.0, 2.0)])
    assert paired["value"] == pytest.approx(-2.0)
    assert paired["low"] < -2.0 < paired["high"] < -1.5
    with pytest.raises(UserError, match="different traces"):
        kl_difference([a], [sums_of([1.0], [10])])
