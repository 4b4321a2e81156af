"""Stages that learn, or store, a share of the tokens, and that match hidden states, run in this process."""

from __future__ import annotations

import io
import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from project import REFERENCE, SUMS

from distill import plug, recipe, run_folder
from distill.machine import Machine, Rates
from distill.progress import Screen
from distill.records import UserError
from distill.run import plan
from distill.stages.context import Context
from distill.stages.inputs.layer_pairs import KeptLayers, layers_kept
from distill.traces.reader import open_traces
from distill.traces.summary import stats
from distill.traces.verify import verify

OWN = '''
import numpy as np

def early(tokens, *, late: bool = False):
    """The later tokens first, or the earlier ones."""
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


@dataclass
class Run:
    """A finished run: what its stages returned and said."""

    folder: Path
    tree: dict[str, Any]
    results: dict[str, Any] = field(default_factory=dict)
    said: str = ""

    def losses(self, stage: str) -> list[float]:
        return [line["loss"] for line in self.lines(stage)]

    def lines(self, stage: str) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.folder / stage / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tiny_dir, other_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned")
    (folder / "learned_plugs.py").write_text(OWN)
    plug.add_import_folder(folder)
    rows = [{"prompt": f"{n} + 1?", "completion": f"{n + 1} and so on."} for n in range(8)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    score = {
        "kind": "score",
        "model": "other",
        "data": "traces",
        "top_logprobs": 8,
        "mass": 0.9,
        "exact": True,
        "engine": REFERENCE,
    }
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
            "own": {**TRAIN, "data": "whole", "weights": {"fn": "learned_plugs:early", "share": 0.5}},
            "divergence": {**TRAIN, "data": "whole", "weights": {"fn": "divergence", "share": 0.5}},
            "pruned": {"kind": "prune", "model": "base", "layers": 2},
            "matched": {**TRAIN, "model": "pruned", "teacher": "base", "data": "traces", "hidden": {"fn": "cosine"},
                        "weights": {"fn": "entropy", "share": 0.5}},
        },
    }  # fmt: skip
    made = Run(folder, tree)
    resolved = recipe.validate(tree)
    for name in recipe.order(resolved):
        config, words = resolved.stages[name], io.StringIO()
        context = Context(recipe=resolved, run=folder, name=name, screen=Screen(words))
        context.folder.mkdir()
        made.results[name] = config.implementation()(config, context)
        done = run_folder.State(config.kind, {}, {}, "done", metrics=dict(made.results[name].metrics))
        run_folder.write(context.folder, done)
        made.said += words.getvalue()
    return made


def test_capture_stores_the_distributions_at_the_share_of_least_certain_positions(finished):
    whole = next(open_traces(finished.folder / "whole" / "traces").blocks(64))
    reader = open_traces(finished.folder / "unsure" / "traces")
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
    cost = {name: result.cost for name, result in finished.results.items()}
    assert cost["prefix"].tokens_trained < cost["plain"].tokens_trained == cost["entropy"].tokens_trained
    assert cost["half"].tokens_trained == cost["prefix"].tokens_trained
    assert cost["prefix"].flops < cost["own"].flops < cost["plain"].flops
    # The head's gradient of half the rows, for a forward pass of all of them: 3 units become 1 + 1.5.
    saved = cost["plain"].flops - cost["own"].flops
    ranked = cost["divergence"].flops - cost["own"].flops
    assert ranked == pytest.approx(saved * 2 / 3, rel=0.02)


def test_shards_with_few_positions_are_whole(finished):
    report, held = verify(finished.folder / "unsure" / "traces"), stats(finished.folder / "unsure" / "traces")
    assert report.ok, report
    # Entries and tails are of the positions that have a distribution, and of the least certain ones.
    whole = stats(finished.folder / "whole" / "traces")
    assert held.mean_support >= whole.mean_support
    assert held.mean_tail_mass < 1
    assert held.bytes_per_position < whole.bytes_per_position


def test_matching_a_student_with_its_own_teacher_adds_nothing(finished):
    """All layers of the teacher are kept, so the first step's hidden states are the teacher's."""
    lines = finished.lines("matched")
    assert lines[0]["hidden"] == pytest.approx(0, abs=1e-3)
    assert lines[0]["loss"] == pytest.approx(0, abs=1e-3)
    assert layers_kept(recipe.validate(finished.tree), finished.folder, "matched", 2) == KeptLayers([0, 1], 2)


WHOLE = {"fn": "entropy", "share": 0.5}


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        ("plain", {"weights": {"fn": "entropie"}}, "there is no 'entropie'"),
        ("plain", {"weights": {**WHOLE, "share": 1.5}}, "stages.plain.weights.share: input should be less than 1"),
        ("plain", {"weights": {**WHOLE, "shar": 1}}, "stages.plain.weights.shar: unknown key"),
        ("traces", {"weights": WHOLE}, "no distribution is stored with top_logprobs: 0"),
        ("whole", {"weights": {"fn": "divergence"}}, "nothing is trained here"),
        ("plain", {"data": "traces", "weights": WHOLE, "loss": {"fn": "cross_entropy"}}, "'traces' generates with top_logprobs: 0"),
        ("plain", {"data": "text.jsonl", "weights": WHOLE, "loss": {"fn": "cross_entropy"}}, "'text.jsonl' holds conversations"),
        ("matched", {"weights": {"fn": "learned_plugs:early"}}, "your own function reads stored distributions"),
        ("matched", {"loss": {"fn": "sampled_kd"}, "weights": {"fn": "divergence"}}, "sampled_kd draws a few ids"),
        ("matched", {"loss": {"fn": "uld"}}, "compares stretches of text, not tokens"),
        ("matched", {"loss": {"fn": "uld"}, "weights": None}, "hidden states belong to different"),
        ("plain", {"hidden": {"weight": 1}}, "hidden states are those of one teacher in the trainer"),
        ("matched", {"hidden": {"layers": [0, 2]}}, "the student has 2 layers, numbered 0 to 1; there is no 2"),
        ("matched", {"hidden": {"layers": [1, 1]}}, "name at least one layer of the student, each once"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_before_the_run(finished, monkeypatch, stage, change, message):
    monkeypatch.chdir(finished.folder)
    tree = {**finished.tree, "stages": {**finished.tree["stages"], stage: {**finished.tree["stages"][stage], **change}}}
    with pytest.raises(UserError) as caught:
        plan.check_plugs(recipe.validate(tree))
    assert message in str(caught.value)


MACHINE = Machine(
    "key", "cpu", "made up", 2, 16e9, 1e10, {"32x64": {d: Rates(*[1e11] * 4) for d in ("float32", "bfloat16")}}
)


def test_widths_that_do_not_match_are_refused_by_the_prediction(finished, narrow_dir, tmp_path):
    folder = shutil.copytree(narrow_dir, tmp_path / "narrow")  # a prediction reads the config alone
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    stages = {**finished.tree["stages"], "pruned": {"kind": "prune", "model": "narrow", "layers": 2}}
    tree = {**finished.tree, "models": {**finished.tree["models"], "narrow": str(folder)}, "stages": stages}
    with pytest.raises(UserError, match=r"matched\.hidden: the student pruned has hidden states of width"):
        list(plan.planned(recipe.validate(tree), MACHINE))


def test_check_says_the_share_and_predicts_what_is_saved(finished):
    rows = {row.name: row for each in plan.planned(recipe.validate(finished.tree), MACHINE) for row in each.rows}
    assert (
        "stages.kept: about 25% of the completions' tokens are learned; the others have weight 0" in rows["kept"].notes
    )
    assert rows["prefix"].amounts["flops"] < rows["own"].amounts["flops"] < rows["divergence"].amounts["flops"]
    assert rows["divergence"].amounts["flops"] < rows["plain"].amounts["flops"]
    assert rows["half"].amounts["tokens"] == rows["prefix"].amounts["tokens"] < rows["plain"].amounts["tokens"]
    assert rows["unsure"].amounts["bytes"] < rows["whole"].amounts["bytes"]
    for name in ("prefix", "divergence", "kept"):
        ratio = rows[name].amounts["flops"] / rows["plain"].amounts["flops"]
        measured = finished.results[name].cost.flops / finished.results["plain"].cost.flops
        assert ratio == pytest.approx(measured, rel=0.15)
