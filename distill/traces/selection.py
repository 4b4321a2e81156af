"""Run filters over traces and write the rows they keep: a selection, which a reader opens like a folder.

In: a folder of traces (or another selection). Out: a folder with `keep.parquet` (trace_id, shard, row),
`dropped.parquet` (trace_id, problem_id, the filters that dropped it) and `selection.json`: the source by a
relative path and its fingerprint, the filters with their options, and each filter's number of drops and reason.
Distributions are neither read nor copied.

Memory holds the light columns of problems whose traces have not all been read yet: few, because `generate` writes a
problem's traces together.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill import plug
from distill.files import write_atomic
from distill.recipe import PlugConfig
from distill.records import Array, Ragged, Traces, UserError
from distill.traces import codec, folder
from distill.traces.contamination import HeldOut
from distill.traces.reader import (
    KEEP_FILE,
    SELECTION_FILE,
    SELECTION_FORMAT,
    TraceReader,
    open_traces,
)
from distill.traces.schema import LIGHT_COLUMNS

FILTERS_MODULE = "distill.traces.filters"
DROPPED_FILE = "dropped.parquet"
NUM_SHOWN = 3
"""Trace ids listed for each filter; dropped.parquet has all of them."""


@dataclass(frozen=True, slots=True)
class FilterResult:
    """One filter's result.

    dropped: the number of traces it dropped; alone: of those, the number that no other filter dropped; first: the first
    few of the dropped ids.
    """

    fn: str
    options: dict[str, Any]
    why: str
    dropped: int
    alone: int
    first: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Selection:
    """The result of `select`: numbers of traces and problems, in total and kept, and each filter's result."""

    rows: int
    kept: int
    problems: int
    problems_kept: int
    filters: tuple[FilterResult, ...]

    def __str__(self) -> str:
        lines = [f"kept {self.kept:,} of {self.rows:,} traces, of {self.problems_kept:,} of {self.problems:,} problems"]
        for f in self.filters:
            named = f" ({', '.join(f.first)}{', …' if f.dropped > len(f.first) else ''})"
            lines.append(
                f"  {f.fn}: dropped {f.dropped:,} ({f.alone:,} dropped by no other filter): {f.why}{named if f.first else ''}"
            )
        return "\n".join(lines)


def select(
    source: str | Path,
    out: str | Path,
    keep: Sequence[PlugConfig],
    held_out: Callable[[str], HeldOut] | None = None,
) -> Selection:
    """Write the selection of the traces that every filter keeps.

    held_out: returns the evaluation set that a filter's option `against` names, for filters that take one as
    their second argument. Raises UserError for an unknown filter or option, a filter that does not return one flag a trace,
    and if nothing would be kept.
    """
    source, out = Path(source), Path(out)
    functions = [_bind(f, held_out) for f in keep]
    reader = open_traces(source)
    if out.resolve() in (reader.base.resolve(), source.resolve()):
        raise UserError(f"{out}: a selection cannot be written into the folder of its traces; name another folder.")
    num_problems = num_problems_kept = 0
    alone = np.zeros(len(keep), np.int64)
    kept: list[tuple[int, int, str]] = []
    dropped: list[tuple[str, str, Array]] = []
    for group in _traces_by_problem(reader):
        dropped_FN = ~_flags(functions, keep, group)
        alone += (dropped_FN & (dropped_FN.sum(0) == 1)).sum(1)
        num_problems += 1
        num_problems_kept += not dropped_FN.any(0).all()
        for row, dropped_F in zip(group, dropped_FN.T, strict=True):
            if dropped_F.any():
                dropped.append((row.trace_id, row.block.problem_id[row.n], dropped_F))
            else:
                kept.append((row.shard, row.number, row.trace_id))
    result = Selection(
        rows=reader.num_rows,
        kept=len(kept),
        problems=num_problems,
        problems_kept=num_problems_kept,
        filters=tuple(
            _filter_result(f, function, int(alone[i]), [row[0] for row in dropped if row[2][i]])
            for i, (f, function) in enumerate(zip(keep, functions, strict=True))
        ),
    )
    if not kept:
        raise UserError(f"{source}: the filters drop every trace, so there is nothing to select:\n{result}")
    files = [shard.file for shard in reader.shards]
    _write(out, source, reader.fingerprint, files, sorted(kept), dropped, result)
    return result


def filters_of(path: str | Path) -> tuple[str, ...]:
    """Return the names of the filters that chose the traces at a path, of all selections on the way; none for shards."""
    path = Path(path)
    if not (path / SELECTION_FILE).is_file():
        return ()
    tree = folder.read_json(path / SELECTION_FILE)
    return (*filters_of((path / tree["source"]).resolve()), *(each["fn"] for each in tree["filters"]))


def _bind(config: PlugConfig, held_out: Callable[[str], HeldOut] | None) -> Any:
    """Bind a filter to its options and, if it takes one, to the evaluation set."""
    where = f"keep.{config.fn}"
    function = plug.bind(config.fn, config.options, FILTERS_MODULE, where)
    if "held_out" not in inspect.signature(function).parameters:
        return function
    if held_out is None or not isinstance(config.options.get("against"), str):
        raise UserError(f"{where}.against: is required: a task of the recipe, or a JSONL file.")
    return functools.partial(function, held_out=held_out(config.options["against"]))


def _filter_result(config: PlugConfig, function: Any, alone: int, dropped: list[str]) -> FilterResult:
    return FilterResult(
        config.fn, config.options, _drop_reason(function), len(dropped), alone, tuple(dropped[:NUM_SHOWN])
    )


@dataclass(frozen=True, slots=True, eq=False)
class _TraceRow:
    """One trace: row `number` of a shard and row n of the block that was read."""

    shard: int
    number: int
    block: Traces
    n: int

    @property
    def trace_id(self) -> str:
        return self.block.trace_id[self.n]


def _traces_by_problem(reader: TraceReader) -> Iterator[list[_TraceRow]]:
    """Yield each problem's traces by sample, as soon as the last of them was read."""
    missing = Counter(
        problem for table in reader.tables(4096, ["problem_id"]) for problem in table.column("problem_id").to_pylist()
    )
    pending: dict[str, list[_TraceRow]] = defaultdict(list)
    for index, shard in enumerate(reader.shards):
        for numbers, table in reader.shard_tables(shard, 256, LIGHT_COLUMNS):
            block = codec.from_table(table, reader.metadata)
            for n, problem in enumerate(block.problem_id):
                pending[problem].append(_TraceRow(index, int(numbers[n]), block, n))
                missing[problem] -= 1
                if not missing[problem]:
                    rows = pending.pop(problem)
                    yield sorted(rows, key=lambda r: (int(r.block.sample[r.n]), r.shard, r.number))


def _flags(functions: Sequence[Any], keep: Sequence[PlugConfig], rows: list[_TraceRow]) -> Array:
    """Return the flags [F, N] of every filter on one problem's traces."""
    group = _as_traces(rows)
    flags_FN = np.empty((len(functions), len(rows)), bool)
    for i, (function, config) in enumerate(zip(functions, keep, strict=True)):
        flags = np.asarray(function(group))
        if flags.shape != (len(rows),) or flags.dtype != bool:
            raise UserError(
                f"keep.{config.fn}: a filter returns {len(rows)} booleans for {len(rows)} traces, "
                f"not {flags.dtype} of shape {flags.shape}."
            )
        flags_FN[i] = flags
    return flags_FN


def _as_traces(rows: list[_TraceRow]) -> Traces:
    def pick(name: str) -> list[Any]:
        return [getattr(row.block, name)[row.n] for row in rows]

    names = sorted({name for row in rows for name in row.block.rewards})
    num = len(rows)
    return Traces(
        trace_id=pick("trace_id"),
        problem_id=pick("problem_id"),
        sample=np.array(pick("sample"), np.int32),
        messages=pick("messages"),
        completion=pick("completion"),
        answer=pick("answer"),
        gold=pick("gold"),
        prompt_ids=Ragged.from_rows(pick("prompt_ids"), np.int64),
        completion_ids=Ragged.from_rows(pick("completion_ids"), np.int64),
        logprob=Ragged(np.empty(0, np.float32), np.zeros(num + 1, np.int64)),
        top=None,
        reward=pick("reward"),
        rewards={
            name: [row.block.rewards[name][row.n] if name in row.block.rewards else None for row in rows]
            for name in names
        },
        correct=pick("correct"),
        finish_reason=pick("finish_reason"),
    )


def _drop_reason(function: Any) -> str:
    """Return the reason for a filter's drops from its docstring: the line `Dropped:`, else the negation of its first line."""
    lines = [line.strip() for line in (getattr(function, "func", function).__doc__ or "").strip().splitlines()]
    for line in lines:
        if line.startswith("Dropped:"):
            return line.removeprefix("Dropped:").strip().rstrip(".")
    return f"not kept by: {lines[0].rstrip('.')}" if lines else ""


def _write(
    out: Path,
    source: Path,
    fingerprint: str,
    files: list[str],
    kept: list[tuple[int, int, str]],
    dropped: list[tuple[str, str, Array]],
    result: Selection,
) -> None:
    """Write the rows, then `selection.json`; an old one is removed first, so that an unfinished selection is not opened."""
    folder.make_folder(out)
    (out / SELECTION_FILE).unlink(missing_ok=True)
    kept_table = pa.table(
        {
            "trace_id": pa.array([trace_id for _, _, trace_id in kept]),
            "shard": pa.array([files[shard] for shard, _, _ in kept]),
            "row": pa.array([row for _, row, _ in kept], pa.int64()),
        }
    )
    names = [f.fn for f in result.filters]
    dropped_table = pa.table(
        {
            "trace_id": pa.array([trace_id for trace_id, _, _ in dropped], pa.string()),
            "problem_id": pa.array([problem_id for _, problem_id, _ in dropped], pa.string()),
            "by": pa.array(
                [[names[i] for i in np.flatnonzero(flags)] for _, _, flags in dropped],
                pa.list_(pa.string()),
            ),
        }
    )
    write_atomic(out / DROPPED_FILE, _parquet(dropped_table))
    data = _parquet(kept_table)
    write_atomic(out / KEEP_FILE, data)
    folder.write_json(
        out / SELECTION_FILE,
        {
            "format": SELECTION_FORMAT,
            "source": os.path.relpath(source.resolve(), out.resolve()),
            "source_fingerprint": fingerprint,
            "keep_sha256": folder.sha256(data),
            **asdict(result),
        },
    )


def _parquet(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()
