"""How the processes of a stage are started, and which of several failures is the reason."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path

import pytest
import yaml

from distill import recipe
from distill.files import SHIPPED
from distill.recipe import OptimStage
from distill.run import launch
from distill.run.nodes import nodes
from distill.run.pipeline import Runner

RECIPES = sorted((SHIPPED / "recipes").glob("*_qwen.yaml"))


def runner(tree: dict, folder: Path) -> Runner:
    return Runner(recipe.validate(tree), folder / "r.yaml", folder / "run")


def commands(made: Runner) -> dict[str, list[str]]:
    found = nodes(made.recipe)
    return {node.name: made._command([node]) for node in found if isinstance(node.config, OptimStage)}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_for_a_gpu_starts_its_processes(path, tmp_path, capsys):
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    for processes, module in ((1, "distill.run.stage_process"), (8, "distill.run.launch")):
        made = commands(runner({**tree, "distributed": processes}, tmp_path))
        assert made
        for name, command in made.items():
            assert command == [sys.executable, "-m", module, str(tmp_path / "run"), name]
    meeting = {"processes": 8, "nodes": 2, "rendezvous": "node0:29500"}
    capsys.readouterr()
    made = commands(runner({**tree, "distributed": meeting}, tmp_path))
    said = capsys.readouterr().out
    for command in made.values():
        assert f"on each of the other 1 nodes, in the same folder: {shlex.join(command)}" in said
    meeting["launcher"] = "srun --nodes 2 --ntasks 2"
    for name, command in commands(runner({**tree, "distributed": meeting}, tmp_path)).items():
        assert command[:5] == ["srun", "--nodes", "2", "--ntasks", "2"]
        assert command[5:] == launch.command(tmp_path / "run", name)


@pytest.mark.parametrize(
    ("failures", "errors", "status", "rank", "said"),
    [
        ({0: launch.PEER_LOST, 1: -signal.SIGKILL}, {}, 1, 1, "process 1 of 4 was ended by SIGKILL"),
        ({0: launch.PEER_LOST, 2: 2}, {2: "lr: is too high"}, 2, 2, "lr: is too high"),
        ({1: 1, 3: 2}, {1: "RuntimeError: connection closed", 3: "no such file"}, 2, 3, "no such file"),
        ({1: 1, 0: launch.PEER_LOST}, {1: "ValueError: x"}, 1, 1, "ValueError: x"),
        ({3: 9}, {}, 1, 3, "process 3 of 4 ended with status 9"),
    ],
)
def test_the_first_failure_is_the_reason(tmp_path, failures, errors, status, rank, said):
    for number, text in errors.items():
        (tmp_path / launch.error_name(number)).write_text(text)
    assert launch._explain(failures, tmp_path, 4) == status
    assert said in (tmp_path / "error.txt").read_text()
    assert launch.failed_log(tmp_path).name == launch.log_name(rank)


def test_a_failure_on_another_node_is_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "ELSEWHERE", 0.0)
    assert launch._explain({0: launch.PEER_LOST}, tmp_path, 2) == 1
    assert "another node" in (tmp_path / "error.txt").read_text()
    (tmp_path / "error.txt").write_text("process 1 of 2 was ended by SIGKILL")
    assert launch._explain({0: -signal.SIGKILL}, tmp_path, 2) == 1
    assert (tmp_path / "error.txt").read_text() == "process 1 of 2 was ended by SIGKILL"
