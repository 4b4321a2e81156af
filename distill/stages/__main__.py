"""`python -m distill.stages RUN STAGE`: the process of one stage.

Reads RUN/resolved.yaml, runs the stage, writes its stage.json. What libraries print goes to the stage's log.txt;
the terminal belongs to the live line. Exit status: 0 done, 2 a user's error (its text in error.txt), 1 a bug,
130 interrupted.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import resource
import signal
import sys
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

import yaml

from distill import __version__, recipe
from distill.recipe import CompareStage
from distill.records import Cost, UserError
from distill.stages import card, state
from distill.stages.context import Context, Result


def main(run: Path, name: str) -> int:
    _die_with_parent()
    folder = run / name
    folder.mkdir(parents=True, exist_ok=True)
    error_file = folder / "error.txt"
    error_file.unlink(missing_ok=True)
    screen = _redirect_output(folder / "log.txt")
    try:
        _run(run, name, screen)
    except UserError as error:
        error_file.write_text(str(error), encoding="utf-8")
        return 2
    except KeyboardInterrupt:
        return 130
    except BaseException as error:
        traceback.print_exc()
        hint = _memory_hint(error)
        error_file.write_text(f"{type(error).__name__}: {error}{hint}", encoding="utf-8")
        return 1
    return 0


def _run(run: Path, name: str, screen: TextIO) -> None:
    resolved = recipe.validate(
        yaml.safe_load((run / "resolved.yaml").read_text(encoding="utf-8")), "resolved.yaml"
    )
    config = stage_config(resolved, name)
    standing = state.read(run / name)
    assert standing is not None, "the pipeline writes stage.json before it starts a stage"
    context = Context(recipe=resolved, run=run, name=name, screen=screen)
    began = time.monotonic()
    result: Result = _load(standing.kind).run(config, context)
    standing.seconds += time.monotonic() - began
    standing.status = "done"
    standing.fingerprint = result.fingerprint
    standing.cost = asdict(
        replace(result.cost, wall_seconds=standing.seconds, cpu_seconds=_cpu_seconds(standing.cost))
    )
    standing.teacher_cost = asdict(result.teacher_cost)
    standing.metrics = {**result.metrics, "peak_memory": _peak_memory()}
    standing.version = __version__
    state.write(run / name, standing)
    card.write(resolved, run, name)


def _load(kind: str) -> Any:
    """A stage's module, by name: plain attribute access would need every stage's heavy imports at start-up.

    Thousands of modules come with it and stay: no use looking through them for garbage, now or later.
    """
    gc.disable()
    try:
        return importlib.import_module(f"distill.stages.{kind}")
    finally:
        gc.freeze()
        gc.enable()


def stage_config(resolved: recipe.Recipe, name: str) -> recipe.StageConfig:
    """Of a stage, or of one evaluation of a compare stage (`<stage>.<arm>`)."""
    parent, _, arm = name.partition(".")
    config = resolved.stages[parent]
    return config.children()[arm] if arm and isinstance(config, CompareStage) else config


def _cpu_seconds(before: dict[str, Any]) -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    mine = used.ru_utime + used.ru_stime + children.ru_utime + children.ru_stime
    return float(before.get("cpu_seconds", Cost().cpu_seconds)) + mine


def _peak_memory() -> int:
    """Bytes that this process held at most: of the GPU where one was used, else of the machine's memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return int(torch.cuda.max_memory_reserved())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _redirect_output(log: Path) -> TextIO:
    """Send stdout and stderr, of C code too, to the log; returns the terminal (or whatever stdout was)."""
    screen = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace", buffering=1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    return screen


def _die_with_parent() -> None:
    """On Linux: no orphan goes on writing after its `distill run` was killed."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


def _memory_hint(error: BaseException) -> str:
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return (
            "\nOut of memory. Lower micro_tokens or set gradient_checkpointing: true (train), lower engine.batch_size or "
            "engine.memory_gib (generate, eval); then run again, it continues."
        )
    return ""


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
