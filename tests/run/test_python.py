"""A recipe from Python: the same run as the command line's, continued from either side; typed; nothing heavy at import."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from project import REFERENCE, SUMS, Project

import distill

SCRIPT = """
import json, sys, distill
distill.run(json.load(open(sys.argv[1])))
"""


def recipe_tree(tiny_dir: Path) -> dict:
    return {
        "name": "road",
        "models": {"base": tiny_dir},
        "tasks": {"sums": SUMS},
        "stages": {
            "traces": {
                "kind": "generate", "model": "base", "task": "sums", "problems": 6, "sampling": {"max_tokens": 6},
                "top_logprobs": 8, "engine": REFERENCE,
            },
            "kl": {
                "kind": "train", "model": "base", "data": "traces", "loss": {"fn": "forward_kl"}, "keep_truncated": True,
                "steps": 12, "batch_traces": 3, "lr": 1e-3, "checkpoint_every": 2, "dtype": "float32",
            },
        },
    }  # fmt: skip


def as_text(tree: dict) -> dict:
    return json.loads(json.dumps(tree, default=str))


@pytest.fixture(scope="module")
def finished(tiny_dir, tmp_path_factory):
    """A run from Python, in a thread that is not the main one: notebooks and servers have such."""
    folder = tmp_path_factory.mktemp("python")
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(distill.run, recipe_tree(tiny_dir), {"stages.kl.micro_tokens": 512}, runs=folder).result()


def test_the_result_holds_report_metrics_models_and_traces(finished):
    assert [row["status"] for row in finished.report["stages"]] == ["done", "done"]
    steps = finished.metrics["kl"]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert steps[0]["loss"] == pytest.approx(0, abs=1e-4)  # the student is the teacher itself
    assert finished.models == {"kl": finished.folder / "kl" / "model"}
    assert (finished.models["kl"] / "config.json").is_file()
    traces = distill.load_traces(finished.traces["traces"])
    assert len(traces) == len(distill.load_traces(finished.folder / "traces")) == 6
    assert traces[0]["top_ids"].shape == (6, 8)
    assert finished.recipe.stages["kl"].micro_tokens == 512
    assert "<html" in finished.html.read_text()
    again = distill.open_run(finished.folder)
    assert again.report == finished.report
    assert again.recipe == finished.recipe


def test_the_command_line_records_the_same_and_goes_on(finished, tmp_path):
    project = Project(tmp_path, as_text(recipe_tree(finished.recipe.models["base"].source)))
    shutil.copytree(finished.folder, project.run_dir)
    grown = project.distill("run", "runs/road/recipe.yaml", "stages.kl.micro_tokens=512")
    assert grown.returncode == 0, grown.stderr
    assert grown.stdout.count("done already") == 2
    before = finished.folder / "resolved.yaml"
    assert (project.run_dir / "resolved.yaml").read_bytes() == before.read_bytes()
    named = project.run("stages.kl.micro_tokens=512")  # the same recipe as a file
    assert named.stdout.count("done already") == 2
    assert (project.run_dir / "resolved.yaml").read_bytes() == before.read_bytes()
    modules = [
        json.loads((run / "environment.json").read_text())["modules"] for run in (finished.folder, project.run_dir)
    ]
    assert modules == [str(Path.cwd()), str(tmp_path)]
    assert finished.report["reproduce"] == [
        f"distill run {finished.folder}/recipe.yaml stages.kl.micro_tokens=512 --runs {finished.folder.parent}"
    ]


def test_killed_in_python_the_command_line_goes_on_to_the_same_result(finished, tmp_path):
    tree = as_text(recipe_tree(finished.recipe.models["base"].source))
    (tmp_path / "tree.json").write_text(json.dumps(tree))
    project = Project(tmp_path, tree)
    shutil.copytree(finished.folder / "traces", project.run_dir / "traces")
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, "tree.json"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    while not any((project.run_dir / "kl" / "checkpoints").glob("step-*")):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1)
    assert project.state("kl")["status"] == "running"
    assert yaml.safe_load((project.run_dir / "recipe.yaml").read_text()) == tree
    resumed = project.distill("run", "runs/road/recipe.yaml")
    assert resumed.returncode == 0, resumed.stderr
    assert "resume" in resumed.stdout
    assert project.losses("kl") == [line["loss"] for line in finished.metrics["kl"]]
    # And the other way round: Python takes up what the command line has made.
    taken = distill.run(project.recipe, runs=tmp_path / "runs")
    assert [line["loss"] for line in taken.metrics["kl"]] == project.losses("kl")
    assert taken.report["stages"][1]["seconds"] == project.state("kl")["seconds"]


def test_mistakes_are_raised(tiny_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = recipe_tree(tiny_dir)
    for recipe, overrides, said in [
        ("quikstart", (), "no such file"),
        (tree, {"stages.kl.learning_rate": 1}, "stages.kl.learning_rate: unknown key"),
        (tree, ["stages.kl.lr"], "key=value"),
        (
            {**tree, "seed": print},
            (),
            "seed: a builtin_function_or_method cannot be written .* package.module:function",
        ),
        (7, (), "not int"),
    ]:
        with pytest.raises(distill.UserError, match=said):
            distill.run(recipe, overrides)
    with pytest.raises(distill.UserError, match=r"no stage 'kk'.*kl"):
        distill.run(tree, redo=["kk"])
    with pytest.raises(distill.UserError, match="needs 'traces'"):
        distill.run(tree, only="kl")
    with pytest.raises(distill.UserError, match="not the folder of a run"):
        distill.open_run("road")
    assert not (tmp_path / "runs").exists()


def test_check_says_what_each_stage_costs_and_what_is_done(finished, tmp_path):
    tree = recipe_tree(finished.recipe.models["base"].source)
    plan = distill.check(tree, {"stages.kl.steps": 14}, runs=finished.folder.parent)
    assert [(stage.name, stage.kind, stage.action) for stage in plan.stages] == [
        ("traces", "generate", "skip"),
        ("kl", "train", "grow"),
    ]
    assert plan.seconds == plan.stages[1].seconds > 0
    assert plan.stages[1].memory > 0
    assert plan.problems == []
    loaded = distill.load_recipe(tree)
    assert distill.check(loaded, runs=tmp_path).stages[0].action == "run"
    assert distill.load_recipe("quickstart").name == "quickstart"
    assert distill.load_recipe(loaded, ["stages.kl.lr=0.5"]).stages["kl"].lr == 0.5
    assert loaded.stages["kl"].lr == 1e-3


# Torch's own types are left out: to read them takes a minute.
MYPY = """[mypy]
strict = True
follow_imports = silent
ignore_missing_imports = True
disallow_subclassing_any = False
disable_error_code = no-any-unimported
[mypy-torch.*,pydantic.*,numpy.*,rich.*,jinja2.*]
follow_imports = skip
"""
USER_SCRIPT = """
import distill
from torch.utils.data import DataLoader

result: distill.RunResult = distill.run("quickstart", {"stages.kl.lr": 1e-4}, only="kl")
loss: float = result.metrics["kl"][-1]["loss"]
names: list[str] = [row["name"] for row in result.report["stages"]]
traces: distill.TraceDataset = distill.load_traces(result.traces["clean"])
row: distill.Trace = traces[0]
part: distill.TraceDataset = traces[:10]
length: int = row["completion_ids"].shape[0]
loader = DataLoader(traces, batch_size=4, collate_fn=traces.collate)
plan: distill.Plan = distill.check({"name": "x"})
seconds: float = plan.seconds
recipe: distill.Recipe = distill.load_recipe("quickstart")
"""


def test_a_users_script_is_type_checked(tmp_path):
    def errors(text: str) -> str:
        (tmp_path / "script.py").write_text(text)
        (tmp_path / "mypy.ini").write_text(MYPY)
        command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), str(tmp_path / "script.py")]
        env = {**os.environ, "MYPYPATH": str(Path(distill.__file__).parents[1])}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env).stdout

    said = errors(USER_SCRIPT)
    assert "Success" in said, said
    said = errors(USER_SCRIPT + 'wrong: int = traces[0]["completion"]\ndistill.run("quickstart", onyl="kl")\n')
    assert 'expression has type "str"' in said
    assert 'Unexpected keyword argument "onyl"' in said


def test_importing_it_loads_nothing_heavy():
    code = "import sys, distill; print(sorted({'torch', 'numpy', 'pydantic', 'yaml', 'pyarrow'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    code = "import distill.run.pipeline, distill; print(callable(distill.run), 'torch' in __import__('sys').modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "True False"
    assert set(distill._HOMES) <= set(dir(distill))
    assert all(getattr(distill, name) is not None for name in distill._HOMES)
