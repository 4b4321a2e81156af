"""Verbs about a trained model and what it read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distill.cli.apps import app


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
    licence: Annotated[
        str | None,
        typer.Option(
            "--license",
            metavar="ID",
            help="The licence, by the hub's identifier: apache-2.0, mit, ... Default: the card's.",
        ),
    ] = None,
) -> None:
    """Publish a model and its card on the hub, by default private."""
    from distill import progress
    from distill.run import model_card

    with progress.working("uploading the model"):
        pushed = model_card.push(model, repo, private=not public, licence=licence)
    typer.echo(pushed)


@app.command()
def chat(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model's folder, RUN/STAGE, RUN/MODEL, package://… or a hub id.")
    ],
    ask: Annotated[
        str | None, typer.Option(metavar="QUESTION", help="Ask one question, print the answer and exit.")
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(help='The system message; "" for none. Default: the one that the model was trained under.'),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of sampling; 0 takes the most probable token.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest reply, in tokens.")] = 1024,
) -> None:
    """Talk to a model in the terminal, under the prompt that it was trained on; its reasoning is dimmed.

    Ctrl-C stops a reply, a second one ends; /reset forgets the conversation, /help lists the other commands.
    """
    from distill.tools import chat_terminal

    chat_terminal.run(model, ask=ask, system=system, temperature=temperature, max_tokens=max_tokens)
