"""filter: select the traces to learn from. Writes a selection; the shards are not changed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from distill.conversations import Reader, open_table
from distill.recipe import FilterStage
from distill.records import Cost, UserError
from distill.stages.context import Context, Result, find_data
from distill.tasks.splits import normalise
from distill.traces.contamination import HeldOut
from distill.traces.reader import content_fingerprint
from distill.traces.selection import select


def run(config: FilterStage, context: Context) -> Result:
    out = context.folder / "traces"
    shutil.rmtree(out, ignore_errors=True)
    context.phase("reading and filtering the traces")
    selection = select(context.data_path(config.data), out, config.keep, lambda name: held_out(name, context))
    context.say(str(selection).replace("\n", "\n  "))
    metrics = {
        "rows": selection.rows,
        "kept": selection.kept,
        "problems": selection.problems,
        "problems_kept": selection.problems_kept,
        "dropped": {dropped.fn: dropped.dropped for dropped in selection.filters},
    }
    cost = Cost(samples_filtered=selection.rows - selection.kept)
    return Result(cost, metrics, content_fingerprint(out))


def held_out(against: str, context: Context) -> HeldOut:
    """Return the evaluation set that a filter's `against` names: a task of the recipe, or a JSONL file of problems.

    For a task with endless problems: the problems that the recipe's eval and compare stages use. Raises
    UserError if there are none.
    """
    where = f"stages.{context.name}.keep.against"
    if against not in context.recipe.tasks:
        path = find_data(against)
        if path is None or path.suffix != ".jsonl":
            raise UserError(f"{where}: {against!r} is neither a task of the recipe nor a JSONL file.")
        return HeldOut(_questions(path), normalise, prose=True)
    task, num = context.task(against), None
    if task.is_endless:
        drawn = [stage.held_out_problems(against) for stage in context.recipe.stages.values()]
        num = max((each for each in drawn if each is not None), default=None)
        if num is None:
            raise UserError(
                f"{where}: the task {against!r} has an unlimited number of problems, and no eval or compare stage says how "
                "many of them are evaluated. Add such a stage, or name a JSONL file of the problems."
            )
    problems = task.problems("held_out", num, context.recipe.seed)
    return HeldOut((p.question for p in problems), normalise, prose=num is None)


def _questions(path: Path) -> Iterator[str]:
    """Return the last user message of every row. Raises UserError at a row that is not a problem: a set with gaps would
    miss contamination."""

    def refuse(number: int, reason: str) -> None:
        raise UserError(f"{path}: line {number}: {reason}.")

    reader = Reader()
    for number, row in open_table(path, "against").rows(refuse):
        try:
            found = reader.read(row, number)
        except ValueError as error:
            refuse(number, str(error))
        for conversation in found[:1]:
            yield next(m["content"] for m in reversed(conversation.prompt) if m["role"] == "user")
