"""Relative paths of a recipe: its own folder first, then the working directory."""

from __future__ import annotations

import pytest
import yaml

from distill import recipe
from distill.recipe.paths import from_working_directory

TREE = {
    "name": "r",
    "models": {"base": "weights", "named": {"source": "owner/name", "config": "sizes.json"}},
    "tasks": {"q": {"fn": "jsonl", "path": "q.jsonl", "template": "boxed"}},
    "stages": {
        "traces": {"kind": "generate", "model": "base", "task": "q", "problems": 2},
        "few": {"kind": "filter", "data": "traces", "keep": [{"fn": "uncontaminated", "against": "sub/held.jsonl"}]},
        "sft": {
            "kind": "train",
            "model": "base",
            "data": {"traces": 0.5, "./more.jsonl": 0.5},
            "loss": "cross_entropy",
        },
    },
}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A working directory, and beside it the recipe's folder with every file that it names, and one called like a stage."""
    home, here = tmp_path / "project", tmp_path / "here"
    (home / "sub").mkdir(parents=True)
    here.mkdir()
    for name in ("weights", "traces"):
        (home / name).mkdir()
    for name in ("sizes.json", "q.jsonl", "sub/held.jsonl", "more.jsonl"):
        (home / name).write_text("{}")
    monkeypatch.chdir(here)
    return home, here


def test_paths_in_the_recipe_s_folder_are_rewritten_and_names_stay(folders):
    home, _ = folders
    moved = from_working_directory(TREE, home)
    assert moved["models"] == {
        "base": "../project/weights",
        "named": {"source": "owner/name", "config": "../project/sizes.json"},
    }
    assert moved["tasks"]["q"] == {"fn": "jsonl", "path": "../project/q.jsonl", "template": "boxed"}
    assert moved["stages"]["traces"] == TREE["stages"]["traces"]
    assert (
        moved["stages"]["few"]["data"] == "traces"
    )  # a folder of this name is beside the recipe, but it is a stage's name
    assert moved["stages"]["few"]["keep"][0]["against"] == "../project/sub/held.jsonl"
    assert moved["stages"]["sft"]["data"] == {"traces": 0.5, "../project/more.jsonl": 0.5}


def test_the_recipe_s_folder_comes_before_the_working_directory(folders):
    home, here = folders
    (here / "q.jsonl").write_text("{}")
    assert from_working_directory(TREE, home)["tasks"]["q"]["path"] == "../project/q.jsonl"
    (home / "q.jsonl").unlink()
    assert from_working_directory(TREE, home)["tasks"]["q"]["path"] == "q.jsonl"


def test_nothing_changes_in_the_recipe_s_own_folder(folders, monkeypatch):
    home, _ = folders
    monkeypatch.chdir(home)
    assert from_working_directory(TREE, home) == TREE


def test_overrides_are_paths_of_the_working_directory(folders):
    home, here = folders
    (home / "r.yaml").write_text(
        yaml.safe_dump({**TREE, "stages": {"traces": {**TREE["stages"]["traces"], "sampling": {}}}})
    )
    (here / "q.jsonl").write_text("{}")
    loaded = recipe.load(home / "r.yaml", ["tasks.q.path=q.jsonl"])
    assert loaded.tasks["q"].options["path"] == "q.jsonl"
    assert loaded.models["base"].source == "../project/weights"


def test_a_text_that_no_file_can_be_called_stays(folders):
    home, _ = folders
    for text in ("", ".", "a\nb", "x" * 5000, "a\0b", "hub://x", "Reason step by step."):
        tree = {"tasks": {"q": {"fn": "jsonl", "path": text}}}
        assert from_working_directory(tree, home) == tree
