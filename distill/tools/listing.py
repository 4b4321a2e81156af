"""What a recipe can name, for `distill ls`: read from the code itself, never from a second list."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

from distill import plug
from distill.records import UserError

HOMES = {
    "losses": ("distill.training.loss.sparse", "distill.training.loss.cross_tokenizer.losses"),
    "objectives": ("distill.training.rl.objectives",),
    "rewards": ("distill.tasks.rewards",),
    "filters": ("distill.traces.filters",),
    "tasks": ("distill.tasks",),
    "engines": ("distill.engines.factories",),
}
RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def of(what: str) -> Iterator[tuple[str, str]]:
    """(name, one line) of everything of a sort. Raises UserError for an unknown sort."""
    if what in HOMES:
        found = [item for home in HOMES[what] for item in plug.names(home).items()]
        for name, function in sorted(found):
            yield name, f"{_options(function)}{_first_line(function)}"
    elif what == "stages":
        from distill.recipe import KINDS

        for name, model in KINDS.items():
            yield name, _first_line(model)
    elif what == "templates":
        from distill.tasks.templates import TEMPLATES

        for name, template in TEMPLATES.items():
            yield name, template.system or template.plain
    elif what == "recipes":
        for path in recipe_files():
            yield path.stem, _comment(path)
    else:
        sorts = [*HOMES, "stages", "templates", "recipes"]
        raise UserError(f"nothing is called {what!r}.{plug.nearest(what, sorts)}")


def recipe_files() -> list[Path]:
    """The recipes of this project, and those in the working directory's recipes/ folder."""
    here = Path("recipes").resolve()
    folders = [RECIPES] if here == RECIPES else [RECIPES, here]
    return sorted(path for folder in folders for path in folder.glob("*.yaml"))


def recipe_file(name: str) -> Path:
    files = {path.stem: path for path in recipe_files()}
    if name not in files:
        raise UserError(f"there is no recipe {name!r}.{plug.nearest(name, files)}")
    return files[name]


def _first_line(thing: object) -> str:
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def _options(function: object) -> str:
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    names = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return f"({', '.join(names)})  " if names else ""


def _comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""
