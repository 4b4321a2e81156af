"""What `distill check --gpu` prints: memory by parts and time of every stage on named GPUs, and whether it fits."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.table import Table

from distill import progress
from distill.compute import cards
from distill.recipe import Recipe
from distill.reports.wording import duration
from distill.run import fit, plan

COLUMNS = {
    "weights": ("weights",),
    "optimiser": ("masters", "moments"),
    "gradients": ("gradients",),
    "activations": ("activations",),
    "head": ("head",),
    "reference": ("reference",),
    "teachers": ("teachers",),
    "rewards": ("rewards",),
    "engine": ("engine", "logits"),
    "cache": ("cache",),
    "gathered": ("gathered",),
    "other": ("process",),
}
"""The table's columns and the parts of `Memory` that each adds up."""


def print_fit(resolved: Recipe, gpu: str) -> None:
    """Print the memory and time of a recipe on GPUs given as NAME or NAME:COUNT. Raises UserError for an unknown name."""
    found = cards.parse(gpu)
    with progress.working("checking the recipe"):
        plan.check_plugs(resolved)
        verdicts = fit.verdicts(resolved, found)
    several = f"{found.count} x " if found.count > 1 else ""
    typer.echo(
        f"{several}{found.name}: {found.memory_gib:g} GiB, {found.bfloat16:g} TFLOP/s in bfloat16, {found.bandwidth:g} TB/s each, by "
        "the data sheet. GiB on each GPU at the peak:"
    )
    parts = [{name: _sum(each, names) for name, names in COLUMNS.items()} for each in verdicts]
    shown = [name for name in COLUMNS if any(part[name] >= 0.05 for part in parts)]
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "kind"):
        table.add_column(column)
    for column in ("GPUs", *shown, "total", "", "time"):
        table.add_column(column, justify="right")
    for verdict, part in zip(verdicts, parts, strict=True):
        row = verdict.row
        cells = [f"{part[name]:.1f}" if part[name] >= 0.05 else "" for name in shown]
        on_gpu = verdict.need > 0
        used = [str(row.processes) if on_gpu else "", *cells, f"{verdict.need / cards.GIB:.1f}" if on_gpu else ""]
        word = "" if not on_gpu else "fits" if verdict.fits else "does not fit"
        table.add_row(row.name, row.kind, *used, word, duration(row.amounts["seconds"]))
    Console(width=200 if not Console().is_terminal else None).print(table)
    for note in (note for each in verdicts for note in each.row.notes):
        typer.echo(note)
    for line in fit.lines(verdicts):
        typer.echo(line)
    total = sum(each.row.amounts["seconds"] for each in verdicts)
    typer.echo(f"in total about {duration(total)}" + _unused(verdicts, found.count))


def _sum(verdict: fit.Verdict, names: tuple[str, ...]) -> float:
    """GiB of some parts; of the cache, what fits."""
    parts = verdict.row.memory.parts()
    if verdict.row.sequence_cache:
        parts["cache"] = verdict.cache
    return sum(parts[name] for name in names) / cards.GIB


def _unused(verdicts: list[fit.Verdict], count: int) -> str:
    most = max((each.row.processes for each in verdicts), default=1)
    if most >= count:
        return ""
    return f"; the recipe uses {most} of the {count} GPUs (distributed: {{processes: {count}}} trains on all)"
