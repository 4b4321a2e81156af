"""The verb `distill ls`: names that a recipe can use and their options, read from the code."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from distill import files, plug
from distill.records import UserError

HOMES = {
    "losses": ("distill.training.loss.sparse", "distill.training.loss.cross_tokenizer.losses"),
    "objectives": ("distill.training.rl.policy_objectives",),
    "weights": ("distill.token_weights",),
    "rewards": ("distill.tasks.rewards",),
    "filters": ("distill.traces.filters",),
    "tasks": ("distill.tasks",),
    "engines": ("distill.engines.factories",),
}
SORTS = (*HOMES, "stages", "templates", "answers", "layouts", "recipes")
RECIPES = files.SHIPPED / "recipes"
ROLES = {
    "identity": "changes the result: a finished stage refuses another value (--redo runs the stage again)",
    "growth": "a larger value adds only the difference to a finished stage",
    "execution": "does not change the result: may be changed at any time",
}
"""What a change of a field means for a finished stage, by the field's role."""


@dataclass(frozen=True, slots=True)
class Option:
    """A field of a stage or an option of a plug. default: as text, or "required". role: a key of ROLES."""

    name: str
    type: str
    default: str
    role: str
    meaning: str


def of(sort: str) -> Iterator[tuple[str, str]]:
    """Yield (name, one line of description) of everything of a sort. Raises UserError for an unknown sort."""
    if sort in HOMES:
        for name, function in sorted(_plugs(sort).items()):
            yield name, f"{_option_names(function)}{_first_line(function)}"
    elif sort == "stages":
        from distill.recipe import KINDS

        for name, model in KINDS.items():
            yield name, _first_line(model)
    elif sort == "templates":
        from distill.tasks.templates import TEMPLATES

        for name, template in TEMPLATES.items():
            yield name, template.system or template.plain
    elif sort == "answers":
        from distill.tasks.templates import ANSWERS

        for name, (_, meaning) in ANSWERS.items():
            yield name, meaning
    elif sort == "layouts":
        from distill.conversations import LAYOUTS

        yield from LAYOUTS.items()
    elif sort == "recipes":
        for path in recipe_files():
            yield path.stem, _comment(path)
    else:
        raise UserError(f"there is no list of {sort!r}.{plug.nearest(sort, SORTS)}")


def options(sort: str, name: str) -> tuple[str, list[Option]]:
    """Return (description, fields or options) of one name; for a template or a recipe (text, []).

    Raises UserError for an unknown sort or name.
    """
    if sort == "stages":
        from distill.recipe import kind_class

        model = kind_class(name)
        return inspect.getdoc(model) or "", list(fields(model))
    if sort in HOMES:
        found = _plugs(sort)
        function = found[name] if name in found else plug.find(name, HOMES[sort][0], sort)
        return inspect.getdoc(function) or "", list(_parameters(function))
    if sort == "answers":
        from distill.tasks.templates import ANSWERS

        if name not in ANSWERS:
            raise UserError(f"there is no answer {name!r}.{plug.nearest(name, ANSWERS)}")
        return ANSWERS[name][1], []
    if sort == "layouts":
        from distill.conversations import LAYOUTS

        if name not in LAYOUTS:
            raise UserError(f"there is no layout {name!r}.{plug.nearest(name, LAYOUTS)}")
        return LAYOUTS[name], []
    if sort == "recipes":
        return recipe_file(name).read_text(encoding="utf-8"), []
    if sort == "templates":
        from distill.tasks import templates

        template = templates.find(name)
        return "\n".join(f"{key}: {getattr(template, key)}" for key in ("system", "plain", "prefill")), []
    raise UserError(f"there is no list of {sort!r}.{plug.nearest(sort, SORTS)}")


def recipe_files() -> list[Path]:
    """The recipes that come with distill, and those in the working directory's recipes/ folder."""
    here = Path("recipes").resolve()
    folders = [RECIPES] if here == RECIPES else [RECIPES, here]
    return sorted(path for folder in folders for path in folder.glob("*.yaml"))


def recipe_file(name: str) -> Path:
    """Return the file of the recipe `name`. Raises UserError with the nearest name if there is none."""
    found = {path.stem: path for path in recipe_files()}
    if name not in found:
        raise UserError(f"there is no recipe {name!r}.{plug.nearest(name, found)}")
    return found[name]


def _plugs(sort: str) -> dict[str, plug.Function]:
    return {name: function for home in HOMES[sort] for name, function in plug.names(home).items()}


def fields(model: type[BaseModel], prefix: str = "", within: str = "identity") -> Iterator[Option]:
    """Yield the fields of a stage kind; the fields of a section follow it with dotted names.

    within: the role of the section; what is in one that may change may change too.
    """
    from distill.recipe.fields import Config, PlugConfig
    from distill.recipe.load import section

    for name, field in model.model_fields.items():
        if name == "kind":
            continue
        role = model.role(name) if issubclass(model, Config) and within == "identity" else within
        yield Option(
            prefix + name, type_text(field.annotation, field.metadata), _default(field), role, field.description or ""
        )
        below = section(model, name)
        if below is not None and not issubclass(below, PlugConfig):
            yield from fields(below, f"{prefix}{name}.", role)


def _parameters(function: plug.Function) -> Iterator[Option]:
    hints = typing.get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            required = parameter.default is inspect.Parameter.empty
            default = "required" if required else _value_text(parameter.default)
            yield Option(name, type_text(hints.get(name, Any)), default, "identity", "")


def type_text(annotation: Any, metadata: typing.Iterable[Any] = ()) -> str:
    """A type in words for a recipe's author: `number > 0`, `a | b`, `list of text`, `section`."""
    from distill.recipe.fields import PlugConfig

    limits = "".join(_limit(one) for one in metadata)
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_text(inside[0], [*inside[1:], *metadata])
    if origin is typing.Literal:
        return " | ".join(map(str, inside))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(type_text(one, metadata) for one in inside if one is not type(None)))
    if origin is list or annotation is list:
        return f"list of {type_text(inside[0])}" if inside else "list"
    if origin is tuple:
        return f"list of {len(inside)} {type_text(inside[0])}s"
    if origin is dict:
        return f"mapping of {type_text(inside[0])} to {type_text(inside[1])}"
    if isinstance(annotation, type) and issubclass(annotation, PlugConfig):
        return "fn and options"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    names: dict[Any, str] = {int: "whole number", float: "number", bool: "true | false", str: "text", Any: "any"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation))) + limits


def _limit(one: Any) -> str:
    signs = {annotated_types.Gt: ">", annotated_types.Ge: ">=", annotated_types.Lt: "<", annotated_types.Le: "<="}
    if isinstance(one, FieldInfo):
        return "".join(_limit(each) for each in one.metadata)
    for kind, sign in signs.items():
        if isinstance(one, kind):
            return f" {sign} {getattr(one, kind.__name__.lower()):g}"
    return ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return str(getattr(value, "fn", "as below"))
    return _value_text(value)


def _value_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(list(value) if isinstance(value, tuple) else value)


def _first_line(thing: object) -> str:
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def _option_names(function: plug.Function) -> str:
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return f"({', '.join(names)})  " if names else ""


def _comment(path: Path) -> str:
    """The first comment line of a recipe, apart from the line that names its schema for editors."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [line.lstrip("# ") for line in lines if line.startswith("#") and "yaml-language-server" not in line]
    return found[0] if found else ""
