"""Exceptions for what the user can mend, each with its exit status. A module of its own, so that the command line starts without
numpy."""

from __future__ import annotations

import errno
import os
from typing import ClassVar

DEBUG = "DISTILL_DEBUG"
"""Variable of the environment: 1 = show tracebacks (`--debug`)."""


class UserError(Exception):
    """A mistake that the user can correct. The message names the key, file or row, what is wrong, and the fix.

    The command line prints it without a traceback and exits with `exit_status`.
    """

    exit_status: ClassVar[int] = 2

    def within(self, text: str) -> UserError:
        """Return the same kind of error with another text, such as this one behind the key that it is about."""
        return type(self)(text)


class MachineError(UserError):
    """What a recipe needs is missing on this machine or cannot be reached: disk, memory, network, a sandbox, a key, a lock."""

    exit_status: ClassVar[int] = 3


class DataError(UserError):
    """A file is damaged, missing or not what it should be: traces, models, checkpoints, data sets, a run's own records."""

    exit_status: ClassVar[int] = 4


STATUSES = {kind.exit_status: kind for kind in (UserError, MachineError, DataError)}
"""Exit statuses of the command line and of stage processes, and the errors that they stand for; 1 is a bug."""


def debugging() -> bool:
    """Return whether tracebacks are shown."""
    return os.environ.get(DEBUG, "") not in ("", "0")


_HINTS = {
    errno.EACCES: "This user may not use it: change its permissions, or choose another folder.",
    errno.EPERM: "This user may not use it: change its permissions, or choose another folder.",
    errno.EROFS: "Choose a folder on a disk that can be written.",
    errno.ENOTDIR: "A file is in the place of a folder: move it away, or choose another folder.",
    errno.EISDIR: "A folder is in the place of a file: move it away, or choose another name.",
    errno.EEXIST: "Something else is in its place: move it away, or choose another name.",
    errno.ELOOP: "Its links lead in a circle: remove them.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ENOSPC: "Free some disk space and run the same command again to continue.",
    errno.EDQUOT: "Free some of the quota and run the same command again to continue.",
    errno.EIO: "The disk reports a fault; nothing written before it is lost by this command.",
    errno.ENOENT: "It is missing, or was removed meanwhile.",
    errno.EMFILE: "Raise the limit on open files (ulimit -n).",
}
"""What to do about errors of the file system, by their number."""


def in_a_line(error: BaseException) -> str:
    """What an error of a library says, in one line of at most 160 characters; its type if it says nothing."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def of_system(error: BaseException) -> MachineError | None:
    """Return an error of the file system as one line with its path and remedy; None for any other error."""
    if not isinstance(error, OSError) or error.filename is None or error.errno not in _HINTS:
        return None
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
    return MachineError(f"{name}: {error.strerror}. {_HINTS[error.errno]}")
