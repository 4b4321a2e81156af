"""The command line's apps, to which the other modules of this package add the verbs, and the options that verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
        from distill.cli import versions

        typer.echo("\n".join(versions.lines()))
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_version,
            is_eager=True,
            help="Print the versions of distill, Python and the main packages, and exit.",
        ),
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
