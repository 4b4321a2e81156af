"""Problems from a data file or a folder of data files, in any format and layout of `conversations`.

The gold answer is a row's answer column or, without one, the final answer of its reply. A row that cannot be used is rejected
with its number, never repaired. With `judge: none` a row needs a question only, and no completion is judged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from distill.conversations import Conversation, Reader, Table, is_table, open_table, splits_of
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
    template: templates.Given = "think_answer",
) -> FiniteTask:
    """Problems of a file (JSON lines, JSON, CSV, Parquet, ...) or a folder of such files, in any layout of `distill ls layouts`.

    held_out: "all" makes an evaluation set of it, with nothing to train on. judge: "none" needs no answers, and judges no
    completion. fields: columns of another layout by part, such as {question: a.b, answer: c}. A folder's split `test`, or
    else `validation`, is held out if there is one.
    """
    file = Path(path)
    if not file.is_file() and not (file.is_dir() and is_table(file)):
        reason = "the folder holds no data files." if file.is_dir() else f"no such file. {RULE}."
        raise UserError(f"tasks.{name}.path: {path!r}: {reason}")
    found = templates.find(template, f"tasks.{name}.template")
    by_hand = [repr(sorted(fields.items()))] if fields else []
    fingerprint = stable_hash("jsonl", _content(file), held_out, judge, *by_hand, *templates.fingerprint(found))
    where = f"tasks.{name}"
    return FiniteTask(
        name, found, fingerprint, judge, lambda: _load(name, file, held_out, judge, fields or {}, where), str(file)
    )


def _content(path: Path) -> str:
    if path.is_file():
        return file_hash(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return stable_hash(*(f"{file.relative_to(path)}={file_hash(file)}" for file in files))


def final_answer(text: str) -> str:
    r"""The answer that a worked solution ends in: after `####`, in the last tag or `\boxed{}`, or all of it."""
    rest = templates.after_thinking(text)
    return templates.ending(text if rest is None else rest)


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
    rows: list[Row] = []
    for table, split in _tables(path, f"{where}.path", held_out):
        rows += problems_of(table, fields, split, rejected, judged=judge != "none")
    return assemble(name, "jsonl", rows, judge, rejected)


def _tables(path: Path, where: str, held_out: HeldOut) -> Iterator[tuple[Table, Split | None]]:
    """Yield the tables of a file or folder, each with the split of its problems; None = by their content."""
    first = open_table(path, where, split_to_open(path))
    official = next((name for name in ("test", "validation") if name in first.splits), None)
    if held_out == "all" or official is None or "train" not in first.splits:
        yield first, "held_out" if held_out == "all" else None
        return
    yield first, "train"
    yield open_table(path, where, official), "held_out"


def split_to_open(path: Path) -> str:
    """The split of a folder that problems are read from first: `train`, or the only one."""
    splits = splits_of(path)
    return "train" if "train" in splits or not splits else splits[0]


def problems_of(
    table: Table, fields: Mapping[str, str], split: Split | None, rejected: Rejected, *, judged: bool = True
) -> Iterator[Row]:
    """Yield the problems of a data set's rows with their gold answers; others are added to `rejected`.

    judged: whether a row without an answer is rejected.
    """
    reader = Reader(fields, keep_wrong=True)
    for number, row in table.rows(lambda line, reason: rejected.append((line, reason))):
        try:
            found = reader.read(row, number)
            if not found:
                raise ValueError("there is no conversation in the row")
            conversation = found[0]
            yield Row(number, conversation.prompt, gold_of(conversation, row) if judged else None, split)
        except ValueError as error:
            rejected.append((number, str(error)))


def gold_of(conversation: Conversation, row: Mapping[str, Any]) -> str:
    """The gold answer of a row: its answer column, or the final answer of its reply. Raises ValueError if it has neither."""
    reply, answer = conversation.reply, conversation.answer
    if answer is not None and not (isinstance(answer, str) and reply is not None and answer == reply["content"]):
        gold = gold_text(answer)
        return gold if isinstance(answer, list) else plain_number(final_answer(gold)) if "####" in gold else gold
    if reply is None:
        raise ValueError(f"there is no answer (there are: {', '.join(sorted(map(str, row)))})")
    return plain_number(final_answer(reply["content"]))
