"""Another program's data set of distributions as a folder of shards, streamed: memory is a block of rows.

Where the number of entries is not the same at every position, the ids are read once before, to find the largest.

The result is a folder as `generate` and `score` write it: `traces verify` checks it, `train` stages learn from it. What the data
set does not say stays empty: verdicts, answers, the conversation before it was rendered (the prompt's text is one message), the
teacher's weights (`unknown`). Ids are kept exactly; log-probabilities are stored in steps of 1/32 nat as all traces are, or as they
are (`exact`).
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distill import models
from distill.errors import DataError, UserError
from distill.records import Sampling, Traces
from distill.traces import codec
from distill.traces.exchange import axolotl, distillkit, distillkit_codec
from distill.traces.exchange.foreign import SURELY, ForeignRow, traces_of
from distill.traces.schema import Metadata
from distill.traces.writer import TraceWriter

STYLES: Final = ("distillkit", "axolotl")
_ROWS: Final = 16
"""Rows read at a time; a row may hold thousands of positions of a hundred entries."""

Rows = Callable[[pa.RecordBatch], Iterator[ForeignRow]]


@dataclass(frozen=True, slots=True)
class Settings:
    """What an import is told. teacher: the model that the distributions are of. tokenizer: its tokenizer.

    config: DistillKit's compression configuration; None: compression_config.yaml beside the files. without_tail: take distributions
    whose entries add up to 1 everywhere. exact: keep log-probabilities as float32.
    """

    teacher: str
    tokenizer: Any
    config: Path | None = None
    without_tail: bool = False
    exact: bool = False


def import_traces(source: str | Path, out: str | Path, style: str, settings: Settings) -> int:
    """Write a data set's traces to a folder of shards; return their number. Run again after a kill, it adds what is missing.

    source: a .parquet or .jsonl file, a folder of .parquet files, or a folder of `datasets.Dataset.save_to_disk`.
    Raises UserError and DataError for a data set that is not of this style, of another tokenizer, or without what traces need.
    """
    source = Path(source)
    names, batches = _open(source)
    if style == "distillkit":
        compression = _compression(source, settings.config)
        columns, entries = distillkit.columns(names), "token_ids"
        width = compression.k if compression is not None and entries not in columns else None
        read: Rows = functools.partial(distillkit.rows, config=compression)
    else:
        columns, entries, width, read = axolotl.columns(names), "target_token_ids", None, axolotl.rows
    if width is None and entries in columns:
        width = _widest(batches([entries]))
    rows = _numbered(source, batches(columns), read)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{source}: holds no rows.")
    width = max(width or 1, 1)
    metadata = _metadata(source, style, width, settings)
    num = 0
    with TraceWriter(out, metadata) as writer:
        checked = settings.without_tail
        for traces in _traces(source, itertools.chain([first], rows), metadata, settings.tokenizer):
            if not checked:
                _refuse_without_tail(source, traces)
                checked = True
            num += len(traces)
            _add(writer, traces, metadata)
    if not num:
        raise DataError(
            f"{source}: has no learned token with entries (labels are -100 everywhere, or no entries are about them)."
        )
    return num


def _add(writer: TraceWriter, traces: Traces, metadata: Metadata) -> None:
    """Add the traces that an earlier import did not write."""
    new = writer.lacks(traces.trace_id)
    if not new.all():
        traces = codec.from_table(codec.to_table(traces, metadata).filter(pa.array(new)), metadata)
    if len(traces):
        writer.add(traces)


def _traces(
    source: Path, rows: Iterator[tuple[int, ForeignRow]], metadata: Metadata, tokenizer: Any
) -> Iterator[Traces]:
    """Yield each row's traces, checked against the vocabulary."""
    ends = frozenset({tokenizer.eos_token_id} - {None})
    if tokenizer.chat_template:
        ends |= models.turn_end_ids(tokenizer)
    for number, row in rows:
        where = f"{source}, row {number}"
        highest = max(int(each.max(initial=0)) for each in (row.ids_L, _entries(row)))
        if highest >= metadata.vocab_size:
            raise UserError(
                f"{where}: holds the token id {highest}, and the tokenizer has {metadata.vocab_size} tokens. Give the tokenizer of the "
                "model that the data set was made with (--tokenizer, --teacher)."
            )
        try:
            traces = traces_of(row, number, lambda ids: models.decode(tokenizer, np.asarray(ids)), ends)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        if len(traces):
            yield traces


def _entries(row: ForeignRow) -> Any:
    return np.where(row.entry_logp_RK > -1000, row.entry_ids_RK, 0)


def _refuse_without_tail(source: Path, traces: Traces) -> None:
    assert traces.top is not None
    if np.exp(traces.top.tail_T.astype(np.float64)).max() < SURELY and traces.top.width > 1:
        raise UserError(
            f"{source}: the entries of every position of the first row add up to 1, so they were divided by their sum, and the mass of the "
            "other ids is lost. A student of such data learns to give them nothing. To take them as they are, add --without-tail."
        )


def _metadata(source: Path, style: str, width: int, settings: Settings) -> Metadata:
    tokenizer = settings.tokenizer
    return Metadata(
        model=settings.teacher,
        source=f"{style} data set {source.name}",
        weights="unknown",
        tokenizer=models.tokenizer_fingerprint(tokenizer),
        chat_template=models.template_hash(tokenizer),
        vocab_size=len(tokenizer),
        task="",
        task_fingerprint="",
        template="",
        sampling=Sampling(),
        exact=settings.exact,
        top_k=width,
        mass=1.0,
        engine=style,
    )


def _compression(source: Path, config: Path | None) -> distillkit_codec.Compression | None:
    beside = (source if source.is_dir() else source.parent) / distillkit.CONFIG
    path = config or (beside if beside.is_file() else None)
    return None if path is None else distillkit.read_config(path)


def _widest(batches: Iterator[pa.RecordBatch]) -> int:
    """Return the largest number of entries at a position, from a pass over the ids."""
    widths = (pc.max(pc.list_value_length(pc.list_flatten(batch.column(0)))).as_py() for batch in batches)
    return max((width or 0 for width in widths), default=0)


def _numbered(source: Path, batches: Iterator[pa.RecordBatch], read: Rows) -> Iterator[tuple[int, ForeignRow]]:
    number = 0
    try:
        for batch in batches:
            for row in read(batch):
                yield number, row
                number += 1
    except (pa.ArrowException, OSError, AttributeError) as error:
        raise DataError(f"{source}, after row {number}: cannot be read: {' '.join(str(error).split())}") from None
    except DataError as error:
        raise DataError(f"{source}, row {number}: {error}") from None


# ------------------------------------------------------------------------------------------------ files


def _open(source: Path) -> tuple[frozenset[str], Callable[[list[str]], Iterator[pa.RecordBatch]]]:
    """Return a data set's column names, and a function from columns to its batches of rows."""
    if not source.exists():
        raise UserError(f"{source}: no such file or folder. A data set of the hub must be downloaded first.")
    if source.is_dir() and (source / "state.json").is_file():
        import datasets

        table = datasets.load_from_disk(str(source)).with_format("arrow")
        return frozenset(table.column_names), lambda columns: (
            _batch(block.select(columns)) for block in table.iter(batch_size=_ROWS)
        )
    if source.suffix == ".jsonl":
        with source.open(encoding="utf-8") as file:
            head = next(_json_rows(source, file), None)
        return frozenset(head or ()), lambda columns: _jsonl(source, columns)
    files = sorted(source.rglob("*.parquet")) if source.is_dir() else [source]
    if not files:
        raise UserError(
            f"{source}: no data set here. Give a .parquet or .jsonl file, a folder of .parquet files, or one of Dataset.save_to_disk; of "
            "several splits, name one."
        )
    try:
        names = frozenset(pq.read_schema(files[0]).names)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{files[0]}: is no Parquet file: {error}") from None
    return names, lambda columns: (
        batch for file in files for batch in pq.ParquetFile(file).iter_batches(_ROWS, columns=columns)
    )


def _jsonl(source: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    with source.open(encoding="utf-8") as file:
        rows = _json_rows(source, file)
        while block := list(itertools.islice(rows, _ROWS)):
            yield _batch(pa.Table.from_pylist([{name: row.get(name) for name in columns} for row in block]))


def _json_rows(source: Path, file: Any) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{source}, line {number}: is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{source}, line {number}: is no object.")
        yield row


def _batch(table: pa.Table) -> pa.RecordBatch:
    """Return a table of some rows as one batch."""
    return table.combine_chunks().to_batches()[0] if len(table) else pa.RecordBatch.from_pylist([], schema=table.schema)
