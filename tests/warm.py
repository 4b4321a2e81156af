"""The command line without the ten seconds that every process takes to import torch and transformers.

A process that has imported what stages import, and done nothing else, forks itself for every command it is given, and again
for each of the command's stages. So all is as on a real command line but for the imports and the start of Python: each
stage has a process of its own, with its own environment, log and exit status. `project.Project` talks to it.

In: a JSON line a command on stdin (arguments, folder, environment, the files for stdout and stderr). Out: its exit status.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

IMPORTS = (
    "distill.run.stage_process", "distill.run.collect", "distill.stages.eval", "distill.stages.filter",
    "distill.stages.generate", "distill.stages.grpo", "distill.stages.on_policy", "distill.stages.score",
    "distill.stages.train", "distill.engines.transformers", "pandas", "peft", "reasoning_gym", "scipy.stats",
    "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
)  # fmt: skip


class Stage:
    """What the pipeline wants of a Popen of `python -m distill.run.stage_process RUN STAGE`, in a fork."""

    def __init__(self, command: list[str], env: Mapping[str, str]) -> None:
        from distill.run.stage_process import main

        _, _, module, run, *stages = command
        assert module == "distill.run.stage_process"
        self.pid = fork(lambda: main(Path(run), *stages), env)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def fork(work: Callable[[], int], env: Mapping[str, str]) -> int:
    """The id of a process that does the work and exits with what it returns."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.environ.clear()
        os.environ.update(env)
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def command(arguments: list[str], folder: str, out: str, err: str) -> int:
    """One `distill` command in a folder; its exit status."""
    from distill import cli
    from distill.run import pipeline

    os.chdir(folder)
    for descriptor, name in ((0, os.devnull), (1, out), (2, err)):
        os.dup2(os.open(name, os.O_RDWR), descriptor)
    sys.path.insert(0, folder)
    sys.argv = ["distill", *arguments]
    pipeline.subprocess = SimpleNamespace(Popen=Stage)  # type: ignore[assignment]
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def serve() -> None:
    for module in IMPORTS:
        importlib.import_module(module)
    gc.freeze()
    for line in sys.stdin:
        asked = json.loads(line)
        env = asked.pop("env")
        pid = fork(lambda asked=asked: command(**asked), env)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
