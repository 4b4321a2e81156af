"""Training checkpoints: written whole or not at all, and enough for a resumed run to equal an uninterrupted one.

A checkpoint is a folder `step-00000050` with `state/` (master weights, moments and every process's random state, in the
format of torch.distributed.checkpoint, so that any number of processes can read it) and `state.json` (format, step, totals
so far, and size and SHA-256 of every file). It is built under a temporary name, synced to disk and renamed. Before it is
read it is compared with its hashes; a damaged one is set aside and the one before it is read.

Every function that writes or reads must be called by all processes; files are written where all see them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter

from distill import world
from distill.errors import DataError, MachineError
from distill.files import file_hash, whole_folder

FORMAT = 2
"""The version of the format, in state.json."""
STATE, FACTS = "state", "state.json"
RANDOM, CARRIED = "random/", "carried/"


@dataclass(slots=True)
class Pending:
    """A checkpoint that is being written. `finish` makes it visible; `ready` says whether that can be done without waiting."""

    final: Path
    building: Path
    facts: dict[str, Any]
    keep: int
    held: contextlib.ExitStack
    written: Future[Any] | None = None

    def ready(self) -> bool:
        return self.written is None or self.written.done()

    def finish(self) -> None:
        """Wait until everything is written, then rename the folder and remove all but the newest `keep` and the best one."""
        with _refusing(self.final), self.held:
            if self.written is not None:
                self.written.result()
            world.wait()
            hashes = world.gather(_hashes(self.building / STATE, world.rank(), world.size()))
            if world.is_main():
                files = {name: each for part in hashes for name, each in part.items()}
                facts = {"format": FORMAT, **self.facts, "files": files}
                (self.building / FACTS).write_text(json.dumps(facts), encoding="utf-8")
        if world.is_main():
            best = (self.facts.get("best") or {}).get("step")
            for old in every(self.final.parent)[: -self.keep]:
                if step_of(old) != best:
                    shutil.rmtree(old)
        world.wait()

    def abandon(self) -> None:
        """Remove what has been written so far."""
        if self.written is not None:
            with contextlib.suppress(Exception):
                self.written.result()
        with contextlib.suppress(_AbandonedError), self.held:
            raise _AbandonedError


class _AbandonedError(Exception):
    """Leaves the context of a folder that is being built, which removes it."""


def save(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    facts: dict[str, Any],
    *,
    keep: int,
    asynchronous: bool = False,
    carried: bytes | None = None,
) -> Pending:
    """Begin to write checkpoint `step` under `folder`; `finish` the result.

    tensors: by name; shards (DTensor), or the same on every process. facts: the totals so far. asynchronous: copy the
    tensors to main memory and write them in a thread, while training goes on. carried: this process's part of what a source of
    steps carries over.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, held = folder / f"step-{step:08d}", contextlib.ExitStack()
    with _refusing(final):
        building = world.broadcast(held.enter_context(whole_folder(final)) if world.is_main() else final)
        state = {name: t if hasattr(t, "full_tensor") else t.contiguous() for name, t in tensors.items()}
        state |= {f"{RANDOM}{world.rank()}/{name}": t for name, t in _random_state().items()}
        if carried is not None:
            state[f"{CARRIED}{world.rank()}"] = torch.frombuffer(bytearray(carried), dtype=torch.uint8)
        alone = world.size() == 1
        pending = Pending(final, building, {"step": step, "processes": world.size(), **facts}, keep, held)
        try:
            writer = FileSystemWriter(building / STATE)
            if asynchronous:
                pending.written = state_dict_saver.async_save(
                    state, storage_writer=writer, process_group=None if alone else _own_group(), no_dist=alone
                )  # type: ignore[assignment]
            else:
                state_dict_saver.save(state, storage_writer=writer, no_dist=alone)
        except BaseException:
            pending.abandon()
            raise
    return pending


def resume(folder: Path, tensors: Mapping[str, Tensor], say: Callable[[str], None] = print) -> dict[str, Any] | None:
    """Read the newest whole checkpoint into the tensors, in place, and restore the random state; return its facts.

    Tensors that the checkpoint lacks stay as they are; facts["tensors"] lists those that were read, and facts["carried"] has what
    the processes carried over. None if there is no checkpoint. say: called with a line about each damaged one. Raises UserError
    for one of another format.
    """
    for path in reversed(world.broadcast(every(folder))):
        facts, problem = _verified(path)
        if problem:
            say(f"checkpoint {path.name} is damaged ({problem}); it is set aside and the one before it is used")
            if world.is_main():
                path.rename(path.with_name(f"damaged-{path.name}"))
            continue
        facts["tensors"] = read(path, tensors)
        facts["carried"] = _carried(path)
        return facts
    return None


def read(path: Path, tensors: Mapping[str, Tensor]) -> list[str]:
    """Read a checkpoint into the tensors, in place, and restore the random state; return the names that it has."""
    reader = FileSystemReader(path / STATE)
    stored = reader.read_metadata().state_dict_metadata
    state = {name: tensor for name, tensor in tensors.items() if name in stored}
    random = _room_for(stored, f"{RANDOM}{world.rank()}/")
    state_dict_loader.load({**state, **random}, storage_reader=reader, no_dist=world.size() == 1)
    for name, value in random.items():
        if name.endswith("torch"):
            torch.set_rng_state(value)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(value)
    return list(state)


def newest_step(folder: Path) -> int:
    """Return the step of the newest complete checkpoint; 0 if there is none."""
    found = every(folder)
    return step_of(found[-1]) if found else 0


def every(folder: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first; leftovers of an interrupted save are ignored."""
    return sorted(p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name) and p.is_dir())


def step_of(path: Path) -> int:
    """Return a checkpoint's step, from its name."""
    return int(path.name.removeprefix("step-"))


def _verified(path: Path) -> tuple[dict[str, Any], str]:
    """Return a checkpoint's facts, and what is wrong with it ("" if nothing is). The processes divide the files."""
    try:
        facts: dict[str, Any] = json.loads((path / FACTS).read_text(encoding="utf-8"))
        files, found = dict(facts.get("files", {})), facts.get("format", 1)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return {}, f"{FACTS}: {error}"
    if found != FORMAT:
        raise DataError(
            f"{path}: a checkpoint of format {found}, but this version of distill reads format {FORMAT}. Continue with the "
            "version that wrote it, or do the stage again with --redo."
        )
    if facts.get("step") != step_of(path) or not files:
        return {}, f"{FACTS} is not this checkpoint's"
    mine = sorted(files)[world.rank() :: world.size()]
    problem = next((why for name in mine if (why := _problem(path / STATE / name, files[name]))), "")
    return facts, next((why for why in world.gather(problem) if why), "")


def _carried(path: Path) -> list[bytes]:
    """Return what every process of a checkpoint carried over."""
    reader = FileSystemReader(path / STATE)
    stored = reader.read_metadata().state_dict_metadata
    parts = _room_for(stored, CARRIED)
    if parts:
        state_dict_loader.load(parts, storage_reader=reader, no_dist=world.size() == 1)
    return [part.numpy().tobytes() for part in parts.values()]


def _room_for(stored: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """Return empty tensors for the bytes that a checkpoint holds under names of a prefix."""
    return {n: torch.empty(stored[n].size, dtype=torch.uint8) for n in stored if n.startswith(prefix)}


def _problem(path: Path, expected: Mapping[str, Any]) -> str:
    """Return how a file differs from its size and hash in state.json; "" if it does not."""
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != expected["bytes"]:
        return f"{path.name} has {path.stat().st_size:,} bytes instead of {expected['bytes']:,}"
    return "" if file_hash(path) == expected["sha256"] else f"{path.name}: bits have changed"


def _hashes(folder: Path, rank: int, size: int) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of every size-th file of a folder."""
    files = sorted(folder.iterdir())[rank::size]
    return {p.name: {"bytes": p.stat().st_size, "sha256": file_hash(p)} for p in files}


def _random_state() -> dict[str, Tensor]:
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


@contextlib.contextmanager
def _refusing(final: Path) -> Any:
    """Turn errors of the disk into a UserError; torch wraps those of other processes in its own exception."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (OSError, CheckpointException) as error:
        raise MachineError(
            f"cannot write the checkpoint {final}: {_reason(error)}. Make room if the disk is full, and run again."
        ) from None


def _reason(error: BaseException) -> str:
    """Return the last line of an error; of one that torch has gathered from the processes, that of the first of them."""
    inner = next((each[0] for each in getattr(error, "failures", {}).values()), error)
    return str(inner).strip().splitlines()[-1].strip(" .")


@functools.lru_cache(maxsize=1)
def _own_group() -> Any:
    """Return a group for the thread that writes, so that its messages do not mix with the training's."""
    return world.second_group()
