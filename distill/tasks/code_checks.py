"""Runs tests that are written as code, in a trusted process (`worker`): the `check(candidate)` of HumanEval.

`candidate` is a proxy: each call goes, by value, to the program in its sandbox, and what comes back is of built-in
types exactly, or an exception. So the program sees arguments and never what is expected of it. The helpers that a
prompt defines are its own here, not the program's; the name of the function itself means the program's.
"""

from __future__ import annotations

import builtins
import random
from typing import Any

from distill.tasks.sandbox import FaultError, Isolation, Limits, RaisedError, SandboxError, Session


class _StopError(BaseException):
    """Ends a check that has no candidate to ask any more; no test's `except Exception` holds it up."""


class Candidate:
    """Calls the program's function. `fault` is why it cannot be called any more (the program's words, maybe empty)."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.fault: str | None = None

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        if self.fault is not None:
            raise _StopError
        try:
            return self._session.call(*args, **kwargs)
        except FaultError as fault:
            self.fault = str(fault)
            raise _StopError from None
        except RaisedError as error:
            if not self._session.loaded:
                self.fault = str(error)
                raise _StopError from None
            raise _builtin(error) from None


def _builtin(error: RaisedError) -> Exception:
    """The built-in exception of that name where it is one that a message alone makes, else the error itself."""
    kind = getattr(builtins, error.name, None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        return error
    try:
        return kind(error.message)
    except TypeError:
        return error


def failure(
    program: str, prompt: str, check: str, entry_point: str, isolation: Isolation, limits: Limits
) -> str | None:
    """Why a program fails a check; None where it passes. SandboxError where that could not be found out."""
    random.seed(0)  # some checks draw their inputs
    namespace: dict[str, Any] = {"__name__": "check"}
    exec(compile(prompt, "prompt.py", "exec"), namespace)
    exec(compile(check, "check.py", "exec"), namespace)
    with Session(isolation, program, entry_point=entry_point, limits=limits) as session:
        namespace[entry_point] = candidate = Candidate(session)
        try:
            namespace["check"](candidate)
        except SandboxError:
            raise
        except (Exception, _StopError) as error:
            if candidate.fault is None:
                return "wrong result" if isinstance(error, AssertionError) else _text(error)
    return candidate.fault


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def reply(request: list[Any]) -> str | list[str] | None:
    """`[program, prompt, check, entry_point, isolation, limits]` -> why it fails, None where it passes.

    A list of one text: it could not be found out.
    """
    program, prompt, check, entry_point, isolation, limits = request
    isolation["argv"] = tuple(isolation["argv"])
    try:
        return failure(program, prompt, check, entry_point, Isolation(**isolation), Limits(**limits))
    except SandboxError as error:
        return [str(error)]
