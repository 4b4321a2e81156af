"""Running a recipe: its stages in order, each in a process of its own, and what is collected of them.

The package can be called: `distill.run(recipe)` runs a recipe from Python (see `distill.run.api.run`). Python binds the name
`distill.run` to this package as soon as any module of it is imported, so a function of that name could not stay there.
"""

from __future__ import annotations

import sys
import types
from typing import Any


class _Callable(types.ModuleType):
    """A package that `distill.run(...)` calls."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        from distill.run import api

        return api.run(*args, **options)

    @property
    def __signature__(self) -> Any:
        import inspect

        from distill.run import api

        return inspect.signature(api.run)


sys.modules[__name__].__class__ = _Callable
