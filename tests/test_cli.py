"""The command line: quick help, one message and exit status 2 for a user's error."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

DISTILL = str(Path(sys.executable).with_name("distill"))


def distill(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([DISTILL, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_help_answers_at_once_and_loads_nothing_heavy():
    def cpu_seconds():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    times = []
    for _ in range(5):  # CPU time, so that other work on the machine does not count
        began = cpu_seconds()
        assert "run" in distill("--help").stdout
        times.append(cpu_seconds() - began)
    assert min(times) < 0.3
    code = "import sys, distill.cli; print({'torch', 'vllm', 'numpy', 'transformers'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


@pytest.mark.parametrize("what", ["losses", "filters", "tasks", "engines", "stages", "templates", "recipes"])
def test_ls_lists_every_sort_with_a_line_each(what):
    done = distill("ls", what)
    assert done.returncode == 0
    lines = done.stdout.strip().splitlines()
    assert lines
    assert all(len(line.split()) >= 2 for line in lines)


def test_errors_are_one_message_and_their_status(tmp_path):
    for arguments, said in [
        (("run", "none.yaml"), "no such file"),
        (("ls", "loses"), "Did you mean 'losses'"),
        (("show", "nothing"), "no such folder"),
        (("init", "x", "--recipe", "quikstart"), "Did you mean 'quickstart'"),
        (("traces", "verify", "nowhere"), "nowhere"),
    ]:
        done = distill(*arguments, cwd=tmp_path)
        assert done.returncode == 2, (arguments, done.stderr)
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def test_init_writes_a_recipe_that_checks(tmp_path):
    assert distill("init", "mine", cwd=tmp_path).returncode == 0
    assert (tmp_path / "mine.yaml").read_text().count("name: mine") == 1
    checked = distill("check", "mine.yaml", cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
    assert distill("init", "mine", cwd=tmp_path).returncode == 2
