"""Plugs: the functions that a recipe names by `fn`, found by name or by `package.module:function`, options checked.

Each sort of plug (loss, objective, reward, filter, task, engine) has a home module, which is its registry: every public
function defined in it or in a submodule can be named. A function's keyword-only parameters are its options, and their
annotations are a strict schema: a typo in a recipe is an error that names the nearest option. There are no decorators
and no base classes.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pydantic

from distill import synonyms
from distill.records import UserError

Function = Callable[..., Any]


def names(home: str) -> dict[str, Function]:
    """The public functions of a home module, by name."""
    module = importlib.import_module(home)
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and not name.startswith("_") and value.__module__.startswith(home)
    }


def find(name: str, home: str, where: str = "") -> Function:
    """Return the function `name` of the home module, or the one at `package.module:function`.

    where: the recipe key for messages. Raises UserError with the nearest name if there is none.
    """
    prefix = f"{where}: " if where else ""
    if ":" in name:
        module_name, _, attribute = name.partition(":")
        try:
            function = getattr(_import_user_module(module_name), attribute)
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            raise UserError(f"{prefix}cannot import {name!r}: {error}. Write it as package.module:function.") from error
        except Exception as error:  # whatever the user's own module does when it is imported
            said = f"{type(error).__name__}: {error}"
            raise UserError(f"{prefix}cannot import {name!r}: its module fails with {said}.") from error
        if not callable(function):
            raise UserError(f"{prefix}{name!r} is not a function.")
        return typing.cast(Function, function)
    known = names(home)
    if name not in known:
        raise UserError(f"{prefix}there is no {name!r} in {home}.{nearest(name, known)}")
    return known[name]


def bind(name: str, options: Mapping[str, Any], home: str, where: str = "") -> Function:
    """Return the function with its options checked and bound: a partial that takes only the positional arguments."""
    function = find(name, home, where)
    return functools.partial(function, **check_options(function, options, where or name))


def all_options(name: str, options: Mapping[str, Any], home: str, where: str = "") -> dict[str, Any]:
    """Return every option of a function: the given value, checked, or else the default."""
    function = find(name, home, where)
    parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    return {**defaults, **check_options(function, options, where or name)}


def option_names(name: str, home: str) -> tuple[str, ...]:
    """Return the names of a function's options."""
    parameters = inspect.signature(find(name, home)).parameters.values()
    return tuple(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)


def check_options(function: Function, options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Validate options against the keyword-only parameters; return them converted to their annotated types."""
    parameters = {
        key: parameter
        for key, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    hints = typing.get_type_hints(function, include_extras=True)
    schema: Any = pydantic.create_model(  # type: ignore[call-overload]
        "Options",
        __config__=pydantic.ConfigDict(extra="forbid", strict=False, arbitrary_types_allowed=True, allow_inf_nan=False),
        **{
            key: (
                hints.get(key, Any),
                ... if parameter.default is inspect.Parameter.empty else parameter.default,
            )
            for key, parameter in parameters.items()
        },
    )
    try:
        checked = schema(**options)
    except pydantic.ValidationError as error:
        home = sys.modules.get(function.__module__)
        refused = getattr(home, "REFUSED_OPTIONS", {})
        raise UserError(explain(error, where, parameters, refused)) from None
    return {key: getattr(checked, key) for key in options}


def explain(
    error: pydantic.ValidationError,
    where: str,
    known: Iterable[str] = (),
    refused: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """A pydantic error as one message: per mistake a line with the key, what is wrong and the nearest known key.

    refused: keys that are refused for a reason of their own, with that reason (a module's REFUSED_OPTIONS).
    """
    lines = []
    for mistake in error.errors():
        key = ".".join(str(part) for part in mistake["loc"])
        label = f"{where}.{key}" if where and key else where or key
        if mistake["type"] == "extra_forbidden" and mistake["loc"][-1] in refused:
            lines.append(f"{label}: {refused[str(mistake['loc'][-1])]}")
        elif mistake["type"] == "extra_forbidden":
            typed, options = str(mistake["loc"][-1]), set(known)
            lines.append(
                f"{label}: unknown key.{synonyms.answer(typed, options.__contains__) or nearest(typed, options)}"
            )
        elif mistake["type"] == "missing":
            lines.append(f"{label}: is required.")
        else:
            shown = repr(mistake["input"])
            message = mistake["msg"].removeprefix("Value error, ").lower()
            lines.append(f"{label}: {message}, got {shown[:80]}.")
    return "\n".join(lines)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean ...?" with the closest name, or the list of names if none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" There are: {', '.join(known)}." if known else ""


def add_import_folder(folder: Path) -> None:
    """Add a folder (the recipe's) to the places where the user's modules are imported from."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _import_user_module(name: str) -> Any:
    if "" not in sys.path:
        sys.path.insert(0, "")  # the working directory, as `python -m` has it
    return importlib.import_module(name)
