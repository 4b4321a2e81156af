"""The command line: one function for each verb.

Heavy imports are inside the functions, so that `distill --help` starts at once.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import typer

# isort: off
# The order of these imports is the order of the verbs in `distill --help`.
from distill.cli import runs, recipes, models, traces  # noqa: F401

# isort: on
from distill.cli.apps import app
from distill.errors import DEBUG, UserError, debugging, of_system

__all__ = ["app", "main"]


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


def _refuse_field_options(words: list[str]) -> None:
    """Raise UserError for a recipe's field that is written as an option: `distill run quickstart --lr 1e-4`."""
    command: Any = typer.main.get_command(app)
    verb = command.commands.get(next(iter(words), ""))
    if verb is None or not any(one.name == "overrides" for one in verb.params):
        return
    known = {"--help", *(text for one in verb.params for text in (*one.opts, *one.secondary_opts))}
    for number, word in enumerate(words):
        option, equals, value = word.partition("=")
        if not option.startswith("--") or option in known or len(option) == 2:
            continue
        value = value if equals else next((one for one in words[number + 1 : number + 2] if one[:2] != "--"), "...")
        if places := _fields(words[1:number], option[2:].replace("-", "_")):
            shown = " or ".join(f"{place}={value}" for place in places)
            raise UserError(f"{option}: a recipe's fields are set without dashes, as key=value: {shown}")


def _fields(words: list[str], name: str) -> list[str]:
    """Return the places of a field of the recipe that a command names; of a dotted name itself."""
    from distill import recipe
    from distill.recipe.load import fields_named, find, read_file

    if "." in name:
        return [name]
    if name in recipe.Recipe.model_fields:
        return [name]
    path = next((find(Path(word)) for word in words if not word.startswith("-")), None)
    tree = read_file(path) if path is not None and path.is_file() else None
    return fields_named(name, tree) if isinstance(tree, dict) else []


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
        _refuse_field_options(sys.argv[1:])
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
