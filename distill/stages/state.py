"""stage.json: what a stage was asked for, where it stands, and what came out. Written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from distill.reports.pages import write_atomic

FILE = "stage.json"


@dataclass(slots=True)
class State:
    """config: as resolved. inputs: fingerprint by field. seconds: wall time of the attempts that came to an end."""

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
    attempts: int = 0
    version: str = ""


def read(folder: Path) -> State | None:
    """The state of a stage's folder; None where it never started."""
    path = folder / FILE
    if not path.is_file():
        return None
    tree: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return State(**tree)


def write(folder: Path, state: State) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / FILE, json.dumps(asdict(state), indent=1, ensure_ascii=False))
