"""Verbs that start a recipe: what it can name, its schema, one to copy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from distill.cli.apps import app
from distill.errors import UserError


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
