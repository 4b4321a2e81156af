"""Verbs that start a recipe: what it can name, its schema, one to copy."""

from __future__ import annotations

import sys
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
            help="What to list: losses, objectives, weights, rewards, filters, tasks, engines, stages, templates, answers (where a "
            "template's text finds the answer), layouts or recipes."
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
def new(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Name of the new recipe; writes NAME.yaml. Without it: that of the data.", show_default=False
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE|FOLDER|ID", help="Questions or conversations: a file, a folder, or a hub data set."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Hub id, folder, package:NAME, or the address of an endpoint (http...)."),
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Hub id, folder, package:NAME, or pruned[:LAYERS] of the teacher."),
    ] = None,
    learn_from: Annotated[
        str | None,
        typer.Option(metavar="teacher|data", help="Completions to learn from: the teacher's, or those in the data."),
    ] = None,
    questions: Annotated[str | None, typer.Option(metavar="N", help="Number of questions to learn from.")] = None,
    samples: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="The teacher's completions of each question.")
    ] = None,
    max_tokens: Annotated[str | None, typer.Option(metavar="N", help="Longest completion in tokens.")] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[:COUNT]", help="Where it will run, such as h100:1 (see `distill check`); default: here."
        ),
    ] = None,
    judge: Annotated[
        str | None, typer.Option(metavar="math|exact|none", help="How answers are compared; default: by the data.")
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PART=COLUMN",
            help="Name a column: question=..., answer=..., reply=..., system=... May be repeated.",
        ),
    ] = None,
    teacher_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="With an endpoint: the model's name there.")
    ] = None,
    teacher_key: Annotated[
        str | None,
        typer.Option(metavar="$VARIABLE", help="With an endpoint: the environment variable that holds the key."),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Ask nothing: take the default of everything that is not given.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a recipe of that name.")] = False,
) -> None:
    """Make a recipe for your own data and models, in a short dialogue or by flags, and say what it costs.

    For example: distill new mine --data questions.jsonl --teacher Qwen/Qwen2.5-7B-Instruct --student Qwen/Qwen2.5-0.5B-Instruct
    --gpu h100:1
    """
    from distill.tools.new import Given, create

    given = Given(
        name, data, teacher, student, learn_from, gpu, max_tokens, questions, samples, judge, tuple(column or ()), teacher_name, teacher_key, force
    )  # fmt: skip
    try:
        _, ready = create(given, asks=sys.stdin.isatty() and not yes)
    except (KeyboardInterrupt, EOFError, typer.Abort):
        typer.echo("\ninterrupted; nothing was written", err=True)
        raise typer.Exit(130) from None
    if not ready:
        raise typer.Exit(1)


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
