"""The cost of an arm: the sum over all stages that its model depends on, in three views.

Input: each stage's `Cost` and its inputs. Output: the cost of the student alone; that and the teacher's inference; that and
the teacher's training, divided among its students. Evaluation is not counted, because no model depends on it.
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
    students: int = 1,
) -> ArmCost:
    """Add up the cost of every stage that a trained model depends on, each stage once.

    parents: the inputs of every stage. Names that are not stages (models, files, tasks) cost nothing. `lineage.ancestors`
    assigns stages to views: data that an earlier model of the arm itself wrote is the student's cost, as RL's rollouts are.
    The cost of the teacher's training and of all that it depends on is divided by `students`. A stage reached in several
    ways counts once, in the first view that includes it.
    """
    found = ancestors(stage, {name: one.trains for name, one in stages.items()}, parents)
    own = [*found.own, *found.self_written]
    student_cost = _sum(stages[name].cost for name in own)
    inference_cost = _sum(stages[name].cost for name in found.inference)
    inference_cost += _sum(stages[name].teacher for name in own)
    teacher_cost = _share(_sum(stages[name].cost for name in found.teacher), students)
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


def _sum(costs: Iterable[Cost]) -> Cost:
    return sum(costs, Cost())


def _share(cost: Cost, students: int) -> Cost:
    if students <= 1:
        return cost
    shared = {f.name: getattr(cost, f.name) / students for f in fields(Cost)}
    return Cost(**{key: round(v) if isinstance(getattr(cost, key), int) else v for key, v in shared.items()})
