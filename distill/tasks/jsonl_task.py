"""Problems from a file of JSON lines.

A row is `{"question", "answer"}`, `{"messages": [..., user], "answer"}` or `{"messages": [..., assistant]}`,
whose last message holds the answer. What cannot be used is rejected with its line number, never repaired.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from distill.jsonl import conversation, read_rows, text_field
from distill.models import file_hash
from distill.records import UserError, stable_hash
from distill.tasks import templates
from distill.tasks.problem_list import FiniteTask, Judge, Loaded, Rejected, Row, assemble

HeldOut = Literal["hash", "all"]


def jsonl(
    name: str,
    *,
    path: str,
    held_out: HeldOut = "hash",
    judge: Judge = "math",
    template: str = "think_answer",
) -> FiniteTask:
    """Problems of a JSONL file. `held_out: all` makes an evaluation set of it, with nothing to train on."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"tasks.{name}.path: {path!r}: no such file.")
    found = templates.find(template, f"tasks.{name}.template")
    fingerprint = stable_hash("jsonl", file_hash(file), held_out, judge, *templates.fingerprint(found))
    return FiniteTask(name, found, fingerprint, judge, lambda: _load(name, file, held_out, judge), str(file))


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
    if not isinstance(value, str):
        keys = f" with the keys {', '.join(map(str, value))}" if isinstance(value, dict) else ""
        raise ValueError(f"the answer is {type(value).__name__}{keys}, not a text, a number or a list of them")
    if not value.strip():
        raise ValueError("the answer is empty")
    return value


def plain_number(answer: str) -> str:
    """Without the commas of a grouped integer, which a gold answer cannot mean as a list."""
    grouped = re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?", answer)
    return answer.replace(",", "") if grouped else answer


def _load(name: str, path: Path, held_out: HeldOut, judge: Judge) -> Loaded:
    rows: list[Row] = []
    rejected: Rejected = []
    for number, row in read_rows(path, lambda line, reason: rejected.append((line, reason))):
        try:
            rows.append(_row(number, row, held_out))
        except ValueError as error:
            rejected.append((number, str(error)))
    return assemble(name, "jsonl", rows, judge, rejected)


def _row(number: int, row: dict[str, Any], held_out: HeldOut) -> Row:
    messages, reply = conversation(row)
    if "answer" in row or reply is None:
        if "answer" not in row:
            text_field(row, "answer")  # says which keys there are
        answer = gold_text(row["answer"])
    else:
        answer = final_answer(reply)
    return Row(number, messages, answer, "held_out" if held_out == "all" else None)
