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
    out: Annotated[
        Path,
        typer.Argument(
            help="chat, text: NAME.jsonl, or any other name for a `datasets` folder. axolotl, trl: NAME.parquet or NAME.jsonl. distillkit: a folder."
        ),
    ],
    style: Annotated[
        str,
        typer.Option(
            help="Text: chat (messages), text (prompt as the model read it, and completion), trl (TRL's prompt and completion). With the "
            "distributions: distillkit, axolotl."
        ),
    ] = "chat",
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="The tokenizer of the traces, if text needs it and it is not found."),
    ] = None,
) -> None:
    """Export traces for other trainers: conversations as they were sampled, or tokens and distributions."""
    from distill import progress
    from distill.tools import export_text
    from distill.tools.trace_places import place

    folder = place(folder)
    with progress.working(f"writing {out}"):
        count = export_text.write(folder, out, style, tokenizer)
    typer.echo(f"{count} traces in {out}")


@traces_app.command("import")
def import_(
    source: Annotated[
        Path,
        typer.Argument(help="A .parquet or .jsonl file, a folder of .parquet files, or one of Dataset.save_to_disk."),
    ],
    out: Annotated[Path, typer.Argument(help="The folder of traces to write.")],
    style: Annotated[
        str, typer.Option(help="distillkit (compressed or plain top-k) or axolotl (its prepared KD columns).")
    ],
    teacher: Annotated[
        str, typer.Option(metavar="MODEL", help="The model that the distributions are of: a hub id, a folder.")
    ],
    tokenizer: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A model with the teacher's tokenizer. Default: the teacher.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="DistillKit's compression configuration. Default: compression_config.yaml beside the files."),
    ] = None,
    without_tail: Annotated[
        bool, typer.Option("--without-tail", help="Take distributions that were divided by the sum of their entries.")
    ] = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="Keep log-probabilities as float32 instead of steps of 1/32 nat.")
    ] = False,
) -> None:
    """Write another program's data set of distributions as traces, which train stages learn from."""
    from distill import progress

    with progress.working(f"reading {source}") as screen:
        from distill.tools.import_traces import run

        count = run(
            source, out, style, teacher=teacher, tokenizer=tokenizer, config=config,
            without_tail=without_tail, exact=exact, screen=screen,
        )  # fmt: skip
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
