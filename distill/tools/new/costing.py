"""What a new recipe costs on this machine or on named GPUs, and the settings that fit there: ways of training, number of questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from distill.compute.cards import GIB, Cards
from distill.recipe import Recipe, document, validate
from distill.recipe.paths import from_working_directory
from distill.reports.wording import duration
from distill.run import advice, fit, plan
from distill.run.predictions.row import Row
from distill.run.trials import resources
from distill.run.trials.trial import TrialSetup
from distill.tools.new import recipe_text
from distill.tools.new.settings import LADDERS, Settings, Training

PATIENCE = {"cpu": 2 * 3600.0, "cuda": 8 * 3600.0}
"""Seconds that a recipe takes at most, unless the user names a number of questions; by device."""
FEWEST = 64
"""Questions that are kept however long they take, if there are as many."""
ROOM = 0.9
"""Share of this machine's memory that a stage may take."""
FLOAT32 = "verdict.teacher.divergence"
"""The stage that measures the teacher on its own traces, in float32: twice its weights in bfloat16."""
LONGEST = 3
"""Stages whose time is named."""


@dataclass(frozen=True, slots=True)
class Cost:
    """A recipe with its predicted cost. memory: bytes at the peak of the largest stage. misfits: why stages do not fit, in words.

    where: the machine, in words. here: whether it is this one.
    """

    recipe: Recipe
    rows: tuple[Row, ...]
    memory: float
    misfits: tuple[str, ...]
    where: str
    here: bool

    @property
    def seconds(self) -> float:
        return sum(row.amounts["seconds"] for row in self.rows)

    def lines(self) -> list[str]:
        """Say time, disk and memory in a few lines."""
        longest = sorted(self.rows, key=lambda row: -row.amounts["seconds"])[:LONGEST]
        share = ", ".join(f"{row.name} {duration(row.amounts['seconds'])}" for row in longest)
        disk = resources.disk(TrialSetup(self.recipe, Path("runs"), tuple(self.recipe.stages)), self.rows)
        return [
            f"time: {duration(self.seconds)} on {self.where}; longest: {share}",
            f"disk: {disk.figure if self.here else disk.figure.rpartition(';')[0]}",
            f"memory: {self.memory / GIB:.3g} GiB at the peak",
            *self.misfits,
        ]


def parsed(text: str, folder: Path) -> Recipe:
    """Return the recipe of a text that will lie in a folder, checked like a file's. Raises UserError."""
    tree = document.read(text, "the new recipe")
    return validate(from_working_directory(tree, folder), "the new recipe")


def cost_of(settings: Settings, folder: Path, cards: Cards | None) -> Cost:
    """Predict the cost of a recipe. cards: GPUs that it is for; None = this machine. Raises UserError if it cannot be predicted."""
    recipe = parsed(recipe_text.write(settings, folder), folder)
    if cards is not None:
        verdicts = fit.verdicts(recipe, cards)
        rows = tuple(verdict.row for verdict in verdicts)
        misfits = tuple(f"{v.row.name} does not fit: {v.problem}" for v in verdicts if not v.fits)
        where = f"{cards.count} x {cards.name}" if cards.count > 1 else f"one {cards.name}"
        return Cost(recipe, rows, max(verdict.need for verdict in verdicts), misfits, where, False)
    machine = plan.measured(recipe)
    rows = tuple(plan.predict(recipe, machine))
    found = [line.removeprefix("stages.") for line in advice.too_large(rows, machine)]
    tight = [row.name for row in rows if row.beside is None and row.amounts["memory"] > ROOM * machine.memory]
    if tight and not found:
        found = [f"{advice.short_list(tight)}: needs nearly all of the memory here, or more"]
    where = f"this machine ({machine.name}, {machine.cores} cores, {machine.memory / GIB:.3g} GiB)"
    return Cost(recipe, rows, max(row.amounts["memory"] for row in rows), tuple(found), where, True)


def fitted(settings: Settings, folder: Path, cards: Cards | None) -> tuple[Settings, Cost]:
    """Choose the first way of training that fits the machine; where none does, the one that needs least. Returns (settings, cost)."""
    first, *others, least = LADDERS[settings.device]

    def tried(training: Training, apart: bool = settings.apart) -> tuple[Settings, Cost]:
        chosen = replace(settings, training=training, apart=apart)
        cost = cost_of(chosen, folder, cards)
        if not apart and any(FLOAT32 in misfit for misfit in cost.misfits):
            return tried(training, True)
        return chosen, cost

    found = tried(first)
    if not found[1].misfits:
        return found
    last = tried(least)
    if last[1].misfits:
        return last
    return next((each for each in map(tried, others) if not each[1].misfits), last)


def affordable(settings: Settings, cost: Cost) -> int:
    """Return the number of questions that the recipe's patience allows, all if they fit in it."""
    fixed = sum(row.start for row in cost.rows)
    most = PATIENCE[settings.device]
    if cost.seconds <= most:
        return settings.questions
    share = max(most - fixed, 0.0) / max(cost.seconds - fixed, 1.0)
    return min(settings.questions, max(FEWEST, int(settings.questions * share) // 10 * 10))


def next_steps(path: Path, elsewhere: str) -> Sequence[str]:
    """The commands that go on from here. elsewhere: the GPUs that the recipe is for, as --gpu takes them; "" = this machine."""
    check = f"distill check {path}" + (f" --gpu {elsewhere}" if elsewhere else "")
    steps = {
        check: "what each stage takes; --show prints the first prompts as the models read them",
        f"distill doctor {path}": "small real trials of every part, in a minute or two",
        f"distill run {path}": f"Ctrl-C stops it, the same command goes on; the report is runs/{path.stem}/report.html",
    }
    width = max(map(len, steps))
    return [f"{command:<{width}}   {what}" for command, what in steps.items()]
