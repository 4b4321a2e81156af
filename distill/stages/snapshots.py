"""Snapshots: models kept during training and evaluated, which gives a curve of accuracy against cost.

A snapshot is RUN/STAGE/snapshots/step-00000010: `model.safetensors` (the weights, adapters merged in) and `snapshot.json` (the
step, and the stage's cost up to it). An evaluation loads the weights into its running engine.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from distill import models, run_folder, world
from distill.compute.flops import ModelShape
from distill.compute.training_cost import training_cost
from distill.files import read_json, whole_folder
from distill.recipe import GrpoStage, OnPolicyStage, TrainStage
from distill.records import Cost
from distill.stages.context import Context

if TYPE_CHECKING:
    from distill.training.policy import Policy
    from distill.training.step import WorkCounts

FOLDER = "snapshots"
WEIGHTS = "model.safetensors"
FACTS = "snapshot.json"
REMEDY = "Put back a copy, remove the snapshot's folder (its point of the curve is then missing), or train again with --redo."


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A model kept during training. cost: the stage's own up to this step."""

    folder: Path
    step: int
    cost: Cost

    @property
    def name(self) -> str:
        return self.folder.name

    def weights(self) -> list[tuple[str, Any]]:
        """Yield (name in the checkpoint, tensor)."""
        with safe_open(self.folder / WEIGHTS, framework="pt") as file:
            return [(name, file.get_tensor(name)) for name in file.keys()]  # noqa: SIM118

    @property
    def fingerprint(self) -> str:
        return models.file_hash(self.folder / WEIGHTS)[:16]


def keep_snapshots(
    config: TrainStage | GrpoStage | OnPolicyStage, context: Context
) -> Callable[[int, WorkCounts, Policy], None] | None:
    """Return a function that the loop calls after each step and that keeps a snapshot every `snapshot_every` steps, or None."""
    if (every := config.snapshot_every) is None:
        return None
    import torch
    from safetensors.torch import save_file

    saved_in = getattr(torch, config.saved_in)

    shape = ModelShape.from_config(models.config_of(context.model_dir(config.model)))

    def keep(step: int, counts: WorkCounts, policy: Policy) -> None:
        if step % every:
            return
        weights = {}
        for name, tensor in policy.weights():  # every process takes part in gathering shards
            if world.is_main():
                weights[name] = tensor.to("cpu", saved_in).contiguous()
        if not world.is_main():
            return
        facts = {"step": step, "cost": asdict(training_cost(config, shape, counts))}
        with whole_folder(context.folder / FOLDER / f"step-{step:08d}") as building:
            save_file(weights, building / WEIGHTS)
            (building / FACTS).write_text(json.dumps(facts), encoding="utf-8")
            models.seal(building)

    return keep


def snapshots_of(folder: Path) -> list[Snapshot]:
    """Return a stage's snapshots by step, without the final model."""
    standing = run_folder.read(folder)
    end = standing.metrics.get("steps") if standing is not None else None
    found = []
    for one in sorted(each for each in (folder / FOLDER).glob("step-*") if each.is_dir()):
        models.verify(one, REMEDY)
        facts = read_json(one / FACTS, REMEDY)
        if facts["step"] != end:
            found.append(Snapshot(one, facts["step"], Cost.of(facts["cost"])))
    return found
