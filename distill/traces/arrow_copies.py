"""Copies of shards as Arrow files, so that single rows of them can be read: of a Parquet shard only all of it can be decoded.

A copy holds the rows of one shard in the columns of `batches.TraceRow`, with texts and verdicts; log-probabilities are float32. It
is mapped into memory, never loaded. It lies in the cache folder under the shard's SHA-256, so that folders,
selections and the workers of a DataLoader share it, and it may be removed at any time. Its size is about that of the decoded
columns: 8 bytes an entry of a distribution.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distill.files import cache_home, room_for
from distill.records import Array, Ragged, Traces
from distill.tail_draws import weights
from distill.traces import folder, prompts
from distill.traces.reader import TraceReader, checked_source
from distill.traces.schema import Metadata

ROWS = 16
"""Rows of a record batch."""
FORMAT = "2"
"""Changed with the columns below; copies of another format are not read."""

TEXTS = ("trace_id", "problem_id", "completion", "answer", "gold", "finish_reason")


def open_copy(reader: TraceReader, shard: folder.Shard) -> pa.Table:
    """Return all rows of a shard as a table that is mapped into memory; its copy is made if there is none.

    Raises DataError if the shard is damaged or missing, whether it has a copy or not; MachineError if the disk is full.
    """
    path = copy_of(reader, shard)
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_stream(source).read_all()


def copy_of(reader: TraceReader, shard: folder.Shard) -> Path:
    """Return the path of a shard's copy, which is made if there is none. Raises as `open_copy`."""
    import filelock

    checked_source(reader.base / shard.file, shard, whole=False).close()
    path = cache_home() / "traces" / f"{shard.sha256[:40]}-{FORMAT}.arrow"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_suffix(".lock")):
        if not path.is_file():
            _write(dataclasses.replace(reader, shards=(shard,), selected=None), path)
    return path


def _write(reader: TraceReader, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with room_for(path), pa.OSFile(str(temporary), "wb") as sink:
            writer = None
            for block in reader.blocks(ROWS):
                table = table_of(block, reader.metadata)
                writer = writer or pa.ipc.new_stream(sink, table.schema)
                writer.write_table(table)
            if writer is not None:
                writer.close()
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def table_of(block: Traces, metadata: Metadata) -> pa.Table:
    """Convert a block to a table; messages are the whole conversation, as in the shards."""
    columns: dict[str, Any] = {name: pa.array(getattr(block, name), pa.string()) for name in TEXTS}
    columns["sample"] = pa.array(np.asarray(block.sample, np.int32))
    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    columns["messages"] = pa.array(
        [[dict(turn) for turn in prompts.whole(row, metadata.prompt)] for row in block.messages], pa.list_(turn)
    )
    columns["prompt_ids"] = _lists(block.prompt_ids)
    columns["completion_ids"] = _lists(block.completion_ids)
    # An endpoint that gives text alone has no log-probabilities.
    columns["logprob"] = _lists(block.logprob, block.logprob.lengths != block.completion_ids.lengths)
    positions = block.completion_ids.offsets
    for prefix, entries in (("top", block.top), ("draw", block.draws)):
        if entries is not None:
            columns[f"{prefix}_count"] = _lists(Ragged(entries.count_T, positions))
            columns[f"{prefix}_ids"] = _lists(Ragged(entries.ids_E, entries.offsets[positions]))
            columns[f"{prefix}_logprobs"] = _lists(Ragged(entries.logp_E, entries.offsets[positions]))
    if block.top is not None:
        columns["tail_logprob"] = _lists(Ragged(block.top.tail_T, positions))
        if block.draws is not None:
            columns["draw_mass"] = _lists(Ragged(weights(block.top.tail_T, metadata.tail_draws), positions))
    columns["reward"] = pa.array(block.reward, pa.float64())
    named = pa.struct([("name", pa.string()), ("value", pa.float64())])
    rewards = [[{"name": n, "value": row[i]} for n, row in block.rewards.items()] for i in range(len(block))]
    columns["rewards"] = pa.array(rewards, pa.list_(named))
    columns["correct"] = pa.array(block.correct, pa.bool_())
    return pa.table(columns)


def _lists(rows: Ragged, missing: Array | None = None) -> pa.Array:
    """Rows as lists. missing: rows that are null."""
    mask = None if missing is None or not missing.any() else pa.array(missing)
    values = np.asarray(rows.values, np.float32 if rows.values.dtype.kind == "f" else None)
    return pa.ListArray.from_arrays(pa.array(np.asarray(rows.offsets, np.int32)), pa.array(values), mask=mask)


def row_of(table: pa.Table, row: int) -> dict[str, Any]:
    """Return one row: lists of numbers as numpy arrays, the rest as Python values."""
    found: dict[str, Any] = {}
    for name, column in zip(table.column_names, table.slice(row, 1).columns, strict=True):
        array = column.chunk(0)
        is_numbers = pa.types.is_list(array.type) and not pa.types.is_struct(array.type.value_type)
        found[name] = array.flatten().to_numpy() if is_numbers and array.null_count == 0 else array[0].as_py()
    return found
