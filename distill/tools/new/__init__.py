"""The verb `distill new`: from a data set and two models to a checked recipe with a reason beside every value.

In: what flags gave; what is missing is asked, or takes its default. Out: the recipe's file, written at the very end and whole.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from distill import progress
from distill.compute.cards import Cards
from distill.errors import UserError
from distill.files import write_atomic
from distill.recipe.json_schema import FILE, as_text
from distill.run import plan, trials
from distill.tools.new import costing, recipe_text
from distill.tools.new.asking import DATA, NAME, STUDENT, TEACHER, Given, settle_all
from distill.tools.new.data_look import DataLook
from distill.tools.new.dialogue import Dialogue
from distill.tools.new.settings import Settings

__all__ = ["Given", "create"]

WORDS = {"pass": "passed", "fail": "failed", "warn": "with a warning", "skip": "not possible here"}
REQUIRED = (DATA, TEACHER, STUDENT)


def create(given: Given, *, asks: bool) -> tuple[Path, bool]:
    """Make a recipe. asks: whether missing answers are asked. Returns its path, and whether every trial passed.

    Raises UserError for a wrong answer that cannot be asked again, and for a recipe that exists.
    """
    dialogue = Dialogue(asks)
    _check_given(given, asks)
    chosen, cards = settle_all(dialogue, given)
    path = _path(dialogue, given, chosen.data)
    chosen = replace(chosen, name=path.stem)
    with progress.working("predicting its cost and trying its parts"):
        chosen, cost = costing.fitted(chosen, path.parent, cards)
        text = recipe_text.write(chosen, path.parent, cost.lines())
        recipe = costing.parsed(text, path.parent)
        plan.check_plugs(recipe)
        tried = list(trials.cheap(recipe, Path("runs") / chosen.name, tuple(recipe.stages), cost.rows))
    _write(path, text)
    return path, _report(dialogue, cards, path, chosen, cost, tried)


def _check_given(given: Given, asks: bool) -> None:
    """Raise UserError for what is missing and cannot be asked, all in one message, and for a recipe in the way."""
    values = (given.data, given.teacher, given.student)
    missing = [question.flag for question, value in zip(REQUIRED, values, strict=True) if value is None]
    if missing and not asks:
        raise UserError(
            f"distill new needs {' and '.join(missing)}: without a terminal (or with --yes) nothing is asked. For example: distill new mine "
            "--data questions.jsonl --teacher Qwen/Qwen2.5-7B-Instruct --student Qwen/Qwen2.5-0.5B-Instruct"
        )
    if given.name is not None:
        _named(given.name, given.force)


def _named(text: str, force: bool) -> Path:
    path = Path(text if text.endswith((".yaml", ".yml")) else f"{text}.yaml")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", path.stem):
        raise UserError(f"{path.stem!r}: a name begins with a letter and has letters, digits, - and _ only.")
    if path.exists() and not force:
        raise UserError(f"{path} exists already; choose another name, or --force to replace it.")
    return path


def _path(dialogue: Dialogue, given: Given, data: DataLook) -> Path:
    """Return where the recipe is written: as given, or called like the data; another name if that one is taken."""
    if given.name is not None:
        return _named(given.name, given.force)
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(data.given).name.split(".")[0]).strip("_-") or "mine"
    stem = stem if stem[0].isalpha() else f"on_{stem}"
    if not dialogue.asks:
        return _named(stem, given.force)
    number, name = 2, stem
    while Path(f"{name}.yaml").exists():
        name, number = f"{stem}_{number}", number + 1
    return dialogue.settle(NAME, None, lambda text: _named(text, given.force), name)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path.parent / FILE, as_text())
    write_atomic(path, text)


def _report(
    dialogue: Dialogue, cards: Cards | None, path: Path, chosen: Settings, cost: costing.Cost, tried: list[trials.Trial]
) -> bool:
    """Say what was written, what it costs, what the trials found and how to go on. Return whether it is ready."""
    dialogue.say(f"\n{path} is written.", strong=True)
    for line in (*cost.lines(), *(f"note: {remark}" for remark in chosen.remarks())):
        dialogue.say(f"  {line}")
    # The disk of this machine says nothing about the one that the recipe is for.
    tried = [trial for trial in tried if cost.here or trial.name != "disk"]
    failed = [trial for trial in tried if trial.status == "fail"]
    for trial in (*failed, *(trial for trial in tried if trial.status == "warn")):
        word = "FAILED" if trial.status == "fail" else "warning"
        dialogue.say(f"  {word}: {trial.subject}: {trial.name}: {trial.figure}. {trial.remedy}")
    ready = not failed and not cost.misfits
    by_status = {word: sum(trial.status == status for trial in tried) for status, word in WORDS.items()}
    dialogue.say("  trials: " + ", ".join(f"{number} {word}" for word, number in by_status.items() if number))
    if not ready:
        dialogue.say("It is not ready: change what is named above, then `distill doctor` tries it again.", strong=True)
    else:
        dialogue.say("It is ready. Go on with:", strong=True)
    for step in costing.next_steps(path, "" if cards is None else f"{cards.key}:{cards.count}"):
        dialogue.say(f"  {step}")
    return ready
