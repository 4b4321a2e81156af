"""Run untrusted programs: `isolation` chooses the sandbox, `session` starts a program and exchanges messages with it."""

from distill.tasks.sandbox.isolation import Isolation, choose, describe
from distill.tasks.sandbox.session import (
    NUM_AT_ONCE,
    Limits,
    RaisedError,
    SandboxError,
    Session,
)
from distill.tasks.sandbox.wire import FaultError

__all__ = [
    "NUM_AT_ONCE",
    "FaultError",
    "Isolation",
    "Limits",
    "RaisedError",
    "SandboxError",
    "Session",
    "choose",
    "describe",
]
