"""Build the trace page: a sample of traces with the teacher's distribution at every token.

Input: traces, a function from token ids to bytes and, optionally, a student's scores of the same completions. Output: one
self-contained HTML file. Log-probabilities are stored as 16-bit integers (thousandths of a nat) in byte planes, token ids
as indices into a table of those used, and all of it is compressed; the page draws one trace at a time. Shards, tokenizers
and engines are opened in `distill.tools.inspect`.

Shape suffixes: T positions, E entries, flat.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from distill.inspector import token_text
from distill.inspector.sections import thinking
from distill.inspector.top_tokens import TEACHER_COLUMNS, Matched, entropy, match
from distill.records import Array, Completion, Messages, TopK, Traces

MAX_BYTES = 5_000_000
"""Maximum size of a page."""
WIDTHS = (TEACHER_COLUMNS, 6, 4, 3, 2)
"""Numbers of teacher's candidates per position; the largest that fits MAX_BYTES is used."""
QUANTUM = 1000
"""Stored integers per nat."""
UNKNOWN = 65535
"""The stored integer for unknown values and for 65 nats or more."""


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """A trace to show. top: the teacher's distributions. student: the student's scores of the same tokens."""

    trace_id: str
    problem_id: str
    sample: int
    messages: Messages
    prompt_ids: Array
    ids_T: Array
    logprob_T: Array
    top: TopK | None
    answer: str | None
    gold: str | None
    correct: bool | None
    finish_reason: str
    rewards: Mapping[str, float | None]
    student: Completion | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """The page around the traces. facts: (label, value) pairs of its header. student: the name of the second model."""

    title: str
    facts: Sequence[tuple[str, str]] = ()
    student: str | None = None
    notes: Sequence[str] = ()


def rows_of(block: Traces, student: Mapping[str, Completion] = {}) -> list[Row]:
    """The traces of a block as rows. student: scores by trace id."""
    return [
        Row(
            trace_id=trace_id,
            problem_id=block.problem_id[n],
            sample=int(block.sample[n]),
            messages=block.messages[n],
            prompt_ids=block.prompt_ids[n],
            ids_T=block.completion_ids[n],
            logprob_T=_known(block.logprob[n], len(block.completion_ids[n])),
            top=block.top_of(n),
            answer=block.answer[n],
            gold=block.gold[n],
            correct=block.correct[n],
            finish_reason=block.finish_reason[n],
            rewards={name: column[n] for name, column in block.rewards.items()},
            student=student.get(trace_id),
        )
        for n, trace_id in enumerate(block.trace_id)
    ]


def _known(logprob_T: Array, num: int) -> Array:
    """Log-probabilities of `num` tokens; nan where an endpoint gave none."""
    return logprob_T if len(logprob_T) == num else np.full(num, np.nan, np.float32)


def render(
    rows: Sequence[Row],
    bytes_of: Callable[[Sequence[int]], Sequence[bytes]],
    special: frozenset[int],
    page: Page,
    max_bytes: int = MAX_BYTES,
) -> str:
    """Return the page as HTML. bytes_of: token ids -> their bytes. special: ids of control tokens, shown dimmed.

    If the page exceeds `max_bytes`, fewer candidates per position are stored, and then fewer traces; the page says how
    many are left out.
    """
    shown = [(row, _matched(row)) for row in rows]
    bytes_of = _cached(bytes_of)
    while True:
        for width in WIDTHS:
            text = _html(_pack(shown, bytes_of, special, width), page, len(rows) - len(shown))
            if len(text) <= max_bytes:
                return text
        if len(shown) == 1:
            return text
        shown = shown[: max(1, int(len(shown) * 0.9 * max_bytes / len(text)))]


def _html(payload: bytes, page: Page, left_out: int) -> str:
    folder = resources.files("distill.inspector") / "templates"
    script = (folder / "inspector.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("distill.inspector"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: token_text.visible(value) if type(value) is str else value,
    )
    notes = list(page.notes)
    if left_out:
        notes.append(f"{left_out} more traces of the sample are left out, because the page would be too large.")
    return environment.get_template("inspector.html.jinja").render(
        page=page,
        notes=notes,
        style=Markup((folder / "inspector.css").read_text(encoding="utf-8")),
        script=Markup(script),
        digest=digest,
        payload=base64.b64encode(payload).decode(),
    )


# ------------------------------------------------------------------------------------------------ packing


@dataclass(slots=True)
class _Columns:
    """The arrays of the page, each as a list with one array per trace."""

    ids: list[Array] = field(default_factory=list)
    nll: list[Array] = field(default_factory=list)
    entropy: list[Array] = field(default_factory=list)
    count: list[Array] = field(default_factory=list)
    cand_ids: list[Array] = field(default_factory=list)
    cand_teacher: list[Array] = field(default_factory=list)
    cand_student: list[Array] = field(default_factory=list)
    rest: list[Array] = field(default_factory=list)
    student_rest: list[Array] = field(default_factory=list)
    student_nll: list[Array] = field(default_factory=list)
    kl: list[Array] = field(default_factory=list)


def _cached(
    bytes_of: Callable[[Sequence[int]], Sequence[bytes]],
) -> Callable[[Sequence[int]], Sequence[bytes]]:
    """`bytes_of` with a cache: each id is converted once."""
    known: dict[int, bytes] = {}

    def read(ids: Sequence[int]) -> list[bytes]:
        missing = sorted({i for i in ids if i not in known})
        known.update(zip(missing, bytes_of(missing), strict=True))
        return [known[i] for i in ids]

    return read


def _matched(row: Row) -> Matched | None:
    if row.top is None:
        return None
    return match(row.top, row.student.top if row.student is not None else None)


def _pack(
    rows: Sequence[tuple[Row, Matched | None]],
    bytes_of: Callable[[Sequence[int]], Sequence[bytes]],
    special: frozenset[int],
    width: int,
) -> bytes:
    """The page's data, gzip-compressed: header length, header (JSON), arrays in byte planes."""
    columns = _Columns()
    for row, matched in rows:
        _add(columns, row, matched, width)
    used = np.unique(np.concatenate([np.empty(0, np.int64), *columns.ids, *columns.cand_ids]))
    pieces = dict(zip(used.tolist(), bytes_of(used.tolist()), strict=True))
    header: dict[str, Any] = {
        "table": [token_text.shown(pieces[i]) or f"‹{i}›" for i in pieces],
        "table_ids": used.tolist(),
        "special": [n for n, i in enumerate(pieces) if i in special],
        "quantum": QUANTUM,
        "unknown": UNKNOWN,
        "traces": [_trace(row, bytes_of, pieces) for row, _ in rows],
        "width": width,
        "arrays": {},
    }
    parts: list[bytes] = []
    planes = 2 if len(used) < 65536 else 3
    for name in _Columns.__dataclass_fields__:
        arrays = getattr(columns, name)
        if not arrays:
            continue
        values = np.concatenate(arrays)
        if name in ("ids", "cand_ids"):
            numbers, num_planes = np.searchsorted(used, values), planes
        elif name == "count":
            numbers, num_planes = values, 1
        else:
            numbers, num_planes = _quantised(-values if name not in _POSITIVE else values), 2
        header["arrays"][name] = [num_planes, len(numbers)]
        parts += [((numbers >> 8 * plane) & 255).astype(np.uint8).tobytes() for plane in range(num_planes)]
    head = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    return packer.compress(b"".join([struct.pack("<I", len(head)), head, *parts])) + packer.flush()


_POSITIVE = ("entropy", "kl")


def _quantised(values: Array) -> Array:
    """Nats as integers of 1/QUANTUM; UNKNOWN for nan and for values that do not fit (65 nats or more)."""
    scaled = np.rint(np.asarray(values, np.float64) * QUANTUM)
    return np.where(scaled < UNKNOWN, np.maximum(scaled, 0), UNKNOWN).astype(np.int64)


def _add(columns: _Columns, row: Row, matched: Matched | None, width: int) -> None:
    columns.ids.append(np.asarray(row.ids_T, np.int64))
    columns.nll.append(row.logprob_T)
    if row.top is None or matched is None:
        return
    columns.entropy.append(entropy(row.top))
    found = matched.candidates(width)
    columns.count.append(found.count_T)
    columns.cand_ids.append(found.ids_E)
    columns.cand_teacher.append(found.teacher_E)
    columns.rest.append(found.teacher_rest_T)
    if row.student is not None:
        columns.cand_student.append(found.student_E)
        columns.student_rest.append(found.student_rest_T)
        columns.student_nll.append(row.student.logprob_T)
        columns.kl.append(matched.kl_T)


def _trace(
    row: Row, bytes_of: Callable[[Sequence[int]], Sequence[bytes]], pieces: Mapping[int, bytes]
) -> dict[str, Any]:
    prompt = b"".join(bytes_of(row.prompt_ids.tolist()))
    spelled = [pieces[i] for i in row.ids_T.tolist()]
    sections, completed = thinking(prompt, spelled), token_text.completed(spelled)
    return {
        "id": row.trace_id,
        "problem": row.problem_id,
        "sample": row.sample,
        "question": token_text.visible(row.messages[-1]["content"]) if row.messages else "",
        "prompt": token_text.shown(prompt),
        "answer": None if row.answer is None else token_text.visible(row.answer),
        "gold": None if row.gold is None else token_text.visible(row.gold),
        "correct": row.correct,
        "finish": row.finish_reason,
        "rewards": {name: value for name, value in row.rewards.items() if value is not None and math.isfinite(value)},
        "tokens": len(row.ids_T),
        "thinking": sections.tokens,
        "split": None if sections.tokens - 1 in completed else sections.split,
        "completed": completed,
    }
