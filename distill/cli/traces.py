"""Verbs about folders of traces."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distill.cli.apps import traces_app

TracesFolder = Annotated[
    Path, typer.Argument(metavar="TRACES|RUN/STAGE", help="A folder of shards or a selection, or a stage's folder.")
]


@traces_app.command()
def verify(
    folder: Annotated[
        Path,
        typer.Argument(metavar="TRACES|RUN", help="A folder of shards or a selection, a stage's folder, or a run's."),
    ],
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
    from distill.tools.trace_places import place, places
    from distill.traces import verify as verification

    whole = True
    for each in places(folder):
        with progress.working(f"reading every shard of {each}"):
            report = verification.repair(each) if repair else verification.verify(each)
        typer.echo(str(report))
        whole = whole and report.ok
    if not whole:
        raise typer.Exit(1)
    if audit is not None:
        folder = place(folder)
        with progress.working("loading the libraries") as screen:
            from distill.tools.audit import audit as score_again

            certificate = score_again(folder, audit, model=model, engine=engine, screen=screen)
        typer.echo(str(certificate))
        if not certificate.ok:
            raise typer.Exit(1)


@traces_app.command()
def stats(
    folder: TracesFolder,
) -> None:
    """Print counts, lengths and rates of traces."""
    from distill import progress
    from distill.tools.trace_places import place
    from distill.traces.summary import stats as count

    folder = place(folder)

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
    from distill.tools.trace_places import place
    from distill.traces import export

    sources = [place(source) for source in sources]
    with progress.working(f"copying into {out}"):
        count = export.merge(sources, out)
    typer.echo(f"{count} traces in {out}")


@traces_app.command()
def export(
    folder: TracesFolder,
    out: Annotated[Path, typer.Argument(help="NAME.jsonl writes a JSONL file; any other name a `datasets` folder.")],
    style: Annotated[
        str, typer.Option(help="chat (messages), or text (prompt as the model read it, and completion).")
    ] = "chat",
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="The tokenizer of the traces, if text needs it and it is not found."),
    ] = None,
) -> None:
    """Export whole conversations as they were sampled, system message included, for other trainers."""
    from distill import progress
    from distill.tools import export_text
    from distill.tools.trace_places import place

    folder = place(folder)
    with progress.working(f"writing {out}"):
        count = export_text.write(folder, out, style, tokenizer)
    typer.echo(f"{count} traces in {out}")


@traces_app.command()
def push(
    folder: TracesFolder,
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
    from distill.tools.trace_places import place
    from distill.traces import push as pushing

    folder = place(folder)

    if build is not None:
        with progress.working("building the data set"):
            pushing.build(folder, build, name=repo, licence=licence)
        typer.echo(f"built in {build}; its card is {build / pushing.README}")
    else:
        with progress.working("building and uploading the data set"):
            pushed = pushing.push(folder, repo, licence=licence, private=not public)
        typer.echo(pushed)
