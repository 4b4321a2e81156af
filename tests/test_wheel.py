"""A built wheel works without the checkout: it contains recipes and data, found from any folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The unpacked wheel, and a working directory elsewhere."""
    folder = tmp_path_factory.mktemp("wheel")
    build = (
        "import sys, hatchling.builders.wheel as wheel\n"
        "print(next(wheel.WheelBuilder(sys.argv[1]).build(directory=sys.argv[2], versions=['standard'])))\n"
    )
    done = subprocess.run([sys.executable, "-c", build, ROOT, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    (folder / "elsewhere").mkdir()
    return folder


def distill(folder, *arguments):
    env = {**os.environ, "PYTHONPATH": str(folder / "site")}
    code = "import sys, distill; assert sys.argv[1] in distill.__file__; from distill.cli import main; sys.argv[1:2] = []; main()"
    command = [sys.executable, "-c", code, str(folder / "site"), *arguments]
    return subprocess.run(command, cwd=folder / "elsewhere", env=env, capture_output=True, text=True)


def test_recipes_are_listed_copied_and_checked(installed):
    listed = distill(installed, "ls", "recipes")
    assert listed.returncode == 0, listed.stderr
    assert {line.split()[0] for line in listed.stdout.splitlines()} == {
        p.stem for p in (ROOT / "recipes").glob("*.yaml")
    }
    made = distill(installed, "init", "mine")
    assert made.returncode == 0, made.stderr
    checked = distill(installed, "check", "mine.yaml")
    assert checked.returncode == 0, checked.stderr
    assert "cold_start" in checked.stdout


def test_a_shipped_recipe_runs_by_its_name_with_its_data(installed):
    done = distill(installed, "run", "quickstart", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "total" in done.stdout


def test_templates_of_pages_are_in_it(installed):
    names = {str(path.relative_to(installed / "site")) for path in (installed / "site").rglob("*.jinja")}
    assert names == {str(path.relative_to(ROOT)) for path in (ROOT / "distill").rglob("*.jinja")}
