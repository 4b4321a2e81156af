"""Rows of a report that say what its numbers are of: how an arm was made, how it was evaluated, what the run spent."""

from __future__ import annotations

from typing import NotRequired, TypedDict


class AboutRow(TypedDict):
    """How the model of an arm was made, in words for a line of a table; "" where it does not apply.

    training: its loss or objective. data: what it learned from. steps: number of optimiser steps. start: the model that it was trained
    or pruned from. size: parameters and layers. base: the model that all of this began with. method: the way of training in two or
    three words. builds_on: arms that its model depends on. teachers: arms whose traces or distributions it learned from. begins_with:
    the arms in its own training line, nearest first.
    """

    training: str
    data: str
    steps: str
    start: str
    size: str
    base: str
    method: str
    builds_on: list[str]
    teachers: list[str]
    begins_with: list[str]


class EvaluationRow(TypedDict):
    """What several evaluations have in common, so that their accuracies can be compared.

    stages: the stages that evaluate in this way. sampling: temperature and limit in words. main: whether its arms are the result of the
    run; others are measurements on the way.
    """

    stages: list[str]
    task: str
    split: str
    problems: int
    samples: int
    sampling: str
    main: bool


class LedgerRow(TypedDict):
    """Stages that the same arms depend on, and what they took together. arms: empty for evaluations and unused stages.

    what: "stages" that arms depend on, "unused" ones, or "evaluation". The rows of a run add up to all that it spent.
    """

    what: str
    stages: list[str]
    arms: list[str]
    flops: float
    seconds: float
    dollars: NotRequired[float]


class ProgressRow(TypedDict):
    """How far a stage is that has not ended. step: the newest line of its log; steps: the number of steps, if known."""

    step: NotRequired[float]
    steps: NotRequired[float]
