"""Problems from a data file, in any format and layout of `conversations`.

The gold answer is a row's answer column or, without one, the final answer of its reply. A row that cannot be used is rejected
with its number, never repaired.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from distill.conversations import Conversation, Reader, Table, open_table
from distill.models import file_hash
from distill.recipe.paths import RULE
from distill.records import Split, UserError, stable_hash
from distill.tasks import templates
from distill.tasks.problem_list import FiniteTask, Judge, Loaded, Rejected, Row, assemble

HeldOut = Literal["hash", "all"]


def jsonl(
    name: str,
    *,
    path: str,
    held_out: HeldOut = "hash",
    judge: Judge = "math",
    fields: dict[str, str] | None = None,
    template: str = "think_answer",
) -> FiniteTask:
    """Problems of a file (JSON lines, JSON, CSV, Parquet, ...) in any layout that `distill ls layouts` lists.

    held_out: "all" makes an evaluation set of it, with nothing to train on. fields: columns of another layout by part, such
    as {question: a.b, answer: c}.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"tasks.{name}.path: {path!r}: no such file. {RULE}.")
    found = templates.find(template, f"tasks.{name}.template")
    by_hand = [repr(sorted(fields.items()))] if fields else []
    fingerprint = stable_hash("jsonl", file_hash(file), held_out, judge, *by_hand, *templates.fingerprint(found))
    where = f"tasks.{name}"
    return FiniteTask(
        name, found, fingerprint, judge, lambda: _load(name, file, held_out, judge, fields or {}, where), str(file)
    )


def final_answer(text: str) -> str:
    r"""The answer that a worked solution ends in: after `####`, in the last tag or `\boxed{}`, or all of it."""
    rest = templates.after_thinking(text)
    rest = text if rest is None else rest
    if "####" in rest:
        return rest.rpartition("####")[2].strip()
    return (templates.last_answer_tag(rest) or templates.last_box(rest) or rest).strip()


def gold_text(value: Any) -> str:
    """A gold answer as text: a text or a number as it is, a list of these as a list of answers that are all wanted.

    Raises ValueError for anything else: an object or a list of lists is no answer, and its source text is none either.
    """
    if isinstance(value, list) and value and not any(isinstance(item, list) for item in value):
        return ", ".join(plain_number(gold_text(item).strip()) for item in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.lstrip().startswith("[") and (listed := _json_list(value)) is not None:
        return gold_text(listed)
    if not isinstance(value, str):
        keys = f" with the keys {', '.join(map(str, value))}" if isinstance(value, dict) else ""
        raise ValueError(f"the answer is {type(value).__name__}{keys}, not a text, a number or a list of them")
    if not value.strip():
        raise ValueError("the answer is empty")
    return value


def _json_list(text: str) -> list[Any] | None:
    """Return the list of texts that a text is the JSON of, as some data sets store golds; None for any other text."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, list) and value and all(isinstance(each, str) for each in value) else None


def plain_number(answer: str) -> str:
    """Without the commas of a grouped integer, which a gold answer cannot mean as a list."""
    grouped = re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?", answer)
    return answer.replace(",", "") if grouped else answer


def _load(name: str, path: Path, held_out: HeldOut, judge: Judge, fields: Mapping[str, str], where: str) -> Loaded:
    rejected: Rejected = []
    table = open_table(path, f"{where}.path")
    split: Split | None = "held_out" if held_out == "all" else None
    rows = list(problems_of(table, fields, split, rejected))
    return assemble(name, "jsonl", rows, judge, rejected)


def problems_of(table: Table, fields: Mapping[str, str], split: Split | None, rejected: Rejected) -> Iterator[Row]:
    """Yield the problems of a data set's rows with their gold answers; others are added to `rejected`."""
    reader = Reader(fields, keep_wrong=True)
    for number, row in table.rows(lambda line, reason: rejected.append((line, reason))):
        try:
            found = reader.read(row, number)
            if not found:
                raise ValueError("there is no conversation in the row")
            conversation = found[0]
            yield Row(number, conversation.prompt, _gold(conversation, row), split)
        except ValueError as error:
            rejected.append((number, str(error)))


def _gold(conversation: Conversation, row: Mapping[str, Any]) -> str:
    reply, answer = conversation.reply, conversation.answer
    if answer is not None and not (isinstance(answer, str) and reply is not None and answer == reply["content"]):
        gold = gold_text(answer)
        return gold if isinstance(answer, list) else plain_number(final_answer(gold)) if "####" in gold else gold
    if reply is None:
        raise ValueError(f"there is no answer (there are: {', '.join(sorted(map(str, row)))})")
    return plain_number(final_answer(reply["content"]))
