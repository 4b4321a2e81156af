"""Every verb of the command line in a process of its own, with nothing imported but what it imports itself.

The process starts once, imports the command line alone (which imports nothing heavy), and is forked for each command.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from project import REFERENCE, SUMS, Project

FORKS = """
import json, os, sys
import distill.cli
assert not {"torch", "transformers", "huggingface_hub", "datasets", "pyarrow"} & sys.modules.keys()
for line in sys.stdin:
    name, arguments = json.loads(line)
    if not os.fork():
        with open(f"{name}.out", "w") as out, open(f"{name}.err", "w") as err:
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = ["distill", *arguments]
        status = 0
        try:
            distill.cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            import traceback
            traceback.print_exc()
            status = 70
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Project:
    """A finished run: traces, and a model that learned from them."""
    engine = {"engine": REFERENCE, "sampling": {"max_tokens": 4}}
    tree = {
        "name": "tried", "models": {"base": str(tiny_dir)}, "tasks": {"sums": SUMS},
        "stages": {
            "traces": {"kind": "generate", "model": "base", "task": "sums", "problems": 2, "top_logprobs": 4, **engine},
            "kl": {"kind": "train", "model": "base", "data": "traces", "steps": 1, "dtype": "float32", "keep_truncated": True},
        },
    }  # fmt: skip
    made = Project(tmp_path_factory.mktemp("verbs"), tree)
    done = made.run("--no-trials")
    assert done.returncode == 0, done.stderr + done.stdout
    return made


def verbs() -> list[list[str]]:
    """Every verb of the command line, and of its groups."""
    from typer.main import get_command

    from distill.cli import app

    found = []
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        below = getattr(command, "commands", None)
        found += [[name, one] for one in below] if below else [[name]]
    return found


def forked(folder: Path, commands: list[list[str]], **env: str) -> list[tuple[int, str, str]]:
    """(exit status, stdout, stderr) of each command."""
    lines = "".join(json.dumps([f"c{n}", command]) + "\n" for n, command in enumerate(commands))
    done = subprocess.run(
        [sys.executable, "-c", FORKS], input=lines, cwd=folder, env={**os.environ, **env},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    statuses = [int(line) for line in done.stdout.split()]
    assert len(statuses) == len(commands)
    return [
        (status, (folder / f"c{n}.out").read_text(), (folder / f"c{n}.err").read_text())
        for n, status in enumerate(statuses)
    ]


def test_every_verb_has_help(tmp_path: Path) -> None:
    commands = [[*verb, "--help"] for verb in verbs()]
    for command, (status, out, err) in zip(commands, forked(tmp_path, commands), strict=True):
        assert status == 0, (command, err)
        assert " ".join(command[:-1]) in out


MAIN_PATHS: dict[str, tuple[list[str], int, str]] = {
    "run": (["run", "tried.yaml"], 0, "report.html"),
    "show": (["show", "runs/tried"], 0, "kl"),
    "ls": (["ls", "losses", "forward_kl"], 0, "default"),
    "schema": (["schema"], 0, "$schema"),
    "init": (["init", "mine"], 0, "mine.yaml written"),
    "push": (["push", "runs/tried/kl", "me/kl"], 3, "cannot be reached (it does not answer)"),
    "traces verify": (["traces", "verify", "runs/tried/traces"], 0, "2"),
    "traces stats": (["traces", "stats", "runs/tried/traces"], 0, "2"),
    "traces merge": (["traces", "merge", "merged", "runs/tried/traces/traces"], 0, "2 traces in merged"),
    "traces export": (
        ["traces", "export", "runs/tried/traces", "text.jsonl", "--style", "text"],
        0,
        "2 traces in text.jsonl",
    ),
    "traces push": (["traces", "push", "runs/tried/traces", "me/t", "--license", "mit"], 3, "cannot be reached"),
}
"""Of each verb a command that goes all its way, its exit status, and what it says."""
ELSEWHERE = {
    "chat": "tests/tools/test_chat.py", "check": "tests/test_cli.py", "doctor": "tests/run/test_trials.py",
    "inspect": "tests/tools/test_inspect.py", "new": "tests/tools/test_new.py", "traces import": "tests/traces/test_exchange.py",
    "watch": "tests/tools/test_watch.py",
}  # fmt: skip
"""Verbs that other tests start as processes; each way takes seconds."""


def test_the_main_path_of_every_verb(project: Project) -> None:
    names = {" ".join(verb) for verb in verbs()}
    assert names - ELSEWHERE.keys() <= MAIN_PATHS.keys(), "a new verb wants its main path here"
    commands = [command for command, _, _ in MAIN_PATHS.values()]
    offline = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_x"}
    for (name, (_, expected, says)), (status, out, err) in zip(
        MAIN_PATHS.items(), forked(project.folder, commands, **offline), strict=True
    ):
        assert status == expected, (name, out[-2000:], err[-2000:])
        assert says in out + err, (name, out, err)
        assert "Traceback" not in err, name
    rows = [json.loads(line) for line in (project.folder / "text.jsonl").read_text().splitlines()]
    assert all(SUMS_SYSTEM in row["prompt"] for row in rows)


SUMS_SYSTEM = "Reply as <think>reasoning</think><answer>result</answer>."
