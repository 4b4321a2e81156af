"""What an arm cost: the stages that its model rests on, added up once each, in three views.

Comes in: each stage's `Cost` and its inputs. Goes out: the student alone; with the teacher's inference; with
the teacher's training, shared by its students. Left out on purpose: how a stage's cost is counted (`flops`
has the formulas, stages count their tokens), and evaluation, which no model rests on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

from distill.recipe.lineage import NO_PARENTS
from distill.records import Cost

VIEWS = ("student", "inference", "teacher")
"""What each view adds, by the keys of ArmCost.stages."""


@dataclass(frozen=True, slots=True)
class StageCost:
    """A stage's cost. trains: whether its model goes on as another. teacher: the part that a teacher's forward passes took."""

    trains: bool
    cost: Cost
    teacher: Cost = field(default_factory=Cost)


@dataclass(frozen=True, slots=True)
class ArmCost:
    """Three views of what an arm cost, each with the one before it, and the stages that each view adds."""

    student: Cost
    with_inference: Cost
    with_teacher: Cost
    stages: dict[str, list[str]]


def arm_cost(
    stage: str,
    stages: Mapping[str, StageCost],
    parents: Mapping[str, Sequence[tuple[str, str]]],
    students: int = 1,
) -> ArmCost:
    """Add up everything that a trained model rests on, each stage once.

    parents: (field, name) of every stage's inputs, as `StageConfig.inputs()` yields them; names that are not
    stages (models, files, tasks) cost nothing. `model` leads to the arm's own earlier training, `data` to
    inference, anything else (a teacher) to teacher training; so does the model that a student was pruned
    from, which is another model. Data that the arm's own line of models wrote is the student's cost, as RL's
    rollouts are. The teacher's training, with all that it rests on, is shared by `students`. A stage that is
    reached by several ways counts once, in the first view that has it.
    """

    def above(name: str, *fields_wanted: str) -> list[str]:
        return [
            value
            for key, value in parents.get(name, ())
            if key not in NO_PARENTS and (not fields_wanted or key in fields_wanted)
        ]

    def reach(starts: Iterable[str], follow: Callable[[str], list[str]]) -> list[str]:
        found, frontier = [], list(starts)
        while frontier:
            name = frontier.pop()
            if name in stages and name not in found:
                found.append(name)
                frontier.extend(follow(name))
        return found

    def own_models(name: str) -> list[str]:
        return above(name, "model") if stages[name].trains else []

    own = reach([stage], own_models)
    line = {stage, *own, *(model for name in own for model in own_models(name))}
    data = reach((value for name in own for value in above(name, "data")), lambda name: above(name, "data"))
    self_written = [name for name in data if _written_by(name, line, parents)]
    inference = [name for name in data if name not in self_written]
    counted = {*own, *data}
    teacher = [name for name in reach([*own, *inference], above) if name not in counted]

    student_cost = _sum(stages[name].cost for name in (*own, *self_written))
    inference_cost = _sum(stages[name].cost for name in inference)
    inference_cost += _sum(stages[name].teacher for name in (*own, *self_written))
    teacher_cost = _share(_sum(stages[name].cost for name in teacher), students)
    return ArmCost(
        student=student_cost,
        with_inference=student_cost + inference_cost,
        with_teacher=student_cost + inference_cost + teacher_cost,
        stages={
            "student": [*own, *self_written],
            "inference": inference,
            "teacher": teacher,
        },
    )


def mean_cost(costs: Sequence[ArmCost]) -> ArmCost:
    """Of several training seeds of one arm. stages: of all of them."""
    return ArmCost(
        _share(_sum(cost.student for cost in costs), len(costs)),
        _share(_sum(cost.with_inference for cost in costs), len(costs)),
        _share(_sum(cost.with_teacher for cost in costs), len(costs)),
        {view: list(dict.fromkeys(n for c in costs for n in c.stages[view])) for view in VIEWS},
    )


def _written_by(name: str, line: set[str], parents: Mapping[str, Sequence[tuple[str, str]]]) -> bool:
    """Whether every model that a data stage rests on is of the arm's own line."""
    models, frontier = [], [name]
    while frontier:
        for key, value in parents.get(frontier.pop(), ()):
            if key == "data":
                frontier.append(value)
            elif key not in NO_PARENTS:
                models.append(value)
    return bool(models) and all(model in line for model in models)


def _sum(costs: Iterable[Cost]) -> Cost:
    return sum(costs, Cost())


def _share(cost: Cost, students: int) -> Cost:
    if students <= 1:
        return cost
    shared = {f.name: getattr(cost, f.name) / students for f in fields(Cost)}
    return Cost(**{key: round(v) if isinstance(getattr(cost, key), int) else v for key, v in shared.items()})
