"""The cost of an arm: the sum over all stages that its model depends on, in three views.

Input: each stage's `Cost` and its inputs. Output: the cost of the student alone; that and the teacher's inference; that and
the teacher's training. Each view is what this one arm needs, so a stage that several arms share is in the views of all of them;
`shares` lists every stage of a run once. Evaluation is in no view, because no model depends on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

from distill.recipe import Input
from distill.recipe.lineage import ancestors
from distill.records import Cost

VIEWS = ("student", "inference", "teacher")
"""Keys of ArmCost.stages: the stages that each view adds."""


@dataclass(frozen=True, slots=True)
class StageCost:
    """A stage's cost without its teachers' forward passes, which are in `teacher`.

    trains: whether the stage trains its `model` input.
    """

    trains: bool
    cost: Cost
    teacher: Cost = field(default_factory=Cost)


@dataclass(frozen=True, slots=True)
class ArmCost:
    """Three views of an arm's cost, each including the one before, and the stages that each view adds."""

    student: Cost
    with_inference: Cost
    with_teacher: Cost
    stages: dict[str, list[str]]


def arm_cost(
    stage: str,
    stages: Mapping[str, StageCost],
    parents: Mapping[str, Sequence[Input]],
) -> ArmCost:
    """Add up the cost of every stage that a trained model depends on, each stage once.

    parents: the inputs of every stage. Names that are not stages (models, files, tasks) cost nothing. `lineage.ancestors`
    assigns stages to views: data that an earlier model of the arm itself wrote is the student's cost, as RL's rollouts are.
    A stage reached in several ways counts once, in the first view that includes it.
    """
    found = ancestors(stage, {name: one.trains for name, one in stages.items()}, parents)
    own = [*found.own, *found.self_written]
    student_cost = _sum(stages[name].cost for name in own)
    inference_cost = _sum(stages[name].cost for name in found.inference)
    inference_cost += _sum(stages[name].teacher for name in own)
    teacher_cost = _sum(stages[name].cost + stages[name].teacher for name in found.teacher)
    return ArmCost(
        student=student_cost,
        with_inference=student_cost + inference_cost,
        with_teacher=student_cost + inference_cost + teacher_cost,
        stages={"student": own, "inference": found.inference, "teacher": found.teacher},
    )


def mean_cost(costs: Sequence[ArmCost]) -> ArmCost:
    """The mean cost over the training seeds of an arm. stages: those of all seeds."""
    return ArmCost(
        _share(_sum(cost.student for cost in costs), len(costs)),
        _share(_sum(cost.with_inference for cost in costs), len(costs)),
        _share(_sum(cost.with_teacher for cost in costs), len(costs)),
        {view: list(dict.fromkeys(n for c in costs for n in c.stages[view])) for view in VIEWS},
    )


@dataclass(frozen=True, slots=True)
class Share:
    """Stages that the same arms depend on, and their cost, counted once. arms: empty for stages that no arm depends on."""

    stages: list[str]
    arms: list[str]
    cost: Cost


def shares(stages: Mapping[str, StageCost], arms: Mapping[str, Sequence[ArmCost]]) -> list[Share]:
    """Group the stages of a run by the arms that depend on them, in the order of the stages: each stage is in one share.

    arms: the costs of an arm's models, one for each training seed. The costs of all shares add up to that of all stages.
    """
    needed = {
        arm: {name for cost in costs for names in cost.stages.values() for name in names} for arm, costs in arms.items()
    }
    grouped: dict[tuple[str, ...], list[str]] = {}
    for name in stages:
        grouped.setdefault(tuple(arm for arm, names in needed.items() if name in names), []).append(name)
    return [
        Share(names, list(users), _sum(stages[name].cost + stages[name].teacher for name in names))
        for users, names in grouped.items()
    ]


def _sum(costs: Iterable[Cost]) -> Cost:
    return sum(costs, Cost())


def _share(cost: Cost, students: int) -> Cost:
    if students <= 1:
        return cost
    shared = {f.name: getattr(cost, f.name) / students for f in fields(Cost)}
    return Cost(**{key: round(v) if isinstance(getattr(cost, key), int) else v for key, v in shared.items()})
