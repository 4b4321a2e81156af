"""The process of one stage, or of all evaluations of a comparison:
`python -m distill.run.stage_process RUN STAGE [STAGE ...]`.

The process reads RUN/resolved.yaml, runs the stage and writes its stage.json. Evaluations in one process share an
engine, which loads each model's weights in turn. The first stage that fails ends the process. Output of libraries goes
to the stage's log.txt; the terminal shows the live line. Exit status: 0 done, 2 to 4 a UserError (its text in error.txt),
1 a bug, 130 or 143 interrupted by SIGINT or SIGTERM. Slow imports come after the first line is shown.

Started by torch's launcher (`launch`, or torchrun) it is one process of several. Only the main one shows a live line and
writes the stage's files; the others write log-<rank>.txt and error-<rank>.txt.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import signal
import sys
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill import __version__, interrupt, progress, world
from distill.errors import UserError, of_system
from distill.files import file_hash
from distill.progress import Screen, clock
from distill.run import launch

if TYPE_CHECKING:
    from distill import recipe
    from distill.stages.shared_engine import SharedEngine


def main(run: Path, *names: str) -> int:
    """Run the stages in order; return the exit status."""
    die_with_parent()
    interrupt.receive()
    shown = os.dup(1) if world.is_main() else os.open(os.devnull, os.O_WRONLY)
    terminal = os.fdopen(shown, "w", encoding="utf-8", errors="replace", buffering=1)
    engines: list[SharedEngine] = []
    for name in names:
        (run / name).mkdir(parents=True, exist_ok=True)
        _redirect_output(run / name / launch.log_name(world.rank()))
        file = run / name / progress.FILE if world.is_main() else None
        status = _guarded(run, name, Screen(terminal, label=name, file=file), engines, last=name == names[-1])
        if status:
            return status
    return 0


def _guarded(run: Path, name: str, screen: Screen, engines: list[SharedEngine], *, last: bool) -> int:
    """Run one stage and return its exit status; the reason of a failure is in error.txt.

    engines: empty, or the shared engine of this process.
    """
    error_file = run / name / (launch.error_name(world.rank()) if world.launched() else "error.txt")
    error_file.unlink(missing_ok=True)
    watcher = None
    try:
        with screen.ticking():
            if not engines:
                screen.phase("loading the libraries")
            if world.launched():
                from distill.run.watcher import Watcher

                world.join()
                watcher = Watcher()
            _run(run, name, screen, engines, last)
            if watcher is not None:
                watcher.end()
                if last:
                    world.leave()
    except UserError as error:
        error_file.write_text(str(error), encoding="utf-8")
        return error.exit_status
    except interrupt.Interrupted as stopped:
        if watcher is not None:
            watcher.stop()
        return stopped.status
    except BaseException as error:
        traceback.print_exc()
        if watcher is not None and watcher.lost():
            return launch.PEER_LOST
        if (known := of_system(error)) is not None:
            error_file.write_text(str(known), encoding="utf-8")
            return known.exit_status
        hint = _memory_hint(error)
        error_file.write_text(f"{type(error).__name__}: {error}{hint}", encoding="utf-8")
        return 1
    return 0


def _run(run: Path, name: str, screen: Screen, engines: list[SharedEngine], last: bool) -> None:
    from distill import models, run_folder
    from distill.run import model_card
    from distill.stages import auto_settings
    from distill.stages.context import Context, Result
    from distill.stages.shared_engine import SharedEngine

    resolved = run_folder.recipe(run)
    models.pin_date(run_folder.environment(run)["date"])
    config = stage_config(resolved, name)
    standing = run_folder.read(run / name)
    if standing is None:
        raise UserError(
            f"{run / name}: `distill run` has not begun this stage. Begin it there; its processes join from here."
        )
    if not engines:
        engines.append(SharedEngine())
    (engine,) = engines
    context = Context(recipe=resolved, run=run, name=name, screen=screen, engine=engine)
    began, cpu_before = time.monotonic(), _cpu_seconds()
    standing.began = time.time()
    if world.is_main():
        run_folder.write(run / name, standing)
        config = auto_settings.settle(config, context)
    config = world.broadcast(config)
    result = _load(config)(config, context)
    if not isinstance(result, Result):
        raise UserError(f"stages.{name}: {config.kind} returned {result!r:.80}, not a distill.stages.context.Result.")
    if last:
        engine.close()
    memory = world.gather(_peak_memory())
    cpu_seconds = sum(world.gather(_cpu_seconds() - cpu_before))
    if not world.is_main():
        return
    standing.decided = (run_folder.read(run / name) or standing).decided
    standing.seconds += time.monotonic() - began
    standing.status = "done"
    standing.fingerprint = result.fingerprint
    lines = run / name / run_folder.LOGGED
    standing.logged = file_hash(lines) if lines.is_file() else ""
    standing.cost = asdict(
        replace(
            result.cost,
            wall_seconds=standing.seconds,
            cpu_seconds=standing.cost.get("cpu_seconds", 0.0) + cpu_seconds,
        )
    )
    standing.teacher_cost = asdict(result.teacher_cost)
    standing.metrics = {**result.metrics, "peak_memory": max(memory)}
    if len(memory) > 1:
        standing.metrics |= {"processes": len(memory), "peak_memory_of_processes": memory}
    standing.version = __version__
    run_folder.write(run / name, standing)
    model_card.write(resolved, run, name)
    screen.say(f"  {name} took {clock(time.monotonic() - began)}")


def _load(config: recipe.StageConfig) -> Any:
    """Import the function that runs a stage, and the libraries that it needs.

    Garbage collection is off during the import and ignores these modules afterwards, because they stay until the
    process ends.
    """
    gc.disable()
    try:
        return config.implementation()
    finally:
        gc.freeze()
        gc.enable()


def stage_config(resolved: recipe.Recipe, name: str) -> recipe.StageConfig:
    """The config of a stage, or of one that it expands into (`<stage>.<arm>`)."""
    parent, _, below = name.partition(".")
    config = resolved.stages[parent]
    return config.children()[below] if below else config


def _cpu_seconds() -> float:
    """CPU seconds of this process and its ended children."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime + children.ru_utime + children.ru_stime


def _peak_memory() -> int:
    """Peak memory of this process in bytes: GPU memory if there is a GPU, else main memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return int(torch.cuda.max_memory_reserved())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _redirect_output(log: Path) -> None:
    """Redirect stdout and stderr, including those of C code, to the log."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def die_with_parent() -> None:
    """On Linux: end this process when its `distill run` is killed."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "unable to allocate")
"""How CUDA, torch on a CPU, the system and numpy say it."""


def _memory_hint(error: BaseException) -> str:
    said = str(error).lower()
    if isinstance(error, MemoryError) or any(words in said for words in OUT_OF_MEMORY):
        return (
            "\nOut of memory. Lower micro_tokens or set gradient_checkpointing: true (train), lower engine.batch_size, "
            "engine.kv_cache_gib or engine.memory_share (generate, eval), or set engine.sleep: true (grpo, on_policy); then run "
            "the same command, and the stage resumes."
        )
    return ""


if __name__ == "__main__":
    status = main(Path(sys.argv[1]), *sys.argv[2:])
    if world.launched():
        # Threads of torch's process groups and checkpoints may abort Python's own end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
