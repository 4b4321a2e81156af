"""TraceWriter: write blocks of traces as complete shards, in the background.

`add` passes a block to a thread that checks, encodes and writes it, so that an engine waits for the disk only if it is two
shards ahead; this bounds the memory. A shard is written when it has `shard_rows` rows or `SHARD_BYTES` bytes, or when its
first row is `flush_every` seconds old; after each shard, the manifest. So a kill at any instant loses at most the shard in
flight, and a folder that is opened again knows its traces (`trace_id in writer`), so that exactly the missing ones are added.

Rows are stored in the order added.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distill.files import write_atomic
from distill.records import Array, Messages, Traces, UserError
from distill.traces import codec, folder, reader
from distill.traces.known_ids import KnownIds
from distill.traces.schema import Metadata

Item = TypeVar("Item")
SHARD_BYTES = 64 << 20
"""The approximate size of a shard in memory; on the disk it is a third of that."""


class TraceWriter:
    """Writes traces into a folder, as one of its writers. A context manager.

    Opening it takes the writer's lock, refuses a folder whose traces differ in an identity key, and cleans up after a
    killed writer: temporary files are removed, a complete shard that the manifest does not list yet is added to it,
    anything else is removed. Writers with different names may fill one folder at the same time. only_own: know and refuse this
    writer's own ids only, where somebody else hands out the work of all writers.

    Raises UserError: folder locked, metadata differs, a listed shard is damaged, disk full. An error in the background
    (such as a block whose columns contradict each other) is raised by the next `add` or by `close`; the rows before it are
    written if possible.
    """

    def __init__(
        self,
        path: str | Path,
        metadata: Metadata,
        *,
        shard_rows: int = 256,
        flush_every: float = 30.0,
        writer: str = "0",
        only_own: bool = False,
    ) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_]+", writer):
            raise UserError(f"writer {writer!r}: letters, digits and underscores only.")
        self.folder = Path(path)
        self.writer = writer
        self._metadata = metadata
        self._shard_rows = shard_rows
        self._flush_every = flush_every
        self._shards: list[folder.Shard] = []
        self._ids = KnownIds()
        self._only_own = only_own
        self._queue: deque[tuple[Traces, Array]] = deque()
        self._held = np.zeros(2, np.int64)
        self._pending = _PendingRows(shard_rows)
        self._first_row_at = 0.0
        self._closing = False
        self._flushing = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        folder.make_folder(self.folder)
        with contextlib.ExitStack() as stack:
            stack.enter_context(folder.writer_lock(self.folder, writer))
            self._open()
            self._resources = stack.pop_all()
        self._thread = threading.Thread(target=self._run, name="trace-writer", daemon=True)
        self._thread.start()

    @property
    def num_rows(self) -> int:
        """The number of this writer's rows in complete shards on the disk."""
        return sum(shard.rows for shard in self._shards)

    @property
    def num_bytes(self) -> int:
        return sum(shard.bytes for shard in self._shards)

    def __contains__(self, trace_id: object) -> bool:
        """Return whether a trace is in the folder or was added."""
        return trace_id in self._ids

    def lacks(self, trace_ids: Sequence[str]) -> Array:
        """Return for each trace whether it is not in the folder and was not added, bool [N]."""
        return self._ids.lacks(trace_ids)

    def add(self, traces: Traces) -> None:
        """Add a block; its arrays must not change afterwards. Raises ValueError for an id that exists already."""
        seen: set[str] = set()
        for trace_id in traces.trace_id:
            if trace_id in self._ids or trace_id in seen:
                raise ValueError(f"trace {trace_id!r} is already stored")
            seen.add(trace_id)
        bytes_N = row_bytes(traces)
        with self._changed:
            self._changed.wait_for(self._may_add)
            self._raise_error()
            if self._closing:
                raise ValueError("the writer is closed")
            if not self._held[0]:
                self._first_row_at = time.monotonic()
            self._queue.append((traces, bytes_N))
            self._held += len(traces), bytes_N.sum()
            self._ids.add(seen)
            self._changed.notify_all()

    def flush(self) -> None:
        """Write all rows that were added; returns when they are on the disk."""
        with self._changed:
            self._flushing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._held[0] or self._error is not None)
            self._flushing = False
            self._raise_error()

    def close(self) -> None:
        """Write the waiting rows and release the folder. Raises the background thread's error, if there is one."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._resources.close()
        self._raise_error()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _may_add(self) -> bool:
        room = self._held[0] < 2 * self._shard_rows and self._held[1] < 2 * SHARD_BYTES
        return bool(room or self._closing or self._error is not None)

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            self._closing = True
            raise error

    # ------------------------------------------------------------------------------- in the background

    def _run(self) -> None:
        try:
            last = False
            while not last:
                block, due, last = self._next_block()
                self._take(block)
                self._write_due(due)
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next_block(self) -> tuple[tuple[Traces, Array] | None, bool, bool]:
        """Return the next block (None if rows are due before one arrives), whether all waiting rows are due, and whether
        it was the last."""
        with self._changed:
            while not self._queue and not self._closing and not (self._flushing and self._held[0]):
                left = self._first_row_at + self._flush_every - time.monotonic()
                if self._held[0] and left <= 0:
                    break
                self._changed.wait(left if self._held[0] else None)
            block = self._queue.popleft() if self._queue else None
            last = self._closing and not self._queue
            late = self._flushing or time.monotonic() >= self._first_row_at + self._flush_every
            return block, last or (late and not self._queue), last

    def _take(self, block: tuple[Traces, Array] | None) -> None:
        if block is None:
            return
        traces, bytes_N = block
        try:
            self._pending.append(codec.to_table(traces, self._metadata), bytes_N)
        except Exception:
            self._write_due(everything=True)
            raise

    def _write_due(self, everything: bool) -> None:
        while (shard := self._pending.cut(everything)) is not None:
            table, num_bytes = shard
            self._write(table)
            with self._changed:
                self._held -= len(table), num_bytes
                self._first_row_at = time.monotonic()
                self._changed.notify_all()

    def _write(self, table: pa.Table) -> None:
        data = codec.encode(table, self._metadata)
        taken = folder.shard_files(self.folder, self.writer).values()
        name = folder.shard_name(self.writer, max(taken, default=-1) + 1)
        write_atomic(self.folder / name, data)
        self._list(describe(name, data, table))

    def _list(self, *shards: folder.Shard) -> None:
        self._shards += shards
        folder.Manifest(self.writer, self._metadata, tuple(self._shards)).write(self.folder)

    # -------------------------------------------------------------------------------------- on opening

    def _open(self) -> None:
        for mine in (f"shard-{self.writer}-*.parquet", folder.manifest_name(self.writer)):
            for path in self.folder.glob(f".{mine}*.tmp"):
                path.unlink()
        manifests = folder.read_manifests(self.folder)
        for manifest in manifests:
            folder.refuse_differences(self.folder, manifest.metadata, self._metadata, "the new traces")
            if manifest.writer == self.writer:
                self._metadata, self._shards = manifest.metadata, list(manifest.shards)
        read = [manifest.writer for manifest in manifests if manifest.writer == self.writer or not self._only_own]
        if read:
            for table in reader.open_traces(self.folder, writers=read).tables(1 << 16, ["trace_id"]):
                self._ids.add(table.column("trace_id").to_pylist())
        listed = {shard.file for shard in self._shards}
        for name in folder.shard_files(self.folder, self.writer):
            if name not in listed:
                self._adopt_shard(self.folder / name)

    def _adopt_shard(self, path: Path) -> None:
        """Add to the manifest a shard that was written just before a kill, if it is complete and of the same kind."""
        try:
            data = path.read_bytes()
            table, metadata = reader.decode_file(data, str(path))
            ids: Sequence[str] = table.column("trace_id").to_pylist()
            if metadata.differences(self._metadata) or any(trace_id in self._ids for trace_id in ids):
                raise UserError(f"{path}: does not belong here.")
        except UserError:
            path.unlink()
            return
        self._ids.add(ids)
        self._list(describe(path.name, data, table))


class StoredRows(Generic[Item]):
    """Which of the rows that a writer gets are on the disk, by what a caller knows of them; they are stored in the order added."""

    def __init__(self, writer: TraceWriter) -> None:
        self._writer, self._taken = writer, writer.num_rows
        self._waiting: deque[Item] = deque()

    def added(self, rows: Iterable[Item]) -> None:
        """Note rows that the writer got."""
        self._waiting.extend(rows)

    def take(self) -> list[Item]:
        """Return those that have reached the disk since the last call."""
        num = self._writer.num_rows - self._taken
        self._taken += num
        return [self._waiting.popleft() for _ in range(num)]

    def rest(self) -> list[Item]:
        """Return all others; for after the writer's end."""
        rest, self._waiting = list(self._waiting), deque()
        return rest


def adopt_shards(path: Path, metadata: Metadata) -> None:
    """Take up the complete shards that killed writers of a folder left behind, whatever their names."""
    if not path.is_dir():
        return
    listed = {shard.file for manifest in folder.read_manifests(path) for shard in manifest.shards}
    for writer in sorted({name.split("-")[1] for name in folder.shard_files(path) if name not in listed}):
        with TraceWriter(path, metadata, writer=writer):
            pass


class _PendingRows:
    """Rows waiting to become shards. Shard boundaries depend on the rows alone, not on the blocks they arrived in."""

    def __init__(self, shard_rows: int) -> None:
        self._shard_rows = shard_rows
        self._tables: list[pa.Table] = []
        self._bytes: list[Array] = []

    def append(self, table: pa.Table, bytes_N: Array) -> None:
        self._tables.append(table)
        self._bytes.append(bytes_N)

    def cut(self, everything: bool) -> tuple[pa.Table, int] | None:
        """Return the next shard's rows and their bytes if they fill one; with `everything`, the rest too."""
        if not self._tables:
            return None
        running = np.cumsum(np.concatenate(self._bytes))
        num = min(int(np.searchsorted(running, SHARD_BYTES)) + 1, self._shard_rows)
        if num > len(running) and not everything:
            return None
        num = min(num, len(running))
        queued, sizes = pa.concat_tables(self._tables), np.diff(running, prepend=0)
        self._tables = [queued.slice(num)] if num < len(running) else []
        self._bytes = [sizes[num:]] if num < len(running) else []
        return (queued.slice(0, num), int(running[num - 1])) if num else None


def row_bytes(traces: Traces) -> Array:
    """Return the approximate memory of each waiting row in bytes, [N]."""
    text = zip(traces.completion, traces.messages, strict=True)
    bytes_N = np.array([64 + len(written) + _num_bytes(messages) for written, messages in text], np.int64)
    bytes_N += 4 * traces.prompt_ids.lengths + 16 * traces.completion_ids.lengths
    if traces.top is not None:
        bytes_N += 8 * np.diff(traces.top.offsets[traces.completion_ids.offsets])
    if traces.draws is not None:
        bytes_N += 8 * np.diff(traces.draws.offsets[traces.completion_ids.offsets])
    return bytes_N


def _num_bytes(messages: Messages) -> int:
    """Return the approximate length of a conversation as JSON."""
    return sum(29 + len(message["role"]) + len(message["content"]) for message in messages)


def describe(name: str, data: pa.Buffer | bytes, table: pa.Table) -> folder.Shard:
    """Return a shard's entry in the manifest."""
    positions = pc.sum(table.column("completion_tokens")).as_py() or 0
    counts = pc.sum(pc.list_value_length(table.column("top_ids"))).as_py() or 0
    return folder.Shard(name, len(table), len(memoryview(data)), folder.sha256(data), positions, counts)
