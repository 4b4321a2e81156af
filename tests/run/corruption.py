"""Corrupt the files of a finished run, one at a time, and see what the command line makes of it.

A corruption must be noticed (a message that names the file, exit status 2 to 4, no traceback), mended, or harmless: never another number
in the report.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from project import Project

UNTOLD = ("seconds", "wall", "cpu", "date", "created", "path", "per_second", "bytes", "memory", "judge", "eta", "began", "attempts", "environment", "machine", "command", "flops_per", "predicted", "log")  # fmt: skip
"""Words in the keys of a report whose values differ between two equal runs."""


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def block(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    start = rng.randrange(max(len(data), 1))
    data[start : start + 64] = bytes(len(data[start : start + 64]))
    path.write_bytes(data)


def digit(path: Path, rng: random.Random) -> None:
    """Change a digit into another one, where there is any: still valid JSON."""
    data = bytearray(path.read_bytes())
    places = [n for n, byte in enumerate(data) if 0x31 <= byte <= 0x38]
    if places:
        data[rng.choice(places)] += 1
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def missing(path: Path, rng: random.Random) -> None:
    path.unlink()


def folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def garbage(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.randbytes(200))


KINDS: tuple[Callable[[Path, random.Random], None], ...] = (flip, block, digit, cut, empty, missing, folder, garbage)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a corruption. word: noticed, same (mended or harmless), or a fault: silent, traceback, unclear."""

    file: str
    kind: str
    word: str
    said: str

    @property
    def fault(self) -> bool:
        return self.word not in ("noticed", "same")


def told(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a report that two equal runs share."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if not any(word in str(key) for word in UNTOLD):
                yield from told(value, f"{path}.{key}")
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            yield from told(value, f"{path}[{number}]")
    else:
        yield path, tree


def report_of(project: Project) -> dict[str, Any]:
    return dict(told(json.loads((project.run_dir / "report.json").read_text())))


def files_of(run: Path) -> list[Path]:
    return sorted(path.relative_to(run) for path in run.rglob("*") if path.is_file())


def without(run: Path, stages: tuple[str, ...]) -> None:
    """Remove some stages of a run, and what a comparison expands into."""
    for each in run.iterdir():
        if each.name.partition(".")[0] in stages:
            shutil.rmtree(each)


def corrupt(
    project: Project,
    pristine: Path,
    file: Path,
    kind: Callable[[Path, random.Random], None],
    seed: int,
    missing: tuple[str, ...] = (),
) -> Outcome:
    """Put the run back as it was, corrupt one file, and run again. missing: stages that are then still to be done."""
    run = project.run_dir
    shutil.rmtree(run)
    shutil.copytree(pristine, run, symlinks=True)
    before = report_of(project)
    without(run, missing)
    kind(run / file, random.Random(seed))
    words = []
    for arguments in (("show", str(run)), ("run", project.recipe.name)):
        done = project.distill(*arguments)
        text = done.stdout + done.stderr
        if "Traceback" in text or done.returncode == 1:
            return Outcome(str(file), kind.__name__, "traceback", text[-1500:])
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""
            if done.returncode not in (2, 3, 4) or not last:
                return Outcome(str(file), kind.__name__, "unclear", f"status {done.returncode}: {text[-800:]}")
            words.append(last)
    if words:
        return Outcome(str(file), kind.__name__, "noticed", words[-1])
    after = report_of(project)
    changed = {key: (before.get(key), after.get(key)) for key in {*before, *after} if before.get(key) != after.get(key)}
    noted = any(file.name in str(value) for key, value in after.items() if key.startswith(".notes"))
    other = {key for key, (_, now) in changed.items() if now is not None and not key.startswith(".notes")}
    if changed and noted and not other:
        return Outcome(str(file), kind.__name__, "noticed", "left out of the report, which says so")
    if changed:
        return Outcome(str(file), kind.__name__, "silent", json.dumps(dict(sorted(changed.items())[:4]), default=str))
    return Outcome(str(file), kind.__name__, "same", "")
