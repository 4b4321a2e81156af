"""`budget: {flops_of: OTHER}`: train with the same compute as another stage's student.

Both sides count the student's own compute: training, rollouts, scoring by itself or its reference; not the teachers'.
Common ancestors (the training of a common start, traces that the start wrote) cancel out.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from distill import models, run_folder
from distill.compute.flops import ModelShape
from distill.compute.ledger import StageCost, arm_cost
from distill.compute.training_cost import training_cost
from distill.recipe import GrpoStage, OnPolicyStage, Recipe, TrainStage
from distill.recipe.lineage import parents_of
from distill.records import Cost, UserError
from distill.stages.context import Context

if TYPE_CHECKING:
    from distill.training.step import Budget


def stage_costs(recipe: Recipe, run: Path) -> dict[str, StageCost]:
    """Return the cost of each stage of the run so far; for an unfinished stage, the cost in its stage.json."""
    costs = {}
    for name in recipe.stages:
        if (standing := run_folder.read(run / name)) is not None:
            costs[name] = StageCost(recipe.stages[name].trains, Cost.of(standing.cost), Cost.of(standing.teacher_cost))
    return costs


def budget_of(config: TrainStage | GrpoStage | OnPolicyStage, context: Context) -> Budget | None:
    """The FLOPs that the stage may spend; None if it has no budget. Raises UserError if no FLOPs are left."""
    # Imported here because reports and checks use this module too and must not load torch.
    from distill.training.step import Budget

    if config.budget is None:
        return None
    other = config.budget.flops_of
    costs, parents = stage_costs(context.recipe, context.run), parents_of(context.recipe)
    costs[context.name] = StageCost(config.trains, Cost())  # its ancestors only, not an earlier attempt of its own

    def spent(model: str) -> float:
        return arm_cost(model, costs, parents).student.flops

    allowed = config.budget.times * spent(other)
    flops = allowed - spent(context.name)
    if flops <= 0:
        raise UserError(
            f"stages.{context.name}.budget: {other!r} allows {allowed:.3g} FLOPs in total, but the training of this stage's "
            f"starting model already used {spent(context.name):.3g}; nothing is left to spend. Raise budget.times."
        )
    shape = ModelShape.from_config(models.config_of(context.model_dir(config.model)))
    context.say(f"budget: {flops:.3g} FLOPs, measured by {other}")
    return Budget(flops, lambda counts: training_cost(config, shape, counts).flops)
