"""The trial of the sandbox: a hostile program tries to read, write, connect and kill, and must not get out."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from distill.recipe import CompareStage, EvalStage, GenerateStage, GrpoStage
from distill.records import UserError
from distill.run.trials.trial import Trial, TrialSetup
from distill.tasks import sandbox

HOSTILE = """
import os, socket
def probe(secret, folder, port, pid):
    def read():
        with open(secret) as file:
            return bool(file.read())
    def write():
        with open(os.path.join(folder, "escaped"), "w") as file:
            return bool(file.write("out"))
    def connect():
        with socket.create_connection(("127.0.0.1", port), 2):
            return True
    def signal():
        os.kill(pid, 0)
        return True
    done = []
    for name, attempt in (("read", read), ("write", write), ("connect", connect), ("signal", signal)):
        try:
            if attempt():
                done.append(name)
        except BaseException:
            pass
    return done
"""
WORDS = {
    "read": "reads files of this machine",
    "write": "writes files of this machine",
    "connect": "reaches the network",
    "signal": "reaches other processes",
}
ALLOWED = {1: frozenset[str](), 2: frozenset[str](), 3: frozenset({"read"})}
"""What a program can do at each level (`tasks.sandbox.isolation`); level 3 is chosen with `unsafe: true`. Signals at level 3 need
the same user, which a sandbox started by root does not have."""


def sandboxes(setup: TrialSetup) -> Iterator[Trial]:
    """Run a hostile program in every sandbox that the recipe's tasks and rewards use."""
    seen = set()
    for where, unsafe, command in _users(setup):
        if (unsafe, command) not in seen:
            seen.add((unsafe, command))
            yield _probe(where, unsafe, command)


def _users(setup: TrialSetup) -> Iterator[tuple[str, bool, str | None]]:
    """Yield (where, unsafe, sandbox_command) of everything in the recipe that runs programs."""
    for name, config in setup.recipe.tasks.items():
        used = any(name in setup.recipe.stages[stage].reads("task") for stage in setup.due)
        if used and hasattr(setup.task(name), "isolation"):
            yield f"tasks.{name}", bool(config.options.get("unsafe")), config.options.get("sandbox_command")
    for name, stage in setup.stages(GrpoStage, GenerateStage, EvalStage, CompareStage):
        for number, reward in enumerate(getattr(stage, "rewards", ())):
            if reward.fn == "code":
                options = reward.options
                yield (
                    f"stages.{name}.rewards.{number}",
                    bool(options.get("unsafe")),
                    options.get("sandbox_command"),
                )


def _probe(where: str, unsafe: bool, command: str | None) -> Trial:
    what = "sandbox"
    try:
        isolation = sandbox.choose(unsafe, command)
    except UserError as error:
        return Trial(what, where, "fail", "there is none", str(error))
    level = f"level {isolation.level}, {isolation.summary}"
    try:
        done = _escapes(isolation)
    except (sandbox.FaultError, sandbox.RaisedError, sandbox.SandboxError) as error:
        return Trial(
            what, where, "fail", f"{level}: does not run programs ({error})", "Repair it, or use another sandbox."
        )
    allowed = ALLOWED[isolation.level]
    if isolation.level == 3 and not isolation.own_uid:
        allowed = allowed | {"write", "signal"}
    out = [WORDS[name] for name in done]
    if {*done} - allowed:
        remedy = "Programs that a model writes would get out. Use bubblewrap (without sandbox_command), or a container without network."
        return Trial(what, where, "fail", f"{level}: a program {', '.join(out)}", remedy)
    figure = f"{level}: a hostile program {', '.join(out) if out else 'does not get out'}"
    return Trial(what, where, "warn" if out else "pass", figure, "This is what `unsafe: true` allows." if out else "")


def _escapes(isolation: sandbox.Isolation) -> list[str]:
    """Return what a hostile program achieves: some of the keys of WORDS."""
    with (
        tempfile.TemporaryDirectory(prefix="distill-probe-", dir=_outside()) as folder,
        socket.create_server(("127.0.0.1", 0)) as listening,
        _bystander() as pid,
    ):
        os.chmod(folder, 0o777)
        secret = Path(folder, "secret")
        secret.write_text("secret", encoding="utf-8")
        secret.chmod(0o644)
        port = listening.getsockname()[1]
        with sandbox.Session(isolation, HOSTILE, entry_point="probe") as program:
            done = program.call(str(secret), folder, port, pid)
        if not isinstance(done, list):
            raise sandbox.FaultError("bad reply")
        # What it says is not believed where it can be seen.
        seen = {"write"} if Path(folder, "escaped").exists() else set[str]()
        return [name for name in WORDS if name in {*done} | seen]


def _outside() -> str:
    """A folder that is not the sandbox's own /tmp."""
    return "/var/tmp" if os.access("/var/tmp", os.W_OK) else tempfile.gettempdir()


@contextlib.contextmanager
def _bystander() -> Iterator[int]:
    """A process of this user that only waits."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], stdin=subprocess.DEVNULL)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()
