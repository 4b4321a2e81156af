"""stage.json: what a stage was asked for, where it stands, and what came out. Written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from distill.files import write_atomic

FILE = "stage.json"


@dataclass(slots=True)
class State:
    """config: as resolved. inputs: fingerprint by field. seconds: wall time of all attempts, the one under way left out,
    which began at `began` (seconds since 1970). A killed one counts up to the last file that it wrote."""

    kind: str
    config: dict[str, Any]
    inputs: dict[str, str]
    status: Literal["running", "done", "failed"] = "running"
    fingerprint: str = ""
    cost: dict[str, Any] = field(default_factory=dict)
    teacher_cost: dict[str, Any] = field(default_factory=dict)
    predicted: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    began: float = 0.0
    attempts: int = 0
    version: str = ""


def read(folder: Path) -> State | None:
    """The state of a stage's folder; None where it never started."""
    path = folder / FILE
    if not path.is_file():
        return None
    tree: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return State(**tree)


def settle(folder: Path, state: State) -> None:
    """Add to `seconds` what a killed attempt took: nobody was left to say so."""
    if state.status == "running" and state.began:
        signs = [file.stat().st_mtime for file in folder.rglob("*") if file.is_file()]
        state.seconds += max(0.0, max(signs, default=state.began) - state.began)
        state.began = 0.0


def write(folder: Path, state: State) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / FILE, json.dumps(asdict(state), indent=1, ensure_ascii=False))
