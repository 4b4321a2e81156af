"""The sandbox for untrusted programs: `isolation` has its levels, `session` the communication with a program."""

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
