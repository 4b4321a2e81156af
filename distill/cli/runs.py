"""Verbs that run, check and try a recipe, and that show a run."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from distill.cli.apps import DryRun, Overrides, RecipeFile, RunsDir, app
from distill.errors import UserError


@app.command()
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    only: Annotated[str | None, typer.Option(metavar="STAGE", help="Run this stage only.")] = None,
    start: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Run this stage and all that come after it.")
    ] = None,
    redo: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STAGE", help="Run a finished stage again, and all stages that depend on it. May be repeated."
        ),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND",
            help="Run the stages of this kind: train, generate, ... (see `distill ls stages`). May be repeated.",
        ),
    ] = None,
    dry_run: DryRun = False,
    no_trials: Annotated[
        bool,
        typer.Option("--no-trials", help="Do not try prompts, tokenizers, judges and rewards before the first stage."),
    ] = False,
    runs: RunsDir = Path("runs"),
    live: Annotated[
        bool, typer.Option("--live", help="Serve the report as a page on this machine while the run grows.")
    ] = False,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, metavar="PORT", help="Of the page of --live. Default: a free one.")
    ] = None,
) -> None:
    """Run a recipe: skip finished stages, resume interrupted ones."""
    _run(
        recipe,
        overrides,
        runs,
        only=only,
        start=start,
        redo=tuple(redo or ()),
        kinds=tuple(kind or ()),
        dry_run=dry_run,
        trials=not no_trials,
        live=live,
        port=port,
    )


def _run(
    path: Path,
    overrides: list[str] | None,
    runs: Path,
    *,
    only: str | None = None,
    start: str | None = None,
    redo: tuple[str, ...] = (),
    kinds: tuple[str, ...] = (),
    dry_run: bool = False,
    trials: bool = True,
    live: bool = False,
    port: int | None = None,
) -> None:
    from distill import interrupt, recipe
    from distill.recipe.load import find
    from distill.run import api, pipeline

    resolved = recipe.load(path, overrides or [])
    folder = runs / resolved.name
    wanted = api.select(resolved, folder, only=only, start=start, redo=redo, kinds=kinds, ready=not dry_run)
    if dry_run:
        from distill.tools import check_output

        if not check_output.print_plan(resolved, folder, redo):
            raise typer.Exit(1)
        return
    runner = pipeline.Runner(resolved, find(path), folder, redo, trials=trials)
    if live:
        from distill.tools import watch as watching

        typer.echo(f"live: {watching.beside(folder, port or 0)}")
    elif port is not None:
        raise UserError("--port: belongs to --live, which serves a page.")
    try:
        with interrupt.interruptible():
            runner.do(wanted)
            _write_report(resolved, folder, api.command(path, overrides or [], runs))
    except interrupt.Interrupted as stopped:
        where = f" {stopped.kept}" if stopped.kept else ""
        typer.echo(f"\ninterrupted{where}; run the same command again to continue", err=True)
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(stopped.status)  # a normal exit would spend another second on unloading libraries


def _write_report(resolved: Any, folder: Path, command: str) -> None:
    from distill import progress
    from distill.reports import pages
    from distill.run import api

    with progress.working("writing the report"):
        written = api.write_report(resolved, folder, command)
    typer.echo("")
    _show(pages.read_report(folder / "report.json"))
    typer.echo(f"\nreport: {written['report.md']}  {written['report.html']}")


@app.command()
def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    runs: RunsDir = Path("runs"),
    show_text: Annotated[
        bool, typer.Option("--show", help="Show the first prompts and supervised tokens instead of the costs.")
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[:COUNT]",
            help="Predict memory by parts and time on GPUs that are not here, such as h100:8 (h100, h200, b200, a100, a100-40, "
            "l40s, 4090, a10, l4, mi300x, ...), and say what would make a stage fit.",
        ),
    ] = None,
) -> None:
    """Check a recipe and predict its time, memory and disk space, on this machine or on named GPUs.

    Exit status 1 if the run would end in a mistake: too few problems, a prompt longer than the context, a reward that is always the
    same, ...
    """
    from distill import recipe as recipes
    from distill.tools import check_output

    resolved = recipes.load(recipe, overrides or [])
    if gpu is not None:
        from distill.tools import fit_output

        fit_output.print_fit(resolved, gpu)
        return
    if show_text:
        check_output.print_previews(resolved, runs / resolved.name)
        return
    if not check_output.print_plan(resolved, runs / resolved.name, ()):
        raise typer.Exit(1)


@app.command()
def doctor(
    recipe: RecipeFile,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the trials as JSON.")] = False,
    runs: RunsDir = Path("runs"),
) -> None:
    """Try a recipe's parts with small real experiments: what would go wrong in silence. Exit status 1 if a trial fails.

    Prompts and replies as the models read them, the ends of turns, teacher's and student's tokenizers, judges on right and wrong
    answers, rewards, the sandbox against a hostile program, data, disk, memory, and each engine against the trainer.
    """
    from distill import recipe as recipes
    from distill.tools.doctor import diagnose

    resolved = recipes.load(recipe, overrides or [])
    if not diagnose(resolved, runs / resolved.name, as_json=as_json):
        raise typer.Exit(1)


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="A run's folder, or its name under runs/; it may not have begun yet.")],
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, metavar="PORT", help="The page's port. Default: a free one.")
    ] = None,
) -> None:
    """Serve a run's report as a page on this machine while the run grows, until it has ended or Ctrl-C."""
    from distill import run_folder
    from distill.run.live import Looker
    from distill.tools import watch as watching

    folder = run if run.is_dir() or len(run.parts) > 1 else Path("runs") / run
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: not a run's folder, but a file.")
    if run_folder.is_run(folder) and watching.is_ended(folder, Looker(folder).now()):
        typer.echo(f"{folder} has ended; its report: {folder / 'report.html'}")
        return
    listening = watching.listen(port or 0)
    waiting = "" if folder.is_dir() else f" (waiting for {folder} to begin)"
    typer.echo(f"{watching.address(listening)}{waiting}  Ctrl-C ends it; the run goes on.")
    try:
        watching.serve(folder, listening)
    except KeyboardInterrupt:  # the ordinary end of a look
        return
    typer.echo(f"{folder} has ended; its report: {folder / 'report.html'}")


@app.command()
def show(
    run: Annotated[Path, typer.Argument(help="A run's folder, or its name under runs/.")],
    html: Annotated[bool, typer.Option("--html", help="Also print the path of the HTML report, and open it.")] = False,
) -> None:
    """Show the stages and results of a run, finished or not."""
    from distill import run_folder
    from distill.reports import pages

    folder = run if run.is_dir() else Path("runs") / run
    if not folder.exists():
        known = sorted(path.parent.name for path in Path("runs").glob("*/resolved.yaml"))
        there = f" The runs there: {', '.join(known)}." if known else " `distill run RECIPE` makes one."
        raise UserError(f"{run}: no such folder, here or in runs/.{there}")
    if run_folder.is_run(folder):
        from distill.run.collect import collect_run

        _show(collect_run(folder))
    elif (folder / "report.json").is_file():
        _show(pages.read_report(folder / "report.json"))
    else:
        raise UserError(f"{folder} is not the folder of a run: it holds no report.json and no resolved.yaml.")
    if html:
        typer.echo(str((folder / "report.html").resolve()))
        if sys.stdout.isatty() and shutil.which("xdg-open"):
            typer.launch(str(folder / "report.html"))


def _show(report: Any) -> None:
    from distill.reports import terminal

    terminal.show(report)
