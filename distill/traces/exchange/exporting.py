"""Write a folder of traces in the format of another program, streamed a block at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from distill.errors import UserError
from distill.files import write_atomic
from distill.traces import folder
from distill.traces.exchange import axolotl, distillkit, distillkit_codec, trl
from distill.traces.reader import TraceReader, open_traces

STYLES: Final = ("distillkit", "axolotl", "trl")
_ROWS: Final = 64
"""Traces encoded at a time."""
_READ: Final = ("prompt_ids", "completion_ids", "top_count", "top_ids", "top_logprobs", "tail_logprob")


def export(source: str | Path, out: str | Path, style: str) -> int:
    """Write traces as `style`; return their number.

    distillkit: `out` is a folder of Parquet files with compression_config.yaml. axolotl, trl: a file, .parquet or .jsonl.
    Raises UserError for another name, and for traces that the format cannot hold.
    """
    reader, out = open_traces(source), Path(out)
    if style != "trl" and not reader.metadata.top_k:
        raise UserError(
            f"{source}: the traces hold no distributions (top_logprobs 0), and {style} is a format for them. Export them as chat, text or trl."
        )
    if style == "distillkit":
        return _distillkit(reader, out)
    if style == "axolotl":
        width = reader.metadata.top_k
        tables = (axolotl.table(block, width) for block in reader.blocks(_ROWS, _READ))
        return _file(tables, axolotl.SCHEMA, out)
    tables = (trl.table(block, reader.metadata.prompt) for block in reader.tables(_ROWS, trl.COLUMNS))
    return _file(tables, trl.SCHEMA, out)


def _distillkit(reader: TraceReader, out: Path) -> int:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already and is not an empty folder; name a new one.")
    folder.make_folder(out)
    config = distillkit_codec.exact_config(reader.metadata.vocab_size, reader.metadata.top_k)
    num, files = 0, 0
    blocks = reader.blocks(_ROWS, _READ)
    while True:
        part = (distillkit.table(block, config) for block in blocks)
        written = _parquet(part, distillkit.SCHEMA, out / f"data_{files}.parquet", distillkit.ROWS_A_FILE)
        if not written:
            break
        num, files = num + written, files + 1
    tree = config.model_dump(mode="json")
    write_atomic(out / distillkit.CONFIG, yaml.safe_dump(tree, sort_keys=False).encode())
    return num


def _file(tables: Iterator[pa.Table], schema: pa.Schema, out: Path) -> int:
    writers: dict[str, Callable[[Iterator[pa.Table], pa.Schema, Path], int]] = {".parquet": _parquet, ".jsonl": _jsonl}
    if out.suffix not in writers:
        raise UserError(f"{out}: name a file that ends in .parquet or .jsonl.")
    folder.make_folder(out.parent)
    return writers[out.suffix](tables, schema, out)


def _parquet(tables: Iterator[pa.Table], schema: pa.Schema, out: Path, most: int | None = None) -> int:
    """Write tables to one file, at most about `most` rows; return their number. Without a row no file is made, if `most` is given."""
    num, writer, temporary = 0, None, out.with_name(f".{out.name}.tmp")
    try:
        for table in tables:
            writer = writer or pq.ParquetWriter(temporary, schema, compression="zstd")
            writer.write_table(table)
            num += len(table)
            if most is not None and num >= most:
                break
        if writer is None and most is None:
            writer = pq.ParquetWriter(temporary, schema)
    finally:
        if writer is not None:
            writer.close()
    if writer is not None:
        os.replace(temporary, out)
    return num


def _jsonl(tables: Iterator[pa.Table], schema: pa.Schema, out: Path) -> int:
    num, temporary = 0, out.with_name(f".{out.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for table in tables:
            for row in table.to_pylist():
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                num += 1
    os.replace(temporary, out)
    return num
