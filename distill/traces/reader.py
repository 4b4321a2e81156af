"""Read traces: a folder of shards, a selection of its rows, or a single shard file, streamed as Traces.

Memory is one block (or one shuffle buffer), whatever the size of the data. Before anything of a shard is decoded, its
SHA-256 is compared with the manifest's (once a process if only some columns are read), because the checksums of Parquet's
pages do not cover their headers; those checksums are verified too. A file that is missing, cut, empty or changed raises a
UserError that names the file and the fix.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill.errors import DataError
from distill.plug import nearest
from distill.records import Array, Traces, UserError, stable_hash
from distill.traces import codec, folder
from distill.traces.schema import (
    COLUMNS,
    DISTRIBUTION_COLUMNS,
    DRAW_COLUMNS,
    VALUE_COLUMNS,
    Metadata,
    metadata_of,
)

SELECTION_FORMAT = "distill-selection"
SELECTION_FILE = "selection.json"
KEEP_FILE = "keep.parquet"

BUFFER_ENTRIES = 32 << 20
"""The largest number of distribution entries in a shuffle buffer, beyond one shard: 6 bytes each (8 if exact)."""

UNREADABLE = (OSError, ValueError, pa.ArrowException)
"""The exceptions that Arrow raises for a damaged file (ValueError: invalid text in the footer)."""

_REPAIR_HINT = (
    "`distill traces verify --repair` on the folder drops the bad shards; generating again adds the missing traces."
)


@dataclass(frozen=True, slots=True, eq=False)
class Lengths:
    """The number of tokens of every trace, in the order of `blocks`."""

    prompt: Array
    completion: Array


@dataclass(frozen=True, slots=True, eq=False)
class TraceReader:
    """A reader of traces, made by `open_traces`.

    base: the folder of the shards. selected: for a selection, the rows kept of each shard (ascending); None: all.
    fingerprint: of the content, selection included; it identifies an input of a stage.
    """

    path: Path
    base: Path
    metadata: Metadata
    shards: tuple[folder.Shard, ...]
    selected: Mapping[str, Array] | None
    fingerprint: str

    @property
    def num_rows(self) -> int:
        return sum(self.rows_of(shard) for shard in self.shards)

    def __len__(self) -> int:
        return self.num_rows

    def blocks(self, rows: int = 256, columns: Sequence[str] | None = None) -> Iterator[Traces]:
        """Yield all traces in the order of the shards, at most `rows` at a time.

        columns: the schema's columns to read (default all); the others are empty.
        """
        for table in self.tables(rows, columns):
            yield codec.from_table(table, self.metadata)

    def tables(self, rows: int = 256, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Like `blocks`, but yield Arrow tables of the columns."""
        for shard in self.shards:
            for _, table in self.shard_tables(shard, rows, columns):
                yield table

    def shuffled(
        self,
        seed: int,
        *,
        buffer_rows: int = 2048,
        rows: int = 256,
        skip: int = 0,
        columns: Sequence[str] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[Traces]:
        """Yield all traces in an order that `seed` decides, shuffled by shard and within a buffer.

        Shards are put in random order into buffers of at least `buffer_rows` rows (fewer if their traces have
        BUFFER_ENTRIES entries); a buffer's rows are ordered by a hash of seed and trace_id. So the order of traces that
        fit into one buffer does not depend on how they are cut into shards. Holds two buffers in memory.

        Of `world` readers, the one at `rank` gets every world-th row of that order: every row once, and the ranks'
        numbers of rows differ by at most one. Each decodes only its own rows, but reads all shards.

        `skip` omits the first rows of the rank and does not read buffers that are skipped entirely, so a resumed epoch
        continues at the exact row.
        """
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}")
        before = 0
        for shards in self._shuffle_buffers(seed, buffer_rows):
            num = sum(self.rows_of(shard) for shard in shards)
            mine = slice((rank - before) % world, num, world)
            before += num
            num_mine = len(range(*mine.indices(num)))
            if skip >= num_mine:
                skip -= num_mine
                continue
            parts = [t for s in shards for _, t in self.shard_tables(s, buffer_rows, columns, True)]
            table = pa.concat_tables(parts).combine_chunks()
            del parts
            order = _hash_order(seed, table.column("trace_id").to_pylist())[mine]
            if columns is not None:
                table = table.select(self._names(columns, with_id=False))
            for start in range(skip, num_mine, rows):
                yield codec.from_table(_take(table, order[start : start + rows]), self.metadata)
            skip = 0

    def where(self, keep: Array) -> TraceReader:
        """Restrict the reader to flagged rows, in the order of `blocks`; num_rows and `skip` then count these."""
        if len(keep) != self.num_rows:
            raise ValueError(f"{len(keep)} flags for {self.num_rows} rows")
        selected, start = {}, 0
        for shard in self.shards:
            mine = np.arange(shard.rows) if self.selected is None else self.selected[shard.file]
            selected[shard.file] = mine[np.asarray(keep[start : start + len(mine)], bool)]
            start += len(mine)
        mark = folder.sha256(np.packbits(keep).tobytes())
        fingerprint = stable_hash(self.fingerprint, mark)
        return dataclasses.replace(self, selected=selected, fingerprint=fingerprint)

    def lengths(self) -> Lengths:
        """Return every trace's number of tokens, without reading the tokens."""
        names = ["prompt_tokens", "completion_tokens"]
        parts = [[t.column(name).to_numpy() for name in names] for t in self.tables(4096, names)]
        prompt, completion = zip(*parts, strict=True) if parts else ((), ())
        empty = np.empty(0, np.int32)
        return Lengths(np.concatenate([empty, *prompt]), np.concatenate([empty, *completion]))

    def shard_tables(
        self,
        shard: folder.Shard,
        rows: int = 256,
        columns: Sequence[str] | None = None,
        with_id: bool = False,
    ) -> Iterator[tuple[Array, pa.Table]]:
        """Yield one shard's (selected) rows: their numbers in the shard, and a table."""
        names = self._names(columns, with_id)
        keep = None if self.selected is None else self.selected.get(shard.file, np.empty(0, int))
        if keep is not None and not len(keep):
            return
        start = 0
        for table in _read(self.base / shard.file, shard, self.metadata, rows, names):
            stop = start + len(table)
            if keep is None:
                yield np.arange(start, stop), table
            else:
                mine = keep[np.searchsorted(keep, start) : np.searchsorted(keep, stop)]
                if len(mine) == len(table):
                    yield mine, table
                elif len(mine):
                    yield mine, table.take(pa.array(mine - start))
            start = stop
        if start != shard.rows:
            raise damaged(self.base / shard.file, f"{start} rows instead of {shard.rows}")

    def _names(self, columns: Sequence[str] | None, with_id: bool) -> list[str]:
        """Check column names and return those that these traces have, in the schema's order."""
        has = set(self.metadata.arrow_schema.names)
        return [name for name in _column_names(columns, with_id) if name in has]

    def rows_of(self, shard: folder.Shard) -> int:
        """The number of (selected) rows of a shard."""
        return shard.rows if self.selected is None else len(self.selected.get(shard.file, ()))

    def _shuffle_buffers(self, seed: int, buffer_rows: int) -> Iterator[list[folder.Shard]]:
        """Yield groups of shards that fill a buffer, in random order."""
        group: list[folder.Shard] = []
        num_rows, num_entries = 0, 0.0
        for index in _hash_order(seed, [shard.file for shard in self.shards]):
            shard = self.shards[index]
            group.append(shard)
            num_rows += self.rows_of(shard)
            num_entries += shard.entries * self.rows_of(shard) / max(shard.rows, 1)
            if num_rows >= buffer_rows or num_entries >= BUFFER_ENTRIES:
                yield group
                group, num_rows, num_entries = [], 0, 0.0
        if num_rows:
            yield group


# ------------------------------------------------------------------------------------------------ opening


def open_traces(path: str | Path, writers: Sequence[str] | None = None) -> TraceReader:
    """Open the traces at a path: a folder of shards, a selection folder, or one shard file.

    writers: of a folder of shards, only the traces of these writers.

    Raises UserError if there are no traces, the schema's version is unknown, or a selection's source has changed since it
    was made.
    """
    path = Path(path)
    if path.is_file():
        return _open_file(path)
    if (path / SELECTION_FILE).is_file():
        return _open_selection(path)
    manifests = folder.read_manifests(path) if path.is_dir() else []
    if not manifests:
        if path.is_dir() and folder.shard_files(path):
            raise DataError(f"{path}: there are shards, but no manifest that lists them. {_REPAIR_HINT}")
        raise DataError(f"{path}: no traces here (a folder with a manifest, a selection, or a .parquet shard).")
    chosen = [manifest for manifest in manifests if writers is None or manifest.writer in writers]
    shards = tuple(shard for manifest in chosen for shard in manifest.shards)
    fingerprint = stable_hash(*(shard.sha256 for shard in shards))
    return TraceReader(path, path, manifests[0].metadata, shards, None, fingerprint)


def content_fingerprint(path: str | Path) -> str:
    """Return a hash of the content at a path, from the manifests' SHA-256s and a selection's rows; reads no shard."""
    return open_traces(path).fingerprint


def _open_file(path: Path) -> TraceReader:
    """Open a single shard file, described by the manifest beside it or, without one, by its own metadata."""
    for manifest in folder.read_manifests(path.parent):
        for shard in manifest.shards:
            if shard.file == path.name:
                fingerprint = stable_hash(shard.sha256)
                return TraceReader(path, path.parent, manifest.metadata, (shard,), None, fingerprint)
    data = path.read_bytes()
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
    except UNREADABLE as error:
        raise damaged(path, str(error)) from None
    metadata = metadata_of(file.schema_arrow, str(path))
    digest = folder.sha256(data)
    shard = folder.Shard(path.name, file.metadata.num_rows, len(data), digest, 0, 0)
    return TraceReader(path, path.parent, metadata, (shard,), None, stable_hash(digest))


def _open_selection(path: Path) -> TraceReader:
    tree = folder.read_json(path / SELECTION_FILE)
    if tree.get("format") != SELECTION_FORMAT:
        raise DataError(f"{path / SELECTION_FILE}: not a selection of traces.")
    source = open_traces((path / tree["source"]).resolve())
    if source.fingerprint != tree["source_fingerprint"]:
        raise DataError(f"{path}: selects from {tree['source']}, which has changed since. Run the filter stage again.")
    keep_path = path / KEEP_FILE
    try:
        data = keep_path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{keep_path}: is missing. Run the filter stage again.") from None
    if folder.sha256(data) != tree["keep_sha256"]:
        raise DataError(f"{keep_path}: damaged. Run the filter stage again.")
    keep = pq.read_table(pa.BufferReader(data), columns=["shard", "row"])
    shards = np.asarray(keep.column("shard").to_pylist(), dtype=object)
    rows = keep.column("row").to_numpy()
    selected = {s.file: np.sort(rows[shards == s.file]) for s in source.shards}
    fingerprint = stable_hash(tree["source_fingerprint"], tree["keep_sha256"])
    return TraceReader(path, source.base, source.metadata, source.shards, selected, fingerprint)


# ------------------------------------------------------------------------------------------------ reading


def decode_file(data: Any, where: str) -> tuple[pa.Table, Metadata]:
    """Decode a whole shard from its bytes and verify every page. Raises UserError."""
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        metadata = metadata_of(file.schema_arrow, where)
        return file.read(), metadata
    except UNREADABLE as error:
        raise damaged(Path(where), str(error)) from None


def damaged(path: Path, why: str) -> DataError:
    return DataError(f"{path}: damaged: {' '.join(why.split())}. {_REPAIR_HINT}")


def _read(path: Path, shard: folder.Shard, metadata: Metadata, rows: int, names: list[str]) -> Iterator[pa.Table]:
    """Verify a shard file, then yield its columns, `rows` at a time."""
    source = checked_source(path, shard, whole=any(name in (*DISTRIBUTION_COLUMNS, *DRAW_COLUMNS) for name in names))
    with source:
        try:
            file = pq.ParquetFile(source, page_checksum_verification=True)
            own = metadata_of(file.schema_arrow, str(path))
            if differences := own.differences(metadata):
                raise damaged(path, f"its metadata differs from the manifest ({differences[0]})")
            for batch in file.iter_batches(batch_size=rows, columns=names):
                yield pa.Table.from_batches([batch])
        except UNREADABLE as error:
            raise damaged(path, str(error)) from None


def checked_source(path: Path, shard: folder.Shard, whole: bool) -> Any:
    """Compare a file's size and SHA-256 with the manifest's and return it, in memory if all of it is needed."""
    if not path.exists():
        raise DataError(f"{path}: is listed in the manifest, but missing. {_REPAIR_HINT}")
    found = path.stat()
    if found.st_size != shard.bytes:
        size = found.st_size
        raise damaged(path, f"{size:,} bytes instead of {shard.bytes:,}" if size else "empty file")
    data = path.read_bytes() if whole else None
    digest = (
        folder.sha256(data)
        if data is not None
        else _file_digest(path, found.st_ino, found.st_mtime_ns, found.st_ctime_ns)
    )
    if digest != shard.sha256:
        raise damaged(path, "its SHA-256 differs from the manifest's (the file has changed)")
    return pa.OSFile(str(path)) if data is None else pa.BufferReader(data)


@functools.lru_cache(maxsize=65536)
def _file_digest(path: Path, inode: int, modified: int, changed: int) -> str:
    """Return a file's SHA-256; cached while its inode, size and times stay the same."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _column_names(columns: Sequence[str] | None, with_id: bool) -> list[str]:
    """Check column names and return them in the schema's order."""
    if columns is None:
        return list(COLUMNS)
    for name in columns:
        if name not in COLUMNS:
            raise UserError(f"traces have no column {name!r}.{nearest(name, COLUMNS)}")
    wanted = {*columns, "trace_id"} if with_id else set(columns)
    if not wanted.isdisjoint(VALUE_COLUMNS):
        wanted |= {*VALUE_COLUMNS}
    return [name for name in COLUMNS if name in wanted]


def _take(table: pa.Table, index: Array) -> pa.Table:
    """Take rows of a table with unchunked columns. Arrow's own `take` moves lists element by element; this moves rows."""
    columns = []
    for column in table.columns:
        array = column.chunk(0)
        if not pa.types.is_large_list(array.type) or array.null_count:
            columns.append(array.take(pa.array(index)))
            continue
        offsets, values = array.offsets.to_numpy(), array.values.to_numpy()
        rows = [values[offsets[n] : offsets[n + 1]] for n in index]
        bounds = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
        columns.append(pa.LargeListArray.from_arrays(pa.array(bounds), pa.array(np.concatenate(rows)), type=array.type))
    return pa.Table.from_arrays(columns, schema=table.schema)


def _hash_order(seed: int, names: Sequence[str]) -> Array:
    """Return the order of names by a keyed hash, which does not depend on their positions."""
    key = str(seed).encode()
    digests = [hashlib.blake2b(n.encode(), digest_size=8, key=key).digest() for n in names]
    return np.argsort(np.frombuffer(b"".join(digests), ">u8"), kind="stable")
