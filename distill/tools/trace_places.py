"""Finds folders of traces where a user names them: the traces themselves, a stage's folder, or a run's."""

from __future__ import annotations

from pathlib import Path

from distill import run_folder
from distill.errors import UserError

RUNS = Path("runs")


def existing(path: Path) -> Path:
    """Return the path, or the one under runs/ if it is not here. Raises UserError if it is in neither place."""
    if not path.exists() and (RUNS / path).exists():
        return RUNS / path
    if not path.exists():
        raise UserError(f"{path}: no such file or folder, here or in runs/.")
    return path


def places(path: Path) -> list[Path]:
    """Return the folders of traces at a path: itself, its `traces` folder, or those of all stages of a run.

    Raises UserError if there is nothing at the path, or the run has no traces yet.
    """
    path = existing(path)
    if not run_folder.is_run(path):
        return [path / "traces" if (path / "traces").is_dir() else path]
    found = sorted(folder for folder in path.glob("*/traces") if folder.is_dir())
    if not found:
        raise UserError(f"{path}: no stage of this run has written traces yet.")
    return found


def place(path: Path) -> Path:
    """Return the one folder of traces at a path. Raises UserError if a run has several."""
    first, *others = places(path)
    if others:
        names = ", ".join(str(one.parent) for one in (first, *others))
        raise UserError(f"{path}: this run has traces of several stages; name one of: {names}.")
    return first
