"""What `distill check` prints: the predicted costs of a recipe, or its first prompts and supervised tokens."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distill import progress, run_folder
from distill.printable import printable
from distill.recipe import Recipe
from distill.records import UserError
from distill.reports.wording import duration, money, scaled
from distill.run import advice, decide, nodes, plan, trials
from distill.run.predictions.row import Row
from distill.run.readiness import check_ready


def print_previews(resolved: Recipe, folder: Path) -> None:
    """Print the first prompts and supervised tokens of a recipe's stages. folder: the run's, which keeps its date."""
    from distill.tools.preview import Preview, previews

    with progress.working("rendering the first examples"):
        plan.check_plugs(resolved)
        found = list(previews(resolved, run_folder.environment(folder).get("date")))
    console = Console(highlight=False, soft_wrap=True)
    for preview in found:
        if not isinstance(preview, Preview):
            console.print(Text(printable(preview), style="dim"))
            continue
        console.print(Text(f"\n{preview.title}", style="bold"))
        for text, supervised in preview.parts:
            marked = printable(text) if console.is_terminal or not supervised else f"⟦{printable(text)}⟧"
            console.print(Text(marked, style="green" if supervised else ""), end="")
        console.print()
        for fact in preview.facts:
            console.print(Text(f"  {fact}", style="dim"))
    console.print(
        Text("\nSupervised or scored tokens are green, or between ⟦ and ⟧ where there is no colour.", style="dim")
    )


def print_plan(resolved: Recipe, folder: Path, redo: tuple[str, ...]) -> bool:
    """Print the predicted costs of a recipe, stage by stage, advice, and what its run would refuse.

    folder: the run's. redo: stages to do again. Return whether the run would begin, on a machine that is large enough.
    """
    with progress.working("checking the recipe"):
        plan.check_plugs(resolved)
        machine = plan.measured(resolved)
        rows = plan.predict(resolved, machine)
    table = Table(box=None, pad_edge=False)
    priced = any(row.amounts["dollars"] for row in rows)
    for column in ("stage", "kind", "", "tokens", "bytes", "FLOPs", "memory", "time", *(["cost"] if priced else [])):
        table.add_column(column, justify="left" if column in ("stage", "kind", "") else "right")
    by_name = {node.name: node for node in nodes.nodes(resolved)}
    total: dict[str, float] = {}
    ahead = []
    for row in rows:
        decision = decide.decide(by_name[row.name], resolved, folder, redo)
        cells = [scaled(row.amounts[key]) if row.amounts[key] else "" for key in ("tokens", "bytes", "flops", "memory")]
        word = {"skip": "done", "run": ""}.get(decision.action, decision.action)
        if decision.action != "skip":
            ahead.append(row)
        paid = [money(row.amounts["dollars"])] if priced else []
        table.add_row(row.name, row.kind, word, *cells, duration(row.amounts["seconds"]), *paid)
        for key, value in row.amounts.items():
            total[key] = max(total.get(key, 0.0), value) if key == "memory" else total.get(key, 0.0) + value
    cells = [scaled(total[key]) for key in ("tokens", "bytes", "flops", "memory")]
    paid = [money(total["dollars"])] if priced else []
    table.add_row("total", "", "", *cells, duration(total["seconds"]), *paid, style="bold")
    Console().print(table)
    for node in by_name.values():
        if decide.decide(node, resolved, folder, redo).action != "skip":
            try:
                check_ready(node)
            except UserError as error:
                typer.echo(f"not ready: {error}")
    for note in (note for row in rows for note in row.notes):
        typer.echo(note)
    for line in advice.machine_lines(rows, machine):
        typer.echo(line)
    for line in advice.memory_lines(ahead, machine):
        typer.echo(line)
    for line in advice.long_lines(resolved, ahead, machine):
        typer.echo(line)
    for line in advice.too_large(ahead, machine):
        typer.echo(f"cannot run on this machine: {line}")
    return _print_trials(resolved, folder, ahead)


def _print_trials(resolved: Recipe, folder: Path, ahead: list[Row]) -> bool:
    """Make the cheap trials of the stages that are due and print what failed. Return whether none but the disk's did."""
    due = dict.fromkeys(row.name.partition(".")[0] for row in ahead)
    with progress.working("trying prompts, tokenizers, judges and rewards"):
        found = list(trials.cheap(resolved, folder, list(due), ahead)) if due else []
    well = True
    for trial in found:
        text = printable(f"{trial.subject}: {trial.name}: {trial.figure}. {trial.remedy}")
        if trial.status == "warn":
            typer.echo(f"warning: {text}")
        elif trial.status == "fail" and trial.name == "disk":
            typer.echo(f"cannot run on this machine: {text}")
        elif trial.status == "fail":
            well = False
            typer.echo(f"would fail: {text}")
    return well
