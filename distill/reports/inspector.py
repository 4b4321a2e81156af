"""The trace inspector: a sample of traces as one page, the teacher's distribution behind every token.

Comes in: columns of traces, the bytes of every token id used and, if asked for, a student's scores of the same
completions. Goes out: one HTML file that needs nothing else. Numbers travel as 16-bit thousandths of a nat in
byte planes, ids as places in a table of those used, all of it deflated; the page draws one trace at a time.
Left out on purpose: reading shards, tokenizers and engines (`stages/inspect`).

Shape suffixes: T positions, K teacher's entries, L student's entries, C candidates shown, E entries, flat.
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

from distill.records import NO_TAIL, Array, Completion, TopK, Traces
from distill.reports import tokens

MAX_BYTES = 5_000_000
WIDTHS = (8, 6, 4, 3, 2)
"""Teacher's candidates kept a position: the most that fit the page."""
STUDENT_EXTRA = 4
"""Candidates of the student's own that are shown beside the teacher's."""
QUANTUM = 1000
UNKNOWN = 65535


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One trace to be shown. `top`: the teacher's distribution; `student`: its scores of the same tokens."""

    trace_id: str
    problem_id: str
    sample: int
    messages: list[dict[str, str]]
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
    """What stands around the traces. facts: label and value. student: what the second model is called."""

    title: str
    facts: Sequence[tuple[str, str]] = ()
    student: str | None = None
    notes: Sequence[str] = ()


def rows_of(block: Traces, student: Mapping[str, Completion] = {}) -> list[Row]:
    """A block's traces as rows. student: scores by trace id."""
    return [
        Row(
            trace_id=trace_id,
            problem_id=block.problem_id[n],
            sample=int(block.sample[n]),
            messages=json.loads(block.messages[n]),
            prompt_ids=block.prompt_ids[n],
            ids_T=block.completion_ids[n],
            logprob_T=block.logprob[n],
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


def render(
    rows: Sequence[Row],
    bytes_of: Callable[[Sequence[int]], Sequence[bytes]],
    special: frozenset[int],
    page: Page,
    max_bytes: int = MAX_BYTES,
) -> str:
    """The page. bytes_of: token ids -> their bytes. special: ids of control tokens, which are dimmed.

    Of each position as many candidates are kept as `max_bytes` allows, and of the traces, from the first on, as many
    as then fit; where some are left out the page says so.
    """
    shown = [(row, _matched(row)) for row in rows]
    bytes_of = _remembering(bytes_of)
    while True:
        for width in WIDTHS:
            text = _html(_pack(shown, bytes_of, special, width), page, len(rows) - len(shown))
            if len(text) <= max_bytes:
                return text
        if len(shown) == 1:
            return text
        shown = shown[: max(1, int(len(shown) * 0.9 * max_bytes / len(text)))]


def _html(payload: bytes, page: Page, left_out: int) -> str:
    folder = resources.files("distill.reports") / "templates"
    script = (folder / "inspector.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("distill.reports"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: tokens.visible(value) if type(value) is str else value,
    )
    notes = list(page.notes)
    if left_out:
        notes.append(
            f"{left_out} more traces of the sample are left out: the page would be too large."
        )
    return environment.get_template("inspector.html.jinja").render(
        page=page,
        notes=notes,
        style=Markup((folder / "inspector.css").read_text(encoding="utf-8")),
        script=Markup(script),
        digest=digest,
        payload=base64.b64encode(payload).decode(),
    )


# ------------------------------------------------------------------------------------------------ numbers


def entropy(top: TopK) -> Array:
    """[T] entropy in nats of the stored entries and one outcome for all the rest: at most the full entropy."""
    position_E = np.repeat(np.arange(len(top)), top.count_T)
    logp_E, tail_T = top.logp_E.astype(np.float64), top.tail_T.astype(np.float64)
    head_T = np.bincount(position_E, -np.exp(logp_E) * logp_E, minlength=len(top))
    mass_T = np.exp(tail_T)
    return np.asarray(
        head_T - np.where(mass_T > NO_TAIL, mass_T * np.where(mass_T > 0, tail_T, 0), 0)
    )


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """What is shown at each position: count_T of them, flat; log-probabilities, nan where they are in the rest.

    teacher_rest_T, student_rest_T: log of the mass of all that is not shown.
    """

    count_T: Array
    ids_E: Array
    teacher_E: Array
    student_E: Array
    teacher_rest_T: Array
    student_rest_T: Array


@dataclass(frozen=True, slots=True, eq=False)
class Matched:
    """The teacher's first columns and the student's first few after them, each with both log-probabilities.

    ids_TC: -1 = no entry. rank_TC: a candidate's place among the teacher's entries. teacher_TC, student_TC: -inf where
    the model has not stored it. teacher_all_T, student_all_T: the mass of everything. kl_T: KL(teacher || student)
    over the entries that both have stored and one outcome for all the rest: a lower bound of the full KL.
    """

    ids_TC: Array
    rank_TC: Array
    teacher_TC: Array
    student_TC: Array
    teacher_all_T: Array
    student_all_T: Array
    kl_T: Array

    def candidates(self, width: int) -> Candidates:
        """The teacher's first `width` and those of the student's that are not among them."""
        column_C = np.arange(self.ids_TC.shape[1])
        wanted_TC = np.where(column_C < WIDTHS[0], column_C < width, self.rank_TC >= width)
        shown_TC = wanted_TC & (self.ids_TC >= 0)
        flat = [
            np.where(np.isneginf(values), np.nan, values)
            for values in (self.teacher_TC[shown_TC], self.student_TC[shown_TC])
        ]
        rest = [
            _log(all_T - np.where(shown_TC, np.exp(values), 0.0).sum(1))
            for all_T, values in (
                (self.teacher_all_T, self.teacher_TC),
                (self.student_all_T, self.student_TC),
            )
        ]
        return Candidates(shown_TC.sum(1), self.ids_TC[shown_TC], *flat, *rest)


def match(top: TopK, student: TopK | None) -> Matched:
    """Both models' stored entries of the same positions side by side; without a student all of its are unknown."""
    student = _nothing(len(top)) if student is None else student
    ids_TK, teacher_TK = top.dense(max(WIDTHS[0], int(top.count_T.max(initial=0))))
    own_TL, student_TL = student.dense(max(STUDENT_EXTRA, int(student.count_T.max(initial=0))))
    rank_TL, rank_TK = _ranks(own_TL, ids_TK), _ranks(ids_TK, own_TL)
    there_TK, back_TL = _taken(student_TL, rank_TK), _taken(teacher_TK, rank_TL)
    first, extra = slice(0, WIDTHS[0]), slice(0, STUDENT_EXTRA)
    own_rank_TK = np.broadcast_to(np.arange(ids_TK.shape[1]), ids_TK.shape)
    return Matched(
        ids_TC=np.concatenate([ids_TK[:, first], own_TL[:, extra]], 1),
        rank_TC=np.concatenate([own_rank_TK[:, first], rank_TL[:, extra]], 1),
        teacher_TC=np.concatenate([teacher_TK[:, first], back_TL[:, extra]], 1).astype(np.float64),
        student_TC=np.concatenate([there_TK[:, first], student_TL[:, extra]], 1).astype(np.float64),
        teacher_all_T=_mass(top, teacher_TK),
        student_all_T=_mass(student, student_TL),
        kl_T=_kl(top, student, teacher_TK, there_TK, student_TL, back_TL),
    )


def _nothing(positions: int) -> TopK:
    """A distribution of which nothing is known."""
    return TopK(
        np.zeros(positions, np.int32),
        np.empty(0, np.int64),
        np.empty(0, np.float32),
        np.full(positions, -np.inf, np.float32),
    )


def _ranks(ids_TA: Array, among_TB: Array) -> Array:
    """[T, A] the column of `among` that holds each id at the same position; B where none does."""
    position_T = np.arange(len(ids_TA))[:, None]
    keys = (position_T << 32) + among_TB
    order = np.argsort(keys, axis=None, kind="stable")
    ordered = keys.ravel()[order]
    wanted = (position_T << 32) + ids_TA
    found = np.minimum(np.searchsorted(ordered, wanted), max(len(ordered) - 1, 0))
    hit = (ids_TA >= 0) & (ordered[found] == wanted) if len(ordered) else ids_TA < -1
    return np.asarray(np.where(hit, order[found] % among_TB.shape[1], among_TB.shape[1]))


def _taken(values_TB: Array, rank_TA: Array) -> Array:
    """[T, A] values at the ranks; -inf where there is none."""
    padded = np.concatenate([values_TB, np.full((len(values_TB), 1), -np.inf)], 1)
    return np.asarray(np.take_along_axis(padded, rank_TA, 1))


def _mass(top: TopK, logp_TK: Array) -> Array:
    return np.asarray(
        np.exp(logp_TK.astype(np.float64)).sum(1) + np.exp(top.tail_T.astype(np.float64))
    )


def _kl(
    top: TopK, student: TopK, teacher_TK: Array, there_TK: Array, student_TL: Array, back_TL: Array
) -> Array:
    """[T] sum p log(p/q) over the shared entries, and the rest of both sides as one outcome."""
    shared_TK = ~np.isneginf(there_TK) & ~np.isneginf(teacher_TK)
    p_TK = np.where(shared_TK, np.exp(teacher_TK.astype(np.float64)), 0.0)
    with np.errstate(invalid="ignore"):
        head_T = np.where(shared_TK, p_TK * (teacher_TK.astype(np.float64) - there_TK), 0.0).sum(1)
    only_p_T = np.where(shared_TK, 0.0, np.exp(teacher_TK)).sum(1)
    only_q_T = np.where(np.isneginf(back_TL), np.exp(student_TL), 0.0).sum(1)
    p_T = only_p_T + np.exp(top.tail_T.astype(np.float64))
    q_T = np.maximum(only_q_T + np.exp(student.tail_T.astype(np.float64)), 1e-12)
    rest_T = np.where(p_T > NO_TAIL, p_T * (np.log(np.maximum(p_T, 1e-300)) - np.log(q_T)), 0.0)
    return np.asarray(np.maximum(head_T + rest_T, 0.0))


def _log(mass_T: Array) -> Array:
    """Log of a mass; masses within rounding of none are none."""
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(np.where(mass_T > NO_TAIL, mass_T, 0.0)))


# ------------------------------------------------------------------------------------------------ packing


@dataclass(slots=True)
class _Columns:
    """What the page's arrays are made of, a list entry a trace."""

    ids: list[Array] = field(default_factory=list)
    surprise: list[Array] = field(default_factory=list)
    entropy: list[Array] = field(default_factory=list)
    count: list[Array] = field(default_factory=list)
    cand_ids: list[Array] = field(default_factory=list)
    cand_teacher: list[Array] = field(default_factory=list)
    cand_student: list[Array] = field(default_factory=list)
    rest: list[Array] = field(default_factory=list)
    student_rest: list[Array] = field(default_factory=list)
    student_surprise: list[Array] = field(default_factory=list)
    kl: list[Array] = field(default_factory=list)


def _remembering(
    bytes_of: Callable[[Sequence[int]], Sequence[bytes]],
) -> Callable[[Sequence[int]], Sequence[bytes]]:
    """The same, asked once for each id."""
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
    """Header length, header (JSON), arrays in byte planes; deflated."""
    columns = _Columns()
    for row, matched in rows:
        _add(columns, row, matched, width)
    used = np.unique(np.concatenate([np.empty(0, np.int64), *columns.ids, *columns.cand_ids]))
    pieces = dict(zip(used.tolist(), bytes_of(used.tolist()), strict=True))
    header: dict[str, Any] = {
        "table": [tokens.shown(pieces[i]) or f"‹{i}›" for i in pieces],
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
        parts += [
            ((numbers >> 8 * plane) & 255).astype(np.uint8).tobytes() for plane in range(num_planes)
        ]
    head = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    return packer.compress(b"".join([struct.pack("<I", len(head)), head, *parts])) + packer.flush()


_POSITIVE = ("entropy", "kl")


def _quantised(values: Array) -> Array:
    """Nats as thousandths; UNKNOWN for nan and for what is beyond 65 nats (no mass at all)."""
    scaled = np.rint(np.asarray(values, np.float64) * QUANTUM)
    return np.where(scaled < UNKNOWN, np.maximum(scaled, 0), UNKNOWN).astype(np.int64)


def _add(columns: _Columns, row: Row, matched: Matched | None, width: int) -> None:
    columns.ids.append(np.asarray(row.ids_T, np.int64))
    columns.surprise.append(row.logprob_T)
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
        columns.student_surprise.append(row.student.logprob_T)
        columns.kl.append(matched.kl_T)


def _trace(
    row: Row, bytes_of: Callable[[Sequence[int]], Sequence[bytes]], pieces: Mapping[int, bytes]
) -> dict[str, Any]:
    prompt = b"".join(bytes_of(row.prompt_ids.tolist()))
    spelled = [pieces[i] for i in row.ids_T.tolist()]
    return {
        "id": row.trace_id,
        "problem": row.problem_id,
        "sample": row.sample,
        "question": tokens.visible(row.messages[-1]["content"]) if row.messages else "",
        "prompt": tokens.shown(prompt),
        "answer": None if row.answer is None else tokens.visible(row.answer),
        "gold": None if row.gold is None else tokens.visible(row.gold),
        "correct": row.correct,
        "finish": row.finish_reason,
        "rewards": {
            name: value
            for name, value in row.rewards.items()
            if value is not None and math.isfinite(value)
        },
        "tokens": len(row.ids_T),
        "thinking": thinking(prompt, spelled),
        "completed": tokens.completed(spelled),
    }


def thinking(prompt: bytes, spelled: Sequence[bytes]) -> int:
    """How many of the first tokens are reasoning: up to the last </think>; all where one was opened and never
    closed, by the prompt or the completion; none where there is no mark."""
    joined = b"".join(spelled)
    end = joined.rfind(b"</think>")
    if end < 0:
        opened = b"<think>" in joined or prompt.rstrip().endswith(b"<think>")
        return len(spelled) if opened else 0
    reach = np.cumsum([len(piece) for piece in spelled])
    return int(np.searchsorted(reach, end + len(b"</think>")) + 1)
