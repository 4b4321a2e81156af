"""Look at a data set before a recipe is written for it: its columns, how its rows are read, whether answers can be judged.

In: a file, a folder or a hub id. Out: a `DataLook`. Only the first LOOKED rows are classified; rows and questions are counted in all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.conversations import Conversation, Reader, Table, is_table, open_table, splits_of
from distill.conversations.tables import of_dataset
from distill.errors import DataError, MachineError
from distill.models import hub as hubs
from distill.plug import nearest
from distill.recipe import TaskConfig
from distill.records import UserError
from distill.run.known_sizes import count_tokens
from distill.stages.context import find_data, make_task
from distill.stages.inputs.score_inputs import is_traces
from distill.tasks import hub_task, jsonl_task
from distill.tasks.judge.verdict import why_unreadable
from distill.tasks.problem_list import Judge

LOOKED = 2000
"""Rows that are classified."""
JUDGED_SHARE = 0.8
"""Answers are judged if at least this share of the rows has a short one."""
MATH_SHARE = 0.95
"""Answers are compared as mathematics if at least this share can be read so."""
LONGEST_ANSWER = 200
"""Characters of an answer that a judge is expected to compare."""
TRIED = 100
"""Distinct answers on which the judge of mathematics is tried."""
TESTS = ("tests", "test", "test_list", "test_cases", "unit_tests", "public_tests", "input_output")
"""Columns that hold the tests of a programming problem."""


class UnknownLayoutError(DataError):
    """The columns of a data set have to be named by hand."""


@dataclass(frozen=True, slots=True)
class DataLook:
    """What a data set holds.

    given: as the user named it. path: of a file or folder; None on the hub. splits: (to learn from, held out) of a hub data set or a
    folder that has both, else None. fields: columns named by hand. rows: in the split to learn from. rejected: why some of the rows
    looked at cannot be used. replies: share of rows with a reply that is not the data set's own solution. judge, why: how answers
    can be compared, and the reason. prompt_tokens, reply_tokens: of the longest of 20 rows in tokens, estimated; 0 without replies.
    examples: (question, reply, answer) of the first rows.
    """

    given: str
    path: Path | None
    splits: tuple[str, str] | None
    columns: tuple[str, ...]
    fields: Mapping[str, str]
    layout: str
    rows: int
    looked: int
    rejected: tuple[str, ...]
    replies: float
    judge: Judge
    why: str
    prompt_tokens: float
    reply_tokens: float
    examples: tuple[tuple[str, str, str], ...]

    def task(self, judge: str, template: str, path: str | None = None) -> dict[str, Any]:
        """Return the recipe's task for these questions. path: as the recipe writes it."""
        fields = {"fields": dict(self.fields)} if self.fields else {}
        if self.path is not None:
            return {"fn": "jsonl", "path": path or str(self.path), **fields, "judge": judge, "template": template}
        train, held_out = self.splits or ("train", "hash")
        return {
            "fn": "hub", "dataset": self.given, **fields, "train_split": train, "held_out_split": held_out, "judge": judge,
            "template": template,
        }  # fmt: skip

    def questions(self, judge: str) -> tuple[int, int]:
        """Return the number of distinct usable questions to learn from and held out. Raises UserError if there are none."""
        task = make_task("questions", TaskConfig.model_validate(self.task(judge, "direct")))
        counts = []
        for split in ("train", "held_out"):
            try:
                counts.append(sum(1 for _ in task.problems(split, None, 0)))
            except DataError:
                raise
            except UserError:
                counts.append(0)  # a split without problems
        return counts[0], counts[1]


@dataclass(slots=True)
class _Seen:
    """What the rows looked at hold."""

    conversations: list[Conversation] = field(default_factory=list)
    golds: list[str | None] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)
    columns: dict[str, None] = field(default_factory=dict)
    rows: int = 0
    looked: int = 0


def look_at(given: str, fields: Mapping[str, str] | None = None) -> DataLook:
    """Look at a data set. fields: columns by hand. Raises UserError with the columns there are if it cannot be read."""
    path, splits, table = _opened(given)
    fields = dict(fields or {})
    reader = Reader(fields, keep_wrong=True)
    seen = _read(table, reader, fields, given)
    if not seen.rows and not seen.rejected:
        raise DataError(f"{given}: has no rows.")
    if not seen.conversations:
        kind = DataError if fields or not seen.columns else UnknownLayoutError
        raise kind(f"{given}: no row can be used: {seen.rejected[0]}.")
    judge, why = _judge(seen)
    pairs = [(one.messages[: len(one.prompt)], one.reply) for one in seen.conversations]
    prompts = sorted(sum(count_tokens(str(m["content"])) for m in prompt) for prompt, _ in pairs)
    replies = sorted(
        count_tokens(f"{reply.get('reasoning_content', '')} {reply['content']}") for _, reply in pairs if reply
    )
    own = sum(one.reply is not None and not one.solution for one in seen.conversations)
    return DataLook(
        given=given,
        path=path,
        splits=splits,
        columns=tuple(seen.columns),
        fields=fields,
        layout=_read_as(reader.layout, seen),
        rows=seen.rows,
        looked=seen.looked,
        rejected=tuple(seen.rejected),
        replies=own / len(seen.conversations),
        judge=judge,
        why=why,
        prompt_tokens=_most(prompts),
        reply_tokens=_most(replies),
        examples=tuple(itertools.islice(_examples(seen), 2)),
    )


def _read_as(layout: str, seen: _Seen) -> str:
    """Name a layout by what its rows do hold."""
    if layout != "question and reply" or any(one.reply is not None for one in seen.conversations):
        return layout
    return "question and answer" if any(seen.golds) else "questions alone"


def _most(lengths: list[float]) -> float:
    """The length that one in twenty exceeds; 0 without any."""
    return lengths[min(int(0.95 * len(lengths)), len(lengths) - 1)] if lengths else 0.0


def _opened(given: str) -> tuple[Path | None, tuple[str, str] | None, Table]:
    path = find_data(given)
    if path is not None and is_traces(path):
        raise UserError(
            f"{given}: holds traces that a teacher wrote already. Name them as `data` of a train stage (`distill ls stages train`); "
            "`distill new` starts from questions or conversations."
        )
    if path is None:
        return _on_hub(given)
    if path.is_dir() and not is_table(path):
        raise DataError(f"{given}: the folder holds no data files (JSON lines, JSON, CSV, Parquet, Arrow).")
    table = open_table(path, given, jsonl_task.split_to_open(path))
    official = next((name for name in ("test", "validation") if name in splits_of(path)), None)
    return path, ("train", official) if official and "train" in splits_of(path) else None, table


def _on_hub(given: str) -> tuple[None, tuple[str, str], Table]:
    if given not in hub_task.KNOWN and (hubs.dataset_id(given) is None or given.startswith((".", "/", "~"))):
        parent = Path(given).expanduser().parent
        there = [str(parent / each.name) if parent != Path() else each.name for each in sorted(parent.glob("*"))]
        near = nearest(given, [name for name in there if Path(name).is_dir() or is_table(Path(name))][:20])
        raise UserError(f"{given}: no such file or folder (looked in {Path.cwd()}).{near}")
    source = hub_task.KNOWN.get(given, hub_task.Source(given))
    try:
        tables = hub_task.read_hub(source, "data")
    except MachineError as error:
        reason = str(error).partition(" cannot be loaded: ")[2].partition(". Without a network")[0]
        raise MachineError(
            f"{source.dataset}: is no file or folder here, and cannot be had as a data set of the hub ({reason}). Without a network name a file or "
            "a folder."
        ) from None
    train = next((name for name in (source.train_split, "train") if name in tables), None) or sorted(tables)[0]
    wanted = (source.held_out_split, "test", "validation")
    held_out = next((name for name in wanted if name and name in tables and name != train), "hash")
    return None, (train, held_out), of_dataset(given, tables[train])


def _read(table: Table, reader: Reader, fields: Mapping[str, str], given: str) -> _Seen:
    seen = _Seen()

    def reject(number: int, reason: str) -> None:
        seen.rejected.append(f"row {number}: {reason}")

    for number, row in table.rows(reject):
        seen.rows += 1
        if seen.rows > LOOKED:
            continue
        seen.looked += 1
        seen.columns |= dict.fromkeys(map(str, row))
        if seen.rows == 1:
            _check_columns(fields, row, given)
        try:
            found = reader.read(row, number)
        except ValueError as error:
            reject(number, str(error))
            continue
        if found:
            seen.conversations.append(found[0])
            seen.golds.append(_gold(found[0], row))
    return seen


def _check_columns(fields: Mapping[str, str], row: Mapping[str, Any], given: str) -> None:
    for part, column in fields.items():
        if column.partition(".")[0] not in row:
            raise UserError(f"{given}: there is no column {column!r} (for the {part}).{nearest(column, map(str, row))}")


def _gold(conversation: Conversation, row: Mapping[str, Any]) -> str | None:
    """Return the row's answer if it has one that stands apart: a column of its own, or marked in the reply."""
    reply = conversation.reply
    text = "" if reply is None else str(reply["content"])
    marked = "####" in text or "\\boxed" in text or "<answer>" in text
    if not marked and (conversation.answer is None or conversation.answer == text):
        return None
    try:
        return jsonl_task.gold_of(conversation, row)
    except ValueError:
        return None


def _judge(seen: _Seen) -> tuple[Judge, str]:
    short = [gold for gold in seen.golds if gold is not None and len(gold) <= LONGEST_ANSWER]
    if len(short) < JUDGED_SHARE * len(seen.golds):
        tests = next((name for name in TESTS if name in seen.columns), None)
        if tests is not None:
            return (
                "none",
                f"column {tests!r} looks like tests of programs, which a task of your own can run; no answer is judged",
            )
        if short:
            return "none", f"only {len(short)} of {len(seen.golds)} rows have a short answer"
        return "none", "the rows have no short answers to compare with"
    distinct = list(dict.fromkeys(short))[:TRIED]
    readable = sum(why_unreadable(gold) is None for gold in distinct)
    if readable >= MATH_SHARE * len(distinct):
        return "math", "answers are compared by what they mean: numbers, formulas, choices, words"
    return (
        "exact",
        f"{len(distinct) - readable} of {len(distinct)} answers are no mathematics, so all are compared as text",
    )


def _examples(seen: _Seen) -> Iterator[tuple[str, str, str]]:
    for conversation, gold in zip(seen.conversations, seen.golds, strict=True):
        question = str(next(m["content"] for m in reversed(conversation.prompt) if m["role"] == "user"))
        reply = conversation.reply
        text = "" if reply is None else f"{reply.get('reasoning_content') or ''} {reply['content']}".strip()
        yield question, text, gold or ""
