"""A user's stage kind that is interrupted, grows, predicts its cost, and returns a wrong result."""

from __future__ import annotations

import pytest
from project import SUMS, Project

MODULE = '''
"""A kind that counts to `steps`, writes one file per step beside its model, and fails once half-way."""

import shutil

from distill.recipe import Input, StageConfig
from distill.recipe.fields import execution, growth
from distill.records import Cost
from distill.run.predictions.row import Row, make_amounts
from distill.stages.context import Result


class Count(StageConfig):
    writes = "model"
    model: str
    steps: int = growth(4)
    offset: int = 0
    noise: int = execution(0)

    def inputs(self):
        yield Input("model", self.model)

    def predict(self, name, known, machine):
        known.assume(name, self)
        return [Row(name, self.kind, make_amounts(tokens=1000.0 * self.steps, seconds=60.0 * self.steps))]

    def run(self, context):
        out = context.folder / "model"
        if not out.exists():
            shutil.copytree(context.model_dir(self.model), out)
        there = len(list(context.folder.glob("step-*")))
        for step in range(there, self.steps):
            if step == 2 and not (context.run / "go").exists():
                raise RuntimeError("half-way")
            (context.folder / f"step-{step}").touch()
        return Result(Cost(), {"resumed_at": there, "draw": context.seed}, f"counted to {self.steps}")


class Nothing(StageConfig):
    def run(self, context):
        return {"metrics": 1}
'''


@pytest.fixture
def project(tiny_dir, tmp_path):
    (tmp_path / "counting.py").write_text(MODULE)
    stages = {"count": {"kind": "counting:Count", "model": "base", "seed": 5}}
    tree = {"name": "own", "models": {"base": str(tiny_dir)}, "tasks": {"sums": SUMS}, "stages": stages}
    return Project(tmp_path, tree)


def test_it_goes_on_where_it_was_and_grows(project):
    failed = project.run()
    assert failed.returncode == 1
    assert "RuntimeError: half-way" in failed.stderr
    assert project.state("count")["status"] == "failed"
    refused = project.run("stages.count.offset=1")
    assert refused.returncode == 2
    assert "offset: 0 -> 1" in refused.stderr
    (project.run_dir / "go").touch()
    resumed = project.run("stages.count.noise=3")
    assert resumed.returncode == 0, resumed.stderr
    assert "resume: it was interrupted" in resumed.stdout
    assert project.state("count")["metrics"]["resumed_at"] == 2
    assert project.state("count")["metrics"]["draw"] == 5
    grown = project.run("stages.count.steps=6")
    assert "grow: steps: 4 -> 6" in grown.stdout
    assert project.state("count")["metrics"]["resumed_at"] == 4
    assert "count: done already" in project.run("--only", "count", "stages.count.steps=6").stdout


def test_its_own_prediction_stands_in_check_and_beside_what_was_measured(project):
    checked = project.distill("check", "own.yaml")
    assert checked.returncode == 0, checked.stderr
    (line,) = [line for line in checked.stdout.splitlines() if line.startswith("count")]
    assert line.split()[2:] == ["4", "k", "4", "min", "00", "s"]
    assert "not known" not in checked.stdout
    (project.run_dir).mkdir(parents=True)
    (project.run_dir / "go").touch()
    assert project.run().returncode == 0
    assert project.state("count")["predicted"]["tokens"] == 4000


def test_what_is_no_result_is_the_user_s_error(project):
    project.tree["stages"] = {"none": {"kind": "counting:Nothing"}}
    done = project.rewrite().run()
    assert done.returncode == 2
    assert "stages.none: counting:Nothing returned {'metrics': 1}, not a distill.stages.context.Result" in done.stderr
