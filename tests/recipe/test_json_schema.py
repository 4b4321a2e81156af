"""The JSON schema for editors: it matches the code, accepts every shipped recipe, and refuses what the code refuses."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from distill.cli import app
from distill.recipe import json_schema as schema
from distill.tools.listing import RECIPES

VALIDATOR = jsonschema.Draft202012Validator(schema.as_tree())
SHIPPED = sorted(RECIPES.glob("*.yaml"))


def as_an_editor_reads(text):
    """Load YAML as editors do (YAML 1.2), where 1e-4 is a number."""

    def number(value):
        if isinstance(value, dict):
            return {str(key): number(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [number(inner) for inner in value]
        return float(value) if isinstance(value, str) and re.fullmatch(r"\d+(\.\d*)?[eE][-+]?\d+", value) else value

    return number(yaml.safe_load(text))


def test_the_committed_schema_is_the_codes():
    """If this fails after a change of a field, run: distill schema recipes/recipe.schema.json"""
    assert (RECIPES / schema.FILE).read_text(encoding="utf-8") == schema.as_text()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_name_the_schema_and_fit_it(path):
    text = path.read_text(encoding="utf-8")
    assert text.splitlines()[0] == f"# yaml-language-server: $schema={schema.FILE}"
    assert [error.message for error in VALIDATOR.iter_errors(as_an_editor_reads(text))] == []


@pytest.mark.parametrize(
    ("stage", "key", "value"),
    [
        ("kl", "learning_rate", 1e-4),
        ("kl", "lr", "high"),
        ("kl", "kind", "trian"),
        ("traces", "problems", 0),
        ("traces", "sampling", {"max_token": 3}),
        ("teacher", "engine", {"batchsize": 3}),
    ],
)
def test_what_the_code_refuses_it_refuses(stage, key, value):
    tree = as_an_editor_reads((RECIPES / "quickstart.yaml").read_text(encoding="utf-8"))
    assert VALIDATOR.is_valid(tree)
    changed = copy.deepcopy(tree)
    changed["stages"][stage][key] = value
    assert not VALIDATOR.is_valid(changed)


def test_short_forms_and_own_kinds_fit():
    tree = as_an_editor_reads((RECIPES / "quickstart.yaml").read_text(encoding="utf-8"))
    tree["stages"]["traces"]["engine"] = "transformers"
    tree["stages"]["mine"] = {"kind": "mymodule:Mine", "anything": 3}
    assert [error.message for error in VALIDATOR.iter_errors(tree)] == []


def test_the_command_prints_it_and_init_puts_it_beside_the_recipe(tmp_path, monkeypatch):
    assert json.loads(CliRunner().invoke(app, ["schema"]).output) == schema.as_tree()
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["init", "mine"]).exit_code == 0
    first = Path("mine.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert (tmp_path / first.partition("$schema=")[2]).read_text(encoding="utf-8") == schema.as_text()
