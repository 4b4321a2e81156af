"""Runs filters over traces and writes which rows they keep: a selection, which a reader opens like a folder.

In: a folder of traces (or another selection). Out: a folder with `keep.parquet` (trace_id, shard, row) and
`selection.json`: the source by a relative path and its fingerprint, the filters with their options, and what
each dropped and why. Distributions are neither read nor copied.

Memory holds the light columns of the problems whose traces have not all been seen yet: a few, where a
problem's traces lie together, as `generate` writes them.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill import plug
from distill.recipe import PlugConfig
from distill.records import Array, Ragged, Traces, UserError
from distill.traces import codec, folder
from distill.traces.reader import (
    KEEP_FILE,
    SELECTION_FILE,
    SELECTION_FORMAT,
    TraceReader,
    open_traces,
)
from distill.traces.schema import LIGHT_COLUMNS

HOME = "distill.traces.filters"


@dataclass(frozen=True, slots=True)
class Dropped:
    """What one filter did. dropped: traces it refused; alone: those that no other filter refused."""

    fn: str
    options: dict[str, Any]
    why: str
    dropped: int
    alone: int


@dataclass(frozen=True, slots=True)
class Selection:
    rows: int
    kept: int
    problems: int
    problems_kept: int
    filters: tuple[Dropped, ...]

    def __str__(self) -> str:
        lines = [
            f"kept {self.kept:,} of {self.rows:,} traces, of {self.problems_kept:,} of {self.problems:,} problems"
        ]
        lines += [
            f"  {f.fn}: dropped {f.dropped:,} ({f.alone:,} that only it dropped): {f.why}"
            for f in self.filters
        ]
        return "\n".join(lines)


def select(source: str | Path, out: str | Path, keep: Sequence[PlugConfig]) -> Selection:
    """Write the selection of the traces that every filter keeps.

    Raises UserError for an unknown filter or option, a filter whose answer is not a flag a trace, and when
    nothing would be kept.
    """
    source, out = Path(source), Path(out)
    functions = [plug.bind(f.fn, f.options, HOME, f"keep.{f.fn}") for f in keep]
    reader = open_traces(source)
    if out.resolve() in (reader.base.resolve(), source.resolve()):
        raise UserError(f"{out}: a selection is written beside the traces, not into their folder.")
    num_problems = num_problems_kept = 0
    dropped, alone = np.zeros(len(keep), np.int64), np.zeros(len(keep), np.int64)
    kept: list[tuple[int, int, str]] = []
    for group in _groups(reader):
        refused_FN = ~_flags(functions, keep, group)
        dropped += refused_FN.sum(1)
        alone += (refused_FN & (refused_FN.sum(0) == 1)).sum(1)
        passed = [group[int(n)] for n in np.flatnonzero(~refused_FN.any(0))]
        kept += [(row.shard, row.number, row.block.trace_id[row.n]) for row in passed]
        num_problems += 1
        num_problems_kept += bool(passed)
    result = Selection(
        rows=reader.num_rows,
        kept=len(kept),
        problems=num_problems,
        problems_kept=num_problems_kept,
        filters=tuple(
            Dropped(f.fn, f.options, _why(function), int(dropped[i]), int(alone[i]))
            for i, (f, function) in enumerate(zip(keep, functions, strict=True))
        ),
    )
    if not kept:
        raise UserError(f"{source}: no trace is left, so there is nothing to select:\n{result}")
    files = [shard.file for shard in reader.shards]
    _write(out, source, reader.fingerprint, files, sorted(kept), result)
    return result


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    """Row `number` of a shard, which is row n of a block that was read."""

    shard: int
    number: int
    block: Traces
    n: int


def _groups(reader: TraceReader) -> Iterator[list[_Row]]:
    """Each problem's traces by sample, as soon as the last of them was read."""
    missing = Counter(
        problem
        for table in reader.tables(4096, ["problem_id"])
        for problem in table.column("problem_id").to_pylist()
    )
    pending: dict[str, list[_Row]] = defaultdict(list)
    for index, shard in enumerate(reader.shards):
        for numbers, table in reader.shard_tables(shard, 256, LIGHT_COLUMNS):
            block = codec.from_table(table, reader.metadata)
            for n, problem in enumerate(block.problem_id):
                pending[problem].append(_Row(index, int(numbers[n]), block, n))
                missing[problem] -= 1
                if not missing[problem]:
                    rows = pending.pop(problem)
                    yield sorted(rows, key=lambda r: (int(r.block.sample[r.n]), r.shard, r.number))


def _flags(functions: Sequence[Any], keep: Sequence[PlugConfig], rows: list[_Row]) -> Array:
    """[F, N] of every filter on one problem's traces."""
    group = _gather(rows)
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


def _gather(rows: list[_Row]) -> Traces:
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
            name: [
                row.block.rewards[name][row.n] if name in row.block.rewards else None
                for row in rows
            ]
            for name in names
        },
        correct=pick("correct"),
        finish_reason=pick("finish_reason"),
    )


def _why(function: Any) -> str:
    doc = getattr(function, "func", function).__doc__ or ""
    return doc.strip().split("\n")[0].rstrip(".")


def _write(
    out: Path,
    source: Path,
    fingerprint: str,
    files: list[str],
    kept: list[tuple[int, int, str]],
    result: Selection,
) -> None:
    """The rows first, `selection.json` last; a stale one goes before, so that half a selection is none."""
    out.mkdir(parents=True, exist_ok=True)
    (out / SELECTION_FILE).unlink(missing_ok=True)
    table = pa.table(
        {
            "trace_id": pa.array([trace_id for _, _, trace_id in kept]),
            "shard": pa.array([files[shard] for shard, _, _ in kept]),
            "row": pa.array([row for _, row, _ in kept], pa.int64()),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    data = sink.getvalue()
    folder.write_whole(out / KEEP_FILE, data)
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
