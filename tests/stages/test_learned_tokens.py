"""Stages that learn, or store, a share of the tokens, and that match hidden states, through the real command line."""

from __future__ import annotations

import json
import math

import pytest
from project import REFERENCE, SUMS, Project

from distill import run_folder
from distill.stages.inputs.layer_pairs import KeptLayers, layers_kept
from distill.traces.reader import open_traces

OWN = '''
def early(tokens, *, late: bool = False):
    """The later half first, or the earlier one."""
    import numpy as np
    places = np.arange(len(tokens), dtype=float)
    return places if late else -places
'''
TRAIN = {
    "kind": "train",
    "model": "base",
    "steps": 2,
    "batch_traces": 4,
    "dtype": "float32",
    "lr": 1e-4,
    "keep_truncated": True,
}


@pytest.fixture(scope="module")
def finished(tiny_dir, other_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned")
    (folder / "mine.py").write_text(OWN)
    rows = [{"prompt": f"{n} + 1?", "completion": f"{n + 1} and so on."} for n in range(8)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    score = {"kind": "score", "model": "other", "data": "traces", "top_logprobs": 8, "mass": 0.9, "engine": REFERENCE}
    tree = {
        "name": "learned",
        "models": {"base": str(tiny_dir), "other": str(other_dir)},
        "tasks": {"sums": SUMS},
        "stages": {
            "traces": {"kind": "generate", "model": "base", "task": "sums", "problems": 4, "top_logprobs": 0,
                       "sampling": {"max_tokens": 10}, "engine": REFERENCE},
            "whole": score,
            "unsure": {**score, "weights": {"fn": "entropy", "share": 0.25}},
            "first": {**score, "weights": {"fn": "prefix", "share": 0.5}},
            "plain": {**TRAIN, "data": "whole"},
            "entropy": {**TRAIN, "data": "whole", "weights": {"fn": "entropy", "share": 0.25}},
            "kept": {**TRAIN, "data": "unsure"},
            "prefix": {**TRAIN, "data": "whole", "weights": {"fn": "prefix", "share": 0.5}},
            "half": {**TRAIN, "data": "first"},
            "own": {**TRAIN, "data": "whole", "weights": {"fn": "mine:early", "share": 0.5}},
            "divergence": {**TRAIN, "data": "whole", "weights": {"fn": "divergence", "share": 0.5}},
            "pruned": {"kind": "prune", "model": "base", "layers": 2},
            "matched": {**TRAIN, "model": "pruned", "teacher": "base", "data": "traces", "hidden": {"fn": "cosine"},
                        "weights": {"fn": "entropy", "share": 0.5}},
        },
    }  # fmt: skip
    made = Project(folder, tree)
    done = made.run()
    assert done.returncode == 0, done.stdout + done.stderr
    made.said = done.stdout
    return made


def test_capture_stores_the_distributions_at_the_share_of_least_certain_positions(finished):
    whole = next(open_traces(finished.run_dir / "whole" / "traces").blocks(64))
    reader = open_traces(finished.run_dir / "unsure" / "traces")
    part = next(reader.blocks(64))
    assert (reader.metadata.positions, reader.metadata.position_share) == ("entropy", 0.25)
    for n in range(len(part)):
        stored, every = part.top_of(n), whole.top_of(n)
        assert part.completion_ids[n].tolist() == whole.completion_ids[n].tolist()
        assert part.logprob[n].tolist() == whole.logprob[n].tolist()
        held = stored.count_T > 0
        assert held.sum() == math.ceil(0.25 * len(held))
        assert (stored.tail_T[~held] == 0).all()
        for t in held.nonzero()[0]:
            mine, theirs = stored.slice(t, t + 1), every.slice(t, t + 1)
            assert mine.ids_E.tolist() == theirs.ids_E.tolist()
            assert mine.logp_E.tolist() == theirs.logp_E.tolist()


def test_training_on_them_is_training_with_the_same_weights_on_all(finished):
    """Positions without a distribution have weight 0, and the denominator leaves them out."""
    assert finished.losses("entropy")[0] > 0.01
    assert finished.losses("kept") == pytest.approx(finished.losses("entropy"), rel=1e-5)
    assert finished.losses("half") == pytest.approx(finished.losses("prefix"), rel=1e-5)
    assert finished.losses("own") == pytest.approx(finished.losses("prefix"), rel=1e-5)
    assert "the data hold distributions at 25% of the positions (entropy): the others have weight 0" in finished.said
    assert "weights: entropy keeps 25% of the tokens of each completion" in finished.said


def test_what_is_saved_is_in_the_ledger(finished):
    cost = {name: finished.state(name)["cost"] for name in ("plain", "entropy", "prefix", "half", "own")}
    assert cost["prefix"]["tokens_trained"] < cost["plain"]["tokens_trained"] == cost["entropy"]["tokens_trained"]
    assert cost["half"]["tokens_trained"] == cost["prefix"]["tokens_trained"]
    assert cost["prefix"]["flops"] < cost["own"]["flops"] < cost["plain"]["flops"]
    # The head's gradient of half the rows, for a forward pass of all of them: 3 units become 1 + 1.5.
    saved = cost["plain"]["flops"] - cost["own"]["flops"]
    ranked = finished.state("divergence")["cost"]["flops"] - cost["own"]["flops"]
    assert ranked == pytest.approx(saved * 2 / 3, rel=0.02)


def test_verify_and_the_page_read_shards_with_few_positions(finished):
    traces = str(finished.run_dir / "unsure" / "traces")
    done = finished.distill("traces", "verify", traces)
    assert done.returncode == 0, done.stdout + done.stderr
    for verb in (("inspect", traces), ("traces", "stats", traces)):
        done = finished.distill(*verb)
        assert done.returncode == 0, done.stdout + done.stderr


def test_matching_a_student_with_its_own_teacher_adds_nothing(finished):
    """All layers of the teacher are kept, so the first step's hidden states are the teacher's."""
    lines = [json.loads(line) for line in (finished.run_dir / "matched" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["hidden"] == pytest.approx(0, abs=1e-3)
    assert lines[0]["loss"] == pytest.approx(0, abs=1e-3)
    recipe = run_folder.recipe(finished.run_dir)
    assert layers_kept(recipe, finished.run_dir, "matched", 2) == KeptLayers([0, 1], 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stages.plain.weights={fn: entropie}", "there is no 'entropie'"),
        ("stages.plain.weights={fn: entropy, share: 1.5}", "share"),
        ("stages.plain.weights={fn: entropy, shar: 0.5}", "stages.plain.weights.shar: unknown key"),
        ("stages.whole.weights={fn: divergence}", "nothing is trained here"),
        ("stages.own={kind: train, model: base, steps: 1, data: ./text.jsonl, loss: {fn: cross_entropy}, weights: {fn: entropy}}", "reads the teacher's distributions, and './text.jsonl' holds conversations"),
        ("stages.matched.weights={fn: 'mine:early'}", "your own function reads stored distributions"),
        ("stages.plain.hidden={weight: 1}", "hidden states are those of one teacher in the trainer"),
        ("stages.matched.hidden={layers: [0, 2]}", "the student has 2 layers, numbered 0 to 1; there is no 2"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_before_the_run(finished, change, message):
    done = finished.distill("check", finished.recipe.name, change)
    assert done.returncode == 2
    assert message in done.stderr + done.stdout


def test_check_says_the_share_and_predicts_what_is_saved(finished):
    done = finished.distill("check", finished.recipe.name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stages.kept: about 25% of the completions' tokens are learned" in done.stdout
