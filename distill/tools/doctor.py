"""`distill doctor`: the trials of a recipe, each with its figure and its remedy, for reading or as JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.text import Text

from distill import progress
from distill.printable import printable
from distill.recipe import Recipe
from distill.run import plan, trials
from distill.run.trials import Trial

MARKS = {
    "pass": ("ok", "green"),
    "fail": ("FAILED", "bold red"),
    "warn": ("warning", "yellow"),
    "skip": ("not tried", "dim"),
}
"""How a trial's status is shown, and its style."""


def diagnose(recipe: Recipe, folder: Path, *, as_json: bool = False) -> bool:
    """Make and print all trials of a recipe. Return whether none failed.

    folder: of the run, which need not exist.
    """
    began = time.monotonic()
    found: list[Trial] = []
    with _apart() as (stdout, stderr):
        out = Console(file=stdout, highlight=False, soft_wrap=True)
        screen = progress.Screen(stderr)
        with screen.ticking():
            screen.phase("checking the recipe")
            plan.check_plugs(recipe)
            machine = plan.measured(recipe)
            rows = plan.predict(recipe, machine)
            for trial in trials.all_trials(recipe, folder, tuple(recipe.stages), rows, machine, screen):
                found.append(trial)
                if not as_json:
                    screen.pause()
                    _show(out, trial)
        failed = sum(trial.status == "fail" for trial in found)
        seconds = time.monotonic() - began
        if as_json:
            each = [dataclasses.asdict(trial) for trial in found]
            tree = {"ok": not failed, "seconds": round(seconds, 1), "trials": each}
            out.print(Text(json.dumps(tree, indent=1, ensure_ascii=False)))
        else:
            skipped = sum(trial.status == "skip" for trial in found)
            beside = f", {skipped} not tried" if skipped else ""
            out.print(Text(f"\n{len(found)} trials in {seconds:.0f} s: {failed} failed{beside}", style="bold"))
    return not failed


@contextlib.contextmanager
def _apart() -> Iterator[tuple[TextIO, TextIO]]:
    """Give streams to this process's standard output and error; what libraries write there meanwhile is not shown."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log, contextlib.ExitStack() as stack:
        kept = [os.dup(number) for number in (1, 2)]
        streams = [
            stack.enter_context(os.fdopen(os.dup(one), "w", encoding="utf-8", errors="replace", buffering=1))
            for one in kept
        ]
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number in (1, 2):
            os.dup2(log.fileno(), number)
        try:
            yield streams[0], streams[1]
        finally:
            for number, one in zip((1, 2), kept, strict=True):
                os.dup2(one, number)
                os.close(one)


def _show(out: Console, trial: Trial) -> None:
    mark, style = MARKS[trial.status]
    out.print(
        Text(f"{mark:<10}", style=style) + Text(f"{trial.name}  ", style="bold") + Text(trial.subject, style="dim")
    )
    out.print(Text(f"          {printable(trial.figure)}"))
    if trial.remedy:
        out.print(Text(f"          {printable(trial.remedy)}", style=style))
    for line in trial.shown:
        shown = printable(line).replace("\n", "\n          | ")
        out.print(Text(f"          | {shown}", style="dim"))
