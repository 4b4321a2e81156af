"""The command line: one function for each verb.

Heavy imports are inside the functions, so that `distill --help` starts at once.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from distill.errors import DEBUG, UserError, debugging, of_system

app = typer.Typer(
    help="Distil large language models into small ones: generate traces with a teacher's token distributions, train "
    "students on them, compare the results. A recipe (a YAML file) describes all of it; `distill init mine` writes one to "
    "start from.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
traces_app = typer.Typer(
    help="Verify, summarise, merge, export or publish traces.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(traces_app, name="traces")


def _version(requested: bool) -> None:
    if requested:
        from distill import __version__

        typer.echo(f"distill {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere in the command.")
    ] = False,
) -> None:
    """`main` has taken --debug from the command already."""


def _recipes(incomplete: str) -> list[str]:
    """Shell completion of a recipe: YAML files in this folder and the names of `distill ls recipes`."""
    from distill.tools import listing

    found = [str(path) for path in Path.cwd().glob("*.yaml")] + [path.stem for path in listing.recipe_files()]
    return [
        Path(name).name if name.endswith(".yaml") else name for name in found if Path(name).name.startswith(incomplete)
    ]


RecipeFile = Annotated[
    Path,
    typer.Argument(
        help="A YAML file, or a name from `distill ls recipes`.", show_default=False, autocompletion=_recipes
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Recipe fields to set: key=value, such as stages.kl.lr=1e-4.", show_default=False),
]
RunsDir = Annotated[Path, typer.Option("--runs", help="The folder that holds the runs.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would run and its predicted cost; run nothing.")]


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
) -> None:
    from distill import interrupt, recipe
    from distill.recipe.load import find
    from distill.run import nodes, pipeline

    resolved = recipe.load(path, overrides or [])
    wanted = nodes.select(resolved, kinds=kinds, only=only, start=start)
    folder = runs / resolved.name
    known = {name for node in nodes.nodes(resolved) for name in node.stages}
    if unknown := [name for name in redo if name not in known]:
        from distill.plug import nearest

        raise UserError(f"--redo: there is no stage {unknown[0]!r}.{nearest(unknown[0], known)}")
    if dry_run:
        from distill.tools import check_output

        check_output.print_plan(resolved, folder, redo)
        return
    nodes.require_inputs(resolved, folder, wanted)
    runner = pipeline.Runner(resolved, find(path), folder, redo, trials=trials)
    command = shlex.join(["distill", "run", str(path), *(overrides or [])])
    try:
        with interrupt.interruptible():
            runner.do(wanted)
            _write_report(resolved, folder, command)
    except interrupt.Interrupted as stopped:
        where = f" {stopped.kept}" if stopped.kept else ""
        typer.echo(f"\ninterrupted{where}; run the same command again to continue", err=True)
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(stopped.status)  # a normal exit would spend another second on unloading libraries


def _write_report(resolved: Any, folder: Path, command: str) -> None:
    from distill import progress
    from distill.reports import pages
    from distill.run import model_card, nodes
    from distill.run.collect import collect

    with progress.working("writing the report"):
        stages = [node.name for node in nodes.nodes(resolved)]
        report = collect(resolved, folder, stages, command)
        written = pages.write_report(report, folder)
        model_card.write_all(resolved, folder, report)
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
    """Check a recipe and predict its time, memory and disk space, on this machine or on named GPUs."""
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
    check_output.print_plan(resolved, runs / resolved.name, ())


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


@app.command("ls")
def list_things(
    sort: Annotated[
        str,
        typer.Argument(
            help="What to list: losses, objectives, weights, rewards, filters, tasks, engines, stages, templates or recipes."
        ),
    ],
    name: Annotated[str | None, typer.Argument(help="One name from that list: prints its options.")] = None,
) -> None:
    """List the names that a recipe can use, or the options of one.

    For example: `distill ls losses`, `distill ls losses forward_kl`.
    """
    from distill.tools import listing

    if name is None:
        for each, text in listing.of(sort):
            typer.echo(f"{each:<18}  {text}")
        return
    description, options = listing.options(sort, name)
    typer.echo(description)
    if options:
        typer.echo("")
        _print_options(options)


def _print_options(options: list[Any]) -> None:
    from distill.tools.listing import ROLES

    width = max(len(one.name) for one in options) + 2
    for one in options:
        default = one.default if one.default == "required" else f"default {one.default}"
        typer.echo(f"{one.name:<{width}}{one.type}, {default} [{one.role}]")
        if one.meaning:
            typer.echo(f"{'':<{width}}{one.meaning}")
    typer.echo("")
    for role in dict.fromkeys(one.role for one in options):
        typer.echo(f"[{role}] {ROLES[role]}")


@app.command()
def schema(
    out: Annotated[
        Path | None, typer.Argument(help="The file to write. Without it the schema is printed.", show_default=False)
    ] = None,
) -> None:
    """Write the JSON schema of recipes, for editors."""
    from distill.recipe.json_schema import as_text

    if out is None:
        typer.echo(as_text(), nl=False)
    else:
        out.write_text(as_text(), encoding="utf-8")
        typer.echo(
            f"{out} written. To use it in an editor, begin the recipe with: # yaml-language-server: $schema={out}"
        )


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="Name of the new recipe; writes NAME.yaml, and its schema for editors.")],
    recipe: Annotated[
        str, typer.Option("--recipe", help="The recipe to copy: a name from `distill ls recipes`.")
    ] = "quickstart",
) -> None:
    """Copy one of the recipes that come with distill."""
    from distill.tools import listing

    target = Path(name if name.endswith(".yaml") else f"{name}.yaml")
    if target.exists():
        raise UserError(f"{target} exists already; choose another name.")
    text = listing.recipe_file(recipe).read_text(encoding="utf-8")
    lines = [f"name: {target.stem}" if line.startswith("name:") else line for line in text.splitlines()]
    from distill.recipe.json_schema import FILE, as_text

    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    (target.parent / FILE).write_text(as_text(), encoding="utf-8")
    typer.echo(f"{target} written. Try it with: distill check {target}")


@app.command()
def show(
    run: Annotated[Path, typer.Argument(help="A run's folder, or its name under runs/.")],
    html: Annotated[bool, typer.Option("--html", help="Also print the path of the HTML report, and open it.")] = False,
) -> None:
    """Show the stages and results of a run, finished or not."""
    from distill import run_folder
    from distill.reports import pages

    folder = run if run.is_dir() else Path("runs") / run
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


@app.command()
def inspect(
    path: Annotated[
        Path,
        typer.Argument(metavar="TRACES|RUN", help="A folder of traces, a stage's folder, or a run's."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The file to write. Default: inspect.html beside the traces.")
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="Also show this model's probabilities: a folder, a stage of the run, or a hub id.",
        ),
    ] = None,
    sample: Annotated[int, typer.Option(min=1, help="Number of traces on the page, at most.")] = 200,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder with the tokenizer of the traces, if it is not found by itself.")
    ] = None,
) -> None:
    """Write an HTML page of traces with each token's distribution."""
    from distill import progress

    with progress.working("reading the traces") as screen:
        from distill.tools import inspect as inspecting

        target, notes = inspecting.write(path, out, student, sample, tokenizer, screen=screen)
    for note in notes:
        typer.echo(note)
    typer.echo(f"{target}  ({target.stat().st_size / 1e6:.1f} MB)")


@app.command("push")
def push_model(
    model: Annotated[Path, typer.Argument(metavar="MODEL|RUN/STAGE", help="A model's folder, or a stage's.")],
    repo: Annotated[str, typer.Argument(help="The repository on the hub: owner/name.")],
    public: Annotated[bool, typer.Option("--public", help="Make the repository public.")] = False,
) -> None:
    """Publish a model and its card on the hub, by default private."""
    from distill import progress
    from distill.run import model_card

    with progress.working("uploading the model"):
        pushed = model_card.push(model, repo, private=not public)
    typer.echo(pushed)


def _show(report: Any) -> None:
    from distill.reports import terminal

    terminal.show(report)


@traces_app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A folder of shards.")],
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Remove damaged shards, so that running generate again writes what is missing."),
    ] = False,
    audit: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Score N random positions again with the model that wrote them; the result goes into the data card.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="For --audit: the model that wrote the traces. Default: the one that the run's recipe names."
        ),
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="For --audit: the engine. Default: the one that wrote the traces.")
    ] = None,
) -> None:
    """Check that all shards exist and match their checksums. Exit status 1 if they do not."""
    from distill import progress
    from distill.traces import verify as verification

    with progress.working(f"reading every shard of {folder}"):
        report = verification.repair(folder) if repair else verification.verify(folder)
    typer.echo(str(report))
    if not report.ok:
        raise typer.Exit(1)
    if audit is not None:
        with progress.working("loading the libraries") as screen:
            from distill.tools.audit import audit as score_again

            certificate = score_again(folder, audit, model=model, engine=engine, screen=screen)
        typer.echo(str(certificate))
        if not certificate.ok:
            raise typer.Exit(1)


@traces_app.command()
def stats(
    folder: Annotated[Path, typer.Argument(help="A folder of shards, or a selection.")],
) -> None:
    """Print counts, lengths and rates of traces."""
    from distill import progress
    from distill.traces.summary import stats as count

    with progress.working(f"reading {folder}"):
        counted = count(folder)
    typer.echo(str(counted))


@traces_app.command()
def merge(
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    sources: Annotated[list[Path], typer.Argument(help="Folders of traces with the same teacher and settings.")],
) -> None:
    """Copy several folders of traces into one."""
    from distill import progress
    from distill.traces import export

    with progress.working(f"copying into {out}"):
        count = export.merge(sources, out)
    typer.echo(f"{count} traces in {out}")


@traces_app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A folder of shards, or a selection.")],
    out: Annotated[Path, typer.Argument(help="NAME.jsonl writes a JSONL file; any other name a `datasets` folder.")],
    style: Annotated[str, typer.Option(help="chat (messages) or text (prompt and completion).")] = "chat",
) -> None:
    """Export prompts and completions as text, for other trainers."""
    from distill import progress
    from distill.traces import export as exporting

    if style not in ("chat", "text"):
        raise UserError(f"--style: {style!r} is neither chat nor text.")
    write = exporting.export_sft if out.suffix == ".jsonl" else exporting.export_dataset
    with progress.working(f"writing {out}"):
        count = write(folder, out, style)  # type: ignore[arg-type]
    typer.echo(f"{count} traces in {out}")


@traces_app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A folder of shards, or a selection.")],
    repo: Annotated[str, typer.Argument(help="The repository on the hub: owner/name.")],
    licence: Annotated[
        str, typer.Option("--license", help="The licence, by the hub's identifier: apache-2.0, cc-by-4.0, ...")
    ],
    public: Annotated[bool, typer.Option("--public", help="Make the repository public.")] = False,
    build: Annotated[
        Path | None, typer.Option("--folder", help="Write the data set to this folder; upload nothing.")
    ] = None,
) -> None:
    """Publish traces and a data card on the hub, by default private."""
    from distill import progress
    from distill.traces import push as pushing

    if build is not None:
        with progress.working("building the data set"):
            pushing.build(folder, build, name=repo, licence=licence)
        typer.echo(f"built in {build}; its card is {build / pushing.README}")
    else:
        with progress.working("building and uploading the data set"):
            pushed = pushing.push(folder, repo, licence=licence, private=not public)
        typer.echo(pushed)


def _refuse_under_launcher() -> None:
    """Raise UserError in a process of torchrun, on the main one; the others exit a moment later, so that its message is seen."""
    rank = os.environ.get("RANK")
    if rank is None or os.environ.get("WORLD_SIZE") == "1":
        return
    if rank != "0":
        time.sleep(3)
        sys.exit(2)
    raise UserError(
        "RANK is set: start distill once, without torchrun. It starts a stage's processes itself, as many as its `distributed` "
        "says, e.g. stages.NAME.distributed=8."
    )


def main() -> None:
    """Run the `distill` command. Every failure is one message; its traceback is shown with --debug only.

    Exit status: 1 a failed stage, check or bug; 2 a mistake in the recipe or command; 3 something missing on this machine; 4 a
    damaged or unusable file; 130 interrupted.
    """
    if "--debug" in sys.argv[1:]:
        sys.argv[1:] = [word for word in sys.argv[1:] if word != "--debug"]
        os.environ[DEBUG] = "1"
    try:
        _refuse_under_launcher()
        app()
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)
    except Exception as raised:
        error = of_system(raised) or raised
        if debugging():
            traceback.print_exc()
        typer.echo(f"error: {_in_words(error)}", err=True)
        sys.exit(error.exit_status if isinstance(error, UserError) else 1)


def _in_words(error: Exception) -> str:
    if isinstance(error, UserError) or type(error).__name__ == "StageError":
        return str(error)
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:500]}\nThis is a fault of distill; --debug shows where it happened."


if __name__ == "__main__":
    main()
