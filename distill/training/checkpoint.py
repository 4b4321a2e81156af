"""Training checkpoints: written atomically; a run resumed from one equals an uninterrupted run bitwise.

A checkpoint is a folder `step-00000050` with `state.safetensors` (master weights and moments) and `state.json`
(step, random state, totals so far). It is built under a temporary name, synced to disk and renamed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.files import whole_folder
from distill.records import UserError


def save(folder: Path, step: int, tensors: dict[str, Tensor], progress: dict[str, Any], *, keep: int) -> Path:
    """Write checkpoint `step` under `folder` and remove all but the newest `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    random_state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        random_state["cuda"] = torch.cuda.get_rng_state()
    contiguous = {name: tensor.contiguous() for name, tensor in {**tensors, **_prefixed(random_state)}.items()}
    try:
        with whole_folder(final) as building:
            save_file(contiguous, building / "state.safetensors")
            (building / "state.json").write_text(json.dumps({"step": step, **progress}), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the checkpoint {final}: {error}. Free some space and run again.") from None
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def newest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint; leftovers of an interrupted save are ignored."""
    found = _all(folder)
    return found[-1] if found else None


def newest_step(folder: Path) -> int:
    """Return the step of the newest complete checkpoint; 0 if there is none."""
    found = newest(folder)
    return 0 if found is None else int(found.name.removeprefix("step-"))


def load(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors, progress) of a checkpoint and restore its random state."""
    tensors = load_file(checkpoint / "state.safetensors")
    torch.set_rng_state(tensors.pop("random/torch"))
    if (cuda := tensors.pop("random/cuda", None)) is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    progress: dict[str, Any] = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    return tensors, progress


def _prefixed(random_state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"random/{name}": tensor for name, tensor in random_state.items()}


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").is_file())
