"""A user's stage kind in a module beside the recipe: it runs, resumes, is refused, is redone and is read by other stages."""

from __future__ import annotations

import json

import pytest
from project import REFERENCE, SUMS, Project

from distill import recipe

MODULE = '''
"""Two stage kinds: one that writes traces, one that writes a model."""

import shutil

from distill.recipe import Input, PlugConfig, StageConfig
from distill.records import Cost
from distill.stages.context import Result
from distill.traces.reader import content_fingerprint
from distill.traces.selection import select


class Sample(StageConfig):
    """Keep the traces whose completion has at most `longest` tokens."""

    writes = "traces"
    corpus: str
    longest: int = 10_000

    def inputs(self):
        yield Input("data", self.corpus, "corpus")

    def run(self, context):
        out = context.folder / "traces"
        shutil.rmtree(out, ignore_errors=True)
        kept = select(context.data_path(self.corpus), out, [PlugConfig(fn="length", max_tokens=self.longest)], None)
        context.say(f"kept {kept.kept} of {kept.rows}")
        return Result(Cost(samples_filtered=kept.rows - kept.kept), {"kept": kept.kept}, content_fingerprint(out))


class Copy(StageConfig):
    """Copies a model without a change."""

    writes = "model"
    model: str

    def inputs(self):
        yield Input("model", self.model)

    def run(self, context):
        from distill import models

        out = context.folder / "model"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(context.model_dir(self.model), out)
        return Result(Cost(), {}, models.weights_fingerprint(out))


class NoRun(StageConfig):
    pass
'''


@pytest.fixture(scope="module")
def project(tiny_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    beside = folder / "recipes"
    beside.mkdir()
    (beside / "ownkinds.py").write_text(MODULE)
    train = {"kind": "train", "model": "copy", "data": "few", "steps": 2, "keep_truncated": True, "dtype": "float32"}
    tree = {
        "name": "own",
        "models": {"base": str(tiny_dir)},
        "tasks": {"sums": SUMS},
        "stages": {
            "copy": {"kind": "ownkinds:Copy", "model": "base"},
            "traces": {
                "kind": "generate", "model": "copy", "task": "sums", "problems": 4, "samples": 2, "top_logprobs": 4,
                "sampling": {"max_tokens": 8}, "engine": REFERENCE,
            },
            "few": {"kind": "ownkinds:Sample", "corpus": "traces"},
            "kl": train,
            "verdict": {
                "kind": "compare", "arms": {"start": "copy", "kl": "kl"}, "task": "sums", "problems": 2,
                "sampling": {"max_tokens": 8}, "engine": REFERENCE,
            },
        },
    }  # fmt: skip
    made = Project(beside, tree)
    made.folder = folder  # the recipe and its module lie in a folder below the working directory
    made.run_dir = folder / "runs" / "own"
    done = made.distill("run", "recipes/own.yaml")
    assert done.returncode == 0, done.stderr
    return made


def test_its_output_is_read_by_other_stages_and_it_stands_in_the_report(project):
    assert project.state("few")["metrics"]["kept"] == 8
    assert project.state("kl")["metrics"]["steps"] == 2
    report = json.loads((project.run_dir / "report.json").read_text())
    kinds = {stage["name"]: stage["kind"] for stage in report["stages"]}
    assert kinds["few"] == "ownkinds:Sample"
    assert set(report["arms"]) == {"start", "kl"}
    shown = project.distill("show", "runs/own")
    assert shown.returncode == 0, shown.stderr
    assert "ownkinds" in shown.stdout


def test_done_is_skipped_a_change_refused_and_redone(project):
    again = project.distill("run", "recipes/own.yaml")
    assert again.stdout.count("done already") == 7
    refused = project.distill("run", "recipes/own.yaml", "stages.few.longest=9")
    assert refused.returncode == 2
    assert "longest: 10000 -> 9" in refused.stderr
    redone = project.distill("run", "recipes/own.yaml", "--redo", "copy", "--only", "copy")
    assert redone.returncode == 0, redone.stderr
    assert "redo: as asked" in redone.stdout


def test_check_says_that_its_cost_is_not_known(project):
    done = project.distill("check", "recipes/own.yaml")
    assert done.returncode == 0, done.stderr
    assert "few: the cost of a stage of kind ownkinds:Sample is not known" in done.stdout


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.few.kind=ownkinds:Nothing", "stages.few.kind: cannot import 'ownkinds:Nothing'"),
        ("stages.few.kind=ownkinds:NoRun", "has no method run"),
        ("stages.few.kind=json:loads", "is not a subclass of distill.recipe.StageConfig"),
        ("stages.few.corpus=trcs", "stages.few.corpus: there is no stage 'trcs'. Did you mean 'traces'?"),
        ("stages.few.longst=3", "Did you mean 'longest'?"),
        ("stages.few.longest=many", "stages.few.longest"),
        (
            "stages.kl.data=copy",
            "'copy' is a stage of kind ownkinds:Copy, but this key needs a generate or score or filter stage",
        ),
        ("stages.kl.model=few", "'few' is a stage of kind ownkinds:Sample"),
        ("stages.few.kind=trian", "there is no stage kind 'trian'. Did you mean 'train'?"),
    ],
)
def test_mistakes_are_one_message(project, override, message):
    done = project.distill("check", "recipes/own.yaml", override)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_it_is_copied_for_each_seed_with_what_it_reads(project):
    """Fields of any name that refer to stages get the names of the copies."""
    loaded = recipe.load(project.recipe, ["stages.traces.seeds=[1,2]"])
    copies = {name: config.corpus for name, config in loaded.stages.items() if name.startswith("few")}
    assert copies == {"few@1": "traces@1", "few@2": "traces@2"}
    assert loaded.stages["kl@2"].data == "few@2"
