"""Load a Recipe from a YAML file and `key=value` overrides; each mistake is one line with the nearest right name."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic
from pydantic import BaseModel

from distill import synonyms
from distill.files import SHIPPED
from distill.plug import add_import_folder, nearest
from distill.recipe import document
from distill.recipe.fields import ModelConfig, PlugConfig
from distill.recipe.paths import from_working_directory
from distill.recipe.seeds import expand
from distill.recipe.stages import KINDS, kind_class
from distill.recipe.sweep import expand_sweeps
from distill.recipe.training_stages import OptimStage
from distill.recipe.tree import Recipe, check_references
from distill.records import UserError

SHORTHANDS = {"engine": "fn", "loss": "fn", "objective": "fn", "weights": "fn"}
"""Sections that may be written as one word, and the field that this word sets."""
NEEDED = {"stages": "kind", "tasks": "fn"}
"""Parts of a recipe whose entries need a field, without which an override cannot add one."""


def load(path: str | Path, overrides: Mapping[str, Any] | list[str] = ()) -> Recipe:  # type: ignore[assignment]
    """Read a recipe and apply `key=value` overrides (dotted keys, YAML values).

    Relative paths in the file are those of its folder, then of the working directory; those in overrides of the latter.
    Raises UserError with one line for each mistake: the key, what is wrong and the nearest known name.
    """
    path = find(Path(path))
    if not path.is_file():
        close = nearest(path.stem, [*(one.stem for one in shipped()), *(one.name for one in Path().glob("*.yaml"))])
        raise UserError(
            f"recipe {str(path)!r}: no such file.{close if 'Did you mean' in close else ''} `distill ls recipes` lists the recipes that "
            "come with the project."
        )
    tree = read_file(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping with name, models, tasks and stages.")
    tree = from_working_directory(tree, path.resolve().parent)
    add_import_folder(path.resolve().parent)
    recipe = validate(with_overrides(tree, overrides), str(path))
    recipe._folder = path.resolve().parent
    return recipe


def with_overrides(tree: Mapping[str, Any], overrides: Mapping[str, Any] | list[str] | tuple[()]) -> dict[str, Any]:
    """Return a copy of a recipe's tree with the fields of `overrides` set. Raises UserError."""
    changed: dict[str, Any] = copy.deepcopy(dict(tree))
    given = parse_overrides(overrides)
    _refuse_unknown(given, changed)
    for key, value in given.items():
        _set(changed, key, value)
    return changed


def read_file(path: Path) -> Any:
    """Return the value of a YAML file. Raises UserError if it cannot be read, or is no document that a recipe may be."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid YAML: not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return document.read(text, str(path))


def shipped() -> list[Path]:
    """Return the files of the recipes that come with the project, in the order of their names."""
    return sorted((SHIPPED / "recipes").glob("*.yaml"))


def find(path: Path) -> Path:
    """Return a recipe's file: the path, or the shipped recipe of that name."""
    known = SHIPPED / "recipes" / f"{path}.yaml"
    return known if not path.exists() and len(path.parts) == 1 and known.is_file() else path


def validate(tree: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Convert a tree to a Recipe, check its references and expand its seeds. Raises UserError."""
    stages, mistakes = _stages(tree, where)
    try:
        recipe = Recipe.model_validate({**tree, "stages": stages})
    except pydantic.ValidationError as error:
        found = [one for one in error.errors() if not (mistakes and one["loc"] == ("stages",))]
        mistakes = [*(_explain_one(one, tree, where) for one in found), *mistakes]
    if mistakes:
        raise UserError("\n".join(mistakes))
    check_references(recipe, where)
    return expand(expand_sweeps(_with_processes(recipe), where), where)


def _with_processes(recipe: Recipe) -> Recipe:
    """Give the recipe's `distributed` to every stage that trains and has none."""
    if recipe.distributed is None:
        return recipe
    stages = {
        name: stage.model_validate(stage.model_dump() | {"distributed": recipe.distributed})
        if isinstance(stage, OptimStage) and stage.distributed is None
        else stage
        for name, stage in recipe.stages.items()
    }
    return recipe.model_copy(update={"stages": stages})


def _stages(tree: Mapping[str, Any], where: str) -> tuple[Any, list[str]]:
    """Return the stages, each as its kind's class, and the mistakes in the others, a line each."""
    given = tree.get("stages")
    if not isinstance(given, Mapping):
        return given, []
    stages: dict[Any, Any] = {}
    mistakes: list[str] = []
    for name, stage in given.items():
        here = f"{where}: stages.{name}"
        if not isinstance(stage, Mapping):
            stages[name] = stage  # validation of the whole recipe reports this mistake
        elif "kind" not in stage:
            mistakes.append(f"{here}.kind: is required. The kinds are: {', '.join(sorted(KINDS))}.")
        else:
            try:
                stages[name] = kind_class(stage["kind"]).model_validate(stage)
            except UserError as error:
                mistakes.append(f"{here}.kind: {error}")
            except pydantic.ValidationError as error:
                found = [{**one, "loc": ("stages", name, *one["loc"])} for one in error.errors()]
                mistakes += [_explain_one(one, tree, where) for one in found]
    return stages, mistakes


def parse_overrides(overrides: Mapping[str, Any] | list[str] | tuple[()]) -> dict[str, Any]:
    """Values by dotted key, from `key=value` texts whose values are YAML. Raises UserError."""
    if isinstance(overrides, Mapping):
        return dict(overrides)
    parsed = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(f"override {text!r}: write it as key=value, for example stages.kl.lr=1e-4.")
        parsed[key] = document.read(value, f"override {text[:80]!r}")
    return parsed


def _refuse_unknown(given: Mapping[str, Any], tree: Mapping[str, Any]) -> None:
    """Raise UserError for an override of a stage or task that is not there, and for a stage's field without its stage."""
    for key, value in given.items():
        first, *rest = key.split(".")
        if first in NEEDED and len(rest) > 1 and isinstance(tree.get(first), Mapping):
            adds = f"{first}.{rest[0]}" in given or f"{first}.{rest[0]}.{NEEDED[first]}" in given
            if rest[0] not in tree[first] and not adds:
                raise UserError(
                    f"override {key!r}: there is no {first[:-1]} {rest[0]!r} in the recipe.{nearest(rest[0], tree[first])}"
                )
        if first not in Recipe.model_fields and (holders := fields_named(key, tree)):
            shown = value if isinstance(value, str | int | float) else "..."
            places = " or ".join(f"{one}={shown}" for one in holders)
            raise UserError(f"override {key!r}: it is a field of stages: write {places}.")


def fields_named(key: str, tree: Mapping[str, Any]) -> list[str]:
    """Return the places in a recipe's stages that have a field, as overrides name them: `stages.kl.lr`.

    key: the field, such as `lr` or `loss.fn`, or its name in another framework.
    """
    stages = tree.get("stages")
    found = []
    for name, stage in stages.items() if isinstance(stages, Mapping) else ():
        kind = stage.get("kind") if isinstance(stage, Mapping) else None
        known = (one for one in (key, *synonyms.KEYS.get(key, ())) if kind in KINDS and _has(KINDS[kind], one))
        found += [f"stages.{name}.{one}" for one in known]
    return found


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    node: Any = tree
    for depth, key in enumerate(parents):
        if not isinstance(node, dict):
            raise UserError(f"override {dotted!r}: {'.'.join(parents[:depth])} is not a mapping.")
        if node.get(key) is None:
            node[key] = {}
        if key in SHORTHANDS and isinstance(node[key], str):
            node[key] = {SHORTHANDS[key]: node[key]}
        node = node[key]
    if not isinstance(node, dict):
        raise UserError(f"override {dotted!r}: {'.'.join(parents)} is not a mapping.")
    node[last] = value


def _explain_one(mistake: Any, tree: Mapping[str, Any], where: str) -> str:
    """Explain one pydantic error in one line."""
    loc = [str(part) for part in mistake["loc"]]
    key = ".".join(loc)
    if mistake["type"] == "extra_forbidden":
        return f"{where}: {key}: unknown key.{_right_name(tree, loc)}"
    if mistake["type"] == "literal_error" and isinstance(mistake["input"], str):
        known = re.findall(r"'([^']+)'", mistake["ctx"]["expected"])
        return f"{where}: {key}: there is no {loc[-1]} {mistake['input']!r}.{nearest(mistake['input'], known)}"
    if mistake["type"] == "missing":
        return f"{where}: {key}: is required."
    if mistake["type"] == "string_pattern_mismatch":
        place = f"{where}: {'.'.join(loc[:-1]) or 'recipe'}" if loc[-1] == "[key]" else f"{where}: {key}"
        return f"{place}: {mistake['input']!r:.80} is no name. A name begins with a letter; then letters, digits, - and _ may follow."
    if mistake["type"] in ("model_type", "dict_type"):
        return f"{where}: {key}: is a section with keys, not {str(mistake['input'])[:80]!r}."
    if mistake["type"] == "value_error":
        return f"{where}: {key}: {mistake['ctx']['error']}."
    return f"{where}: {key}: {mistake['msg'][0].lower()}{mistake['msg'][1:]}, got {str(mistake['input'])[:80]!r}."


def _right_name(tree: Mapping[str, Any], loc: list[str]) -> str:
    """Return the right name of an unknown key: by the table of synonyms, the nearest name, or all names."""
    model = _model_at(tree, loc[:-1])
    return synonyms.answer(loc[-1], lambda key: _has(model, key)) or nearest(
        loc[-1], model.model_fields if model else ()
    )


def _model_at(tree: Mapping[str, Any], loc: list[str]) -> type[BaseModel] | None:
    """Return the config class at a place in the recipe; None if unknown."""
    if not loc:
        return Recipe
    if loc[0] == "models":
        return ModelConfig
    if loc[0] != "stages" or len(loc) < 2:
        return None
    model: type[BaseModel] | None = kind_class(tree["stages"][loc[1]]["kind"])
    for key in loc[2:]:
        model = section(model, key) if model else None
    return model


def section(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    """Return the class of a field that is a section; None for other fields."""
    field = model.model_fields.get(key)
    options = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
    return next((a for a in options if isinstance(a, type) and issubclass(a, BaseModel)), None)


def _has(model: type[BaseModel] | None, dotted: str) -> bool:
    """Return whether a class has a field; options of a plug are not checked."""
    first, _, rest = dotted.partition(".")
    if model is None or first not in model.model_fields:
        return False
    below = section(model, first)
    return not rest or (below is not None and (issubclass(below, PlugConfig) or _has(below, rest)))
