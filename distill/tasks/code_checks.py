"""Run tests that are written as code, such as HumanEval's `check(candidate)`, in a trusted process (`worker`).

`candidate` is a proxy: each call is passed by value to the program in its sandbox, and returns values of built-in types or
an exception. So the program sees arguments and never expected results. Helpers that the prompt defines are the prompt's
own here, not the program's; only the tested function is the program's.
"""

from __future__ import annotations

import builtins
import random
from typing import Any

from distill.tasks.sandbox import FaultError, Isolation, Limits, RaisedError, SandboxError, Session

_ENDS_ITERATION = (StopIteration, StopAsyncIteration)


class _StopError(BaseException):
    """Ends a check whose program has ended; not an Exception, so that no test's `except Exception` catches it."""


class Candidate:
    """A proxy that calls the program's function. `fault`: why it can no longer be called (the program's message, may be empty)."""

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
    """Return the built-in exception of that name if a message alone can construct it, else the error itself.

    Those that end an iteration are never built: a `map` or `zip` over the candidate in a check would end early, and pass.
    """
    kind = getattr(builtins, error.name, None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)) or issubclass(kind, _ENDS_ITERATION):
        return error
    try:
        return kind(error.message)
    except TypeError:
        return error


def failure(
    program: str, prompt: str, check: str, entry_point: str, isolation: Isolation, limits: Limits
) -> str | None:
    """Return why a program fails a check; None if it passes. Raises SandboxError if that could not be determined."""
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
    """Answer `[program, prompt, check, entry_point, isolation, limits]` with the reason for failure, None if it passes.

    A list of one text means that the result could not be determined, and why.
    """
    program, prompt, check, entry_point, isolation, limits = request
    isolation["argv"] = tuple(isolation["argv"])
    try:
        return failure(program, prompt, check, entry_point, Isolation(**isolation), Limits(**limits))
    except SandboxError as error:
        return [str(error)]
