"""Trials of the machine: disk, memory and time against the plan, and what stages need from the environment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from distill.files import free_space
from distill.machine import Machine
from distill.recipe import OptimStage
from distill.records import UserError
from distill.reports.wording import duration, scaled
from distill.run import advice, nodes
from distill.run.predictions.row import Row
from distill.run.readiness import check_ready
from distill.run.trials.trial import Trial, TrialSetup

GB = 1e9


def resources(setup: TrialSetup, rows: Sequence[Row], machine: Machine) -> Iterator[Trial]:
    """Compare the plan's rows of the due stages with this machine."""
    ahead = _due(setup, rows)
    yield disk(setup, rows)
    too_large, tight = advice.too_large(ahead, machine), advice.memory_lines(ahead, machine)
    most = max((row.amounts["memory"] for row in ahead), default=0.0)
    figure = f"up to {most / GB:.3g} GB at the peak, of {machine.memory / GB:.3g} GB"
    if too_large:
        yield Trial("memory", "machine", "fail", figure, too_large[0])
    else:
        yield Trial("memory", "machine", "warn" if tight else "pass", figure, " ".join(tight).removeprefix("warning: "))
    seconds = sum(row.amounts["seconds"] for row in ahead)
    yield Trial("time", "machine", "pass", f"about {duration(seconds)} on {machine.name}, {machine.cores} cores")
    for node in nodes.nodes(setup.recipe):
        if node.name.partition(".")[0] in setup.due:
            try:
                check_ready(node)
            except UserError as error:
                yield Trial("environment", f"stages.{node.name}", "fail", "something is missing", str(error))


def _due(setup: TrialSetup, rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.name.partition(".")[0] in setup.due]


def disk(setup: TrialSetup, rows: Sequence[Row]) -> Trial:
    """Compare what the due stages will write with the free space of the run's disk. rows: the plan's.

    Traces, models, and of each training stage the checkpoints: as many as it keeps while it runs, one at its end.
    """
    ahead = _due(setup, rows)
    traces = sum(row.amounts["bytes"] for row in ahead)
    models, last, most = 0.0, 0.0, 0.0
    for row in ahead:
        stage = setup.recipe.stages[row.name.partition(".")[0]]
        if stage.writes == "model":
            models += row.memory.weights
        if isinstance(stage, OptimStage):
            shards = stage.parallel.world_size if stage.parallel.strategy == "fsdp2" else 1
            one = (row.memory.masters + row.memory.moments) * shards
            last += min(stage.keep_checkpoints, 1) * one
            most = max(most, max(stage.keep_checkpoints, 1) * one)
    folder = next(one for one in (setup.run, *setup.run.absolute().parents) if Path(one).is_dir())
    free = free_space(folder)
    least = traces + models + last
    parts = f"traces {scaled(traces)}B, models {scaled(models)}B, checkpoints {scaled(last)}B"
    figure = f"{scaled(least)}B will stay ({parts}), up to {scaled(most)}B more on the way; {scaled(free)}B are free"
    if least > free:
        remedy = "Free some space, give another folder with --runs, or keep no checkpoints of finished stages (keep_checkpoints: 0)."
        return Trial("disk", str(folder), "fail", figure, remedy)
    if least + most > free:
        return Trial(
            "disk", str(folder), "warn", figure, "Free some space, or keep fewer checkpoints (keep_checkpoints)."
        )
    return Trial("disk", str(folder), "pass", figure)
