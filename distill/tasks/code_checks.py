"""Run tests that are written as code, such as HumanEval's `check(candidate)`, in a trusted process (`judge.worker`).

`candidate` is a proxy: each call is sent by value to the program in its sandbox, and the reply is a value of built-in
types or an exception. The program sees only arguments, never expected results. Helpers that the prompt defines are the
prompt's version here; only the function itself is the program's.
"""

from __future__ import annotations

import builtins
import random
from typing import Any

from distill.tasks.sandbox import FaultError, Isolation, Limits, RaisedError, SandboxError, Session


class _StopError(BaseException):
    """Ends a check whose candidate has stopped. A BaseException, so that a test's `except Exception` cannot catch it."""


class Candidate:
    """Calls the program's function. `fault`: why it can no longer be called (may be empty); None while it can."""

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
    """The built-in exception of the error's name, if a message is enough to construct it; else the error itself."""
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
    """Why a program fails a check; None if it passes. Raises SandboxError if the sandbox failed."""
    random.seed(0)  # some checks use random inputs
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
    """Answer a worker's request `[program, prompt, check, entry_point, isolation, limits]`.

    Returns why the program fails, None if it passes, or a list of one text if the sandbox failed.
    """
    program, prompt, check, entry_point, isolation, limits = request
    isolation["argv"] = tuple(isolation["argv"])
    try:
        return failure(program, prompt, check, entry_point, Isolation(**isolation), Limits(**limits))
    except SandboxError as error:
        return [str(error)]
