"""Isolation levels of untrusted programs, and the choice of the strongest that this machine has.

Level 1: the user's command, which starts a Python elsewhere (`docker run --rm -i --network none python:3.12-slim
python`); its isolation is up to the command. Level 2, bubblewrap: no network, a read-only file system with the system's and
the interpreter's files only, a private and bounded /tmp, own process, ipc, host name and network namespaces,
a new session, killed with its parent. Level 3: only resource limits, a minimal environment and refused
system calls; must be enabled by `unsafe: true`. Levels 2 and 3 give each program a user id of its own if
this process is root.

Level 3 does not prevent a program from reading world-readable files (such as a benchmark's answers) or filling the disk
within the time limit. If this process is not root, the program can also read, change and delete the user's
files, and inspect the user's processes.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distill.errors import MachineError, UserError
from distill.tasks.sandbox import syscalls

Level = Literal[1, 2, 3]

CHILD = Path(__file__).with_name("child.py").read_text(encoding="utf-8")
SCRATCH_BYTES = 64 * 2**20
FIRST_UID = 2**30
"""First user id for programs: larger than the ids of real users, and no file belongs to it."""

INSTALL = (
    "Install bubblewrap (`apt-get install bubblewrap`, `dnf install bubblewrap`), set `sandbox_command` to a command "
    "that starts a Python in a container, or set `unsafe: true` to run generated code with resource limits only"
)
_FLAGS = ("-s", "-S", "-B", "-X", "utf8", "-c", CHILD)
_SYSTEM_DIRS = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_counter = itertools.count()


@dataclass(frozen=True)
class Isolation:
    """A level and the command that starts the child process. own_uid: each program runs under a user id of its own."""

    level: Level
    argv: tuple[str, ...]
    own_uid: bool
    summary: str

    @contextlib.contextmanager
    def command(self) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
        """The command that starts the child, and the file descriptors that it inherits; valid within the context."""
        calls = syscalls.allowed(namespaces=True) if self.level == 2 else b""
        if not calls:
            yield self.argv, ()
            return
        file = os.memfd_create("seccomp")
        try:
            os.pwrite(file, calls, 0)
            yield (self.argv[0], "--seccomp", str(file), *self.argv[1:]), (file,)
        finally:
            os.close(file)

    def new_uid(self) -> int:
        """Return a user id that no other program has at this time; 0 = keep the current user."""
        if not self.own_uid:
            return 0
        return FIRST_UID + os.getpid() % 2**22 * 64 + next(_counter) % 64


def choose(unsafe: bool = False, command: str | None = None) -> Isolation:
    """Return the strongest isolation available; level 3 only if `unsafe`. Raises UserError, naming what is missing."""
    if command is not None:
        return by_command(command)
    try:
        return bubblewrap()
    except UnavailableError as error:
        if unsafe:
            return limits_only()
        raise MachineError(f"generated code is not run without a sandbox: {error}. {INSTALL}.") from None


def describe(unsafe: bool = False, command: str | None = None) -> str:
    """Describe the level that would be used, for reports; never raises."""
    try:
        isolation = choose(unsafe, command)
    except UserError as error:
        return f"none: {error}"
    return f"level {isolation.level}: {isolation.summary}"


class UnavailableError(Exception):
    """A level is not available on this machine; the message says why."""


def by_command(command: str) -> Isolation:
    """Level 1. The command's last word is a Python (3.8 or newer) that reads its standard input. Raises UserError."""
    words = shlex.split(command)
    if not words or shutil.which(words[0]) is None:
        raise MachineError(f"sandbox_command: {command!r}: there is no such program.")
    return Isolation(1, (*words, "-B", "-c", CHILD), False, f"the user's command, {words[0]}")


@functools.cache
def bubblewrap() -> Isolation:
    """Level 2; tested once per process. Raises UnavailableError if bubblewrap is missing or cannot create namespaces."""
    program = shutil.which("bwrap")
    if program is None:
        raise UnavailableError("bubblewrap (bwrap) is not installed")
    version = _output([program, "--version"]).split()[-1]
    root = os.geteuid() == 0
    python = _interpreter(lambda path: True)
    argv = (program, *_bwrap_options(version, root), "--", python, *_FLAGS)
    made = Isolation(2, argv, root, f"bubblewrap {version}")
    with made.command() as (command, files):
        tried = subprocess.run(
            [*command[: command.index("--")], "--", python, "-S", "-c", "print('works')"],
            capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, pass_fds=files, check=False,
        )  # fmt: skip
    if tried.stdout.strip() != "works":
        said = (tried.stderr.strip().splitlines() or [f"exit status {tried.returncode}"])[0]
        raise UnavailableError(
            f"bubblewrap is installed but does not work here ({said}): in a container it needs permission to "
            f"create namespaces"
        )
    return made


@functools.cache
def limits_only() -> Isolation:
    """Level 3. Raises UserError if this is not Linux, where the limits cannot be set."""
    if sys.platform != "linux":
        raise MachineError(
            "generated code runs only on Linux. On this system, set `sandbox_command` to a command that starts a Python in a container."
        )
    own_uid = os.geteuid() == 0 and _may_change_uid()
    python = _interpreter(_open_to_all if own_uid else lambda path: True)
    whose = "as another user" if own_uid else "as this user"
    return Isolation(3, (python, *_FLAGS), own_uid, f"unsafe, resource limits only, {whose}")


def _may_change_uid() -> bool:
    code = f"import os; os.setgroups([]); os.setresuid({FIRST_UID}, {FIRST_UID}, {FIRST_UID})"
    tried = subprocess.run([sys.executable, "-S", "-c", code], stderr=subprocess.DEVNULL, check=False)
    return tried.returncode == 0


def _interpreter(usable: object) -> str:
    """This interpreter outside its virtual environment; the system's interpreter if that one is not `usable`."""
    assert callable(usable)
    own = os.path.realpath(sys.executable)
    if usable(own):
        return own
    return shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin") or own


def _open_to_all(path: str) -> bool:
    return all(folder.stat().st_mode & 0o001 for folder in (Path(path), *Path(path).parents))


def _bwrap_options(version: str, root: bool) -> Iterator[str]:
    yield from (
        "--unshare-ipc",
        "--unshare-pid",
        "--unshare-net",
        "--unshare-uts",
        "--unshare-cgroup-try",
    )
    yield from ("--die-with-parent", "--new-session", "--hostname", "sandbox")
    if root:
        # The child drops these when it becomes another user; no user namespace is needed.
        yield from ("--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID")
    else:
        yield "--unshare-user"
    yield from ("--ro-bind", "/usr", "/usr")
    for folder in _SYSTEM_DIRS:
        if os.path.islink(folder):
            yield from ("--symlink", os.readlink(folder), folder)
        else:
            yield from ("--ro-bind-try", folder, folder)
    yield from ("--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache")
    yield from ("--ro-bind-try", "/nix/store", "/nix/store")
    base = os.path.realpath(sys.base_prefix)
    if not base.startswith("/usr/") and base != "/usr":
        for parent in [*reversed(Path(base).parents)][1:]:
            yield from (
                "--perms",
                "0755",
                "--dir",
                str(parent),
            )  # without this, another user could not enter the folder
        yield from ("--ro-bind", base, base)
    for folder in sorted(_package_dirs()):
        if os.path.isdir(folder):
            yield from (
                "--tmpfs",
                folder,
                "--remount-ro",
                folder,
            )  # hide installed packages, which may contain a benchmark's answers
    yield from ("--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) >= (0, 8):
        yield from ("--perms", "1777", "--size", str(SCRATCH_BYTES), "--tmpfs", "/tmp")
    else:
        yield from ("--perms", "1777", "--tmpfs", "/tmp")  # limited by the program's own time only
    yield from ("--remount-ro", "/", "--chdir", "/tmp")


def _package_dirs() -> set[str]:
    base = os.path.realpath(sys.base_prefix)
    where = sysconfig.get_paths(vars={"base": base, "platbase": base, "installed_base": base})
    short = ".".join(platform.python_version_tuple()[:2])
    local = {f"/usr/local/lib/python{short}/dist-packages", "/usr/lib/python3/dist-packages"}
    return {where["purelib"], where["platlib"], *local}


def _output(argv: list[str]) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=False).stdout or "?"
