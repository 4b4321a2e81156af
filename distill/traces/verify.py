"""Check that all shards of a folder exist, match their checksums and are consistent; repair a folder that is not.

`verify` reads everything and reports every fault; `repair` drops bad shards, so that generating again adds exactly those.
Re-scoring with the teacher is an audit (`tools.audit`): this room loads no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distill.errors import DataError
from distill.records import Array, Draws, TopK, UserError
from distill.traces import codec, folder, reader, writer
from distill.traces.schema import Metadata

_NEVER_NULL = ("messages", "completion", "prompt_tokens", "completion_tokens", "prompt_ids", "completion_ids",
               "logprob", "rewards", "finish_reason")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault: the file and what is wrong with it."""

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


@dataclass(frozen=True, slots=True)
class Report:
    """The result of `verify`. notes are harmless: leftovers that the next writer cleans up."""

    path: Path
    shards: int
    rows: int
    positions: int
    findings: tuple[Finding, ...]
    notes: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return not self.findings

    def __str__(self) -> str:
        verdict = "whole" if self.ok else f"{len(self.findings)} faults"
        head = f"{self.path}: {self.shards} shards, {self.rows:,} traces, {self.positions:,} positions: {verdict}"
        lines = [f"  fault: {finding}" for finding in self.findings]
        lines += [f"  note: {finding}" for finding in self.notes]
        if not self.ok:
            lines.append("`--repair` drops the bad shards; generating again adds the missing traces.")
        return "\n".join([head, *lines])


def verify(path: str | Path, expected_ids: Iterable[str] | None = None) -> Report:
    """Read everything in a folder of shards and report every fault.

    Checks sizes, SHA-256s, page checksums, counts, metadata, columns that must agree, values that must be
    log-probabilities or ids, repeated trace ids, and (given `expected_ids`) missing ones.
    A selection is compared with its source, and the source verified. Raises UserError only if there is nothing
    to verify, or a selection no longer matches its source.
    """
    path = _shard_folder(Path(path))
    findings: list[Finding] = []
    names = folder.shard_files(path) if path.is_dir() else {}
    manifest_paths = sorted(path.glob("manifest-*.json")) if path.is_dir() else []
    if not names and not manifest_paths:
        raise DataError(f"{path}: no traces here to verify (a folder with shards and a manifest).")
    manifests = []
    for manifest_path in manifest_paths:
        try:
            manifests.append(folder.read_manifest(manifest_path))
        except UserError as error:
            findings.append(Finding(manifest_path.name, str(error)))
    seen: dict[str, str] = {}
    rows = positions = 0
    for manifest in manifests:
        findings += [
            Finding(folder.manifest_name(manifest.writer), difference)
            for difference in manifests[0].metadata.differences(manifest.metadata)
        ]
        for shard in manifest.shards:
            faults, ids = check_shard(path / shard.file, shard, manifest.metadata)
            repeated = [trace_id for trace_id in ids if trace_id in seen]
            if repeated:
                faults.append(f"{len(repeated)} traces are also in {seen[repeated[0]]}: {repeated[:3]}")
            seen |= dict.fromkeys(ids, shard.file)
            findings += [Finding(shard.file, what) for what in faults]
            rows, positions = rows + shard.rows, positions + shard.positions
    missing = [trace_id for trace_id in expected_ids or () if trace_id not in seen]
    if missing:
        findings.append(Finding(str(path), f"{len(missing)} traces are missing: {missing[:3]}"))
    listed = {shard.file for manifest in manifests for shard in manifest.shards}
    unlisted = [name for name in names if name not in listed]
    there = {manifest_path.name for manifest_path in manifest_paths}
    findings += [
        Finding(manifest, "missing: its writer's shards are in no manifest")
        for manifest in sorted({folder.manifest_name(_writer_of(name)) for name in names} - there)
    ]
    notes = [Finding(name, "not in a manifest (a writer was killed)") for name in unlisted]
    notes += [Finding(p.name, "an incomplete temporary file") for p in sorted(path.glob(".*.tmp"))]
    return Report(path, len(listed), rows, positions, tuple(findings), tuple(notes))


def repair(path: str | Path) -> Report:
    """Drop bad shards and rebuild bad or missing manifests; return what `verify` had found.

    Raises UserError if a writer has the folder open.
    """
    path = _shard_folder(Path(path))
    report = verify(path)
    bad = {finding.file for finding in report.findings}
    known = {_writer_of(manifest.name) for manifest in path.glob("manifest-*.json")}
    known |= {_writer_of(name) for name in folder.shard_files(path)}
    for name in sorted(known):
        with folder.writer_lock(path, name):
            if folder.manifest_name(name) in bad:
                _rebuild(path, name)
                continue
            manifest = folder.read_manifest(path / folder.manifest_name(name))
            good = tuple(shard for shard in manifest.shards if shard.file not in bad)
            if good != manifest.shards:
                folder.Manifest(name, manifest.metadata, good).write(path)
                for shard in set(manifest.shards) - set(good):
                    (path / shard.file).unlink(missing_ok=True)
    return report


def _shard_folder(path: Path) -> Path:
    """The folder of the shards."""
    return reader.open_traces(path).base if (path / reader.SELECTION_FILE).exists() else path


def _writer_of(name: str) -> str:
    """Return the writer's name from the name of a shard or manifest."""
    return name.split("-")[1].removesuffix(".json")


def _rebuild(path: Path, name: str) -> None:
    """Rebuild a manifest from its writer's complete shards; without any, the manifest is removed."""
    shards, metadata = [], None
    for file in folder.shard_files(path, name):
        data = (path / file).read_bytes()
        try:
            table, own = reader.decode_file(data, file)
        except UserError:
            (path / file).unlink()
            continue
        metadata = metadata or own
        shards.append(writer.describe(file, data, table))
    if metadata is None:
        (path / folder.manifest_name(name)).unlink(missing_ok=True)
    else:
        folder.Manifest(name, metadata, tuple(shards)).write(path)


# --------------------------------------------------------------------------------------------- one shard


def check_shard(path: Path, shard: folder.Shard, metadata: Metadata) -> tuple[list[str], list[str]]:
    """Return the faults of a shard, and its trace ids (none if it cannot be read)."""
    if not path.exists():
        return ["missing"], []
    data = path.read_bytes()
    if len(data) != shard.bytes:
        return [f"truncated: {len(data):,} bytes of {shard.bytes:,}" if data else "empty"], []
    if folder.sha256(data) != shard.sha256:
        return ["changed: its SHA-256 differs from the manifest's"], []
    try:
        table, own = reader.decode_file(data, str(path))
        table.validate(full=True)
    except (UserError, pa.ArrowException) as error:
        return [str(error)], []
    faults = [f"metadata: {difference}" for difference in own.differences(metadata)]
    if writer.describe(shard.file, data, table) != shard:
        faults.append("its numbers of rows, positions or entries differ from the manifest")
    ids = table.column("trace_id").to_pylist()
    if len(set(ids)) != len(ids):
        faults.append(f"{len(ids) - len(set(ids))} trace ids occur twice")
    return faults + check_table(table, metadata), ids


def check_table(table: pa.Table, metadata: Metadata) -> list[str]:
    """Return the contradictions between columns and the invalid values in them."""

    def lengths(name: str) -> Array:
        return np.asarray(pc.list_value_length(table.column(name)).fill_null(0).to_numpy())

    faults = [f"{name} is null in some rows" for name in _columns_with_nulls(table)]
    for name, other in (
        ("prompt_ids", "prompt_tokens"),
        ("completion_ids", "completion_tokens"),
        ("logprob", "completion_tokens"),
    ):
        if not np.array_equal(lengths(name), table.column(other).to_numpy()):
            faults.append(f"{name} and {other} differ in length")
    if metadata.top_k:
        values = "top_logprobs" if metadata.exact else "top_steps"
        if not np.array_equal(lengths("top_ids"), lengths(values)):
            faults.append(f"top_ids and {values} differ in length")
        positions = lengths("completion_ids")
        if not all(np.array_equal(lengths(n), positions) for n in ("top_count", "tail_logprob")):
            faults.append("top_count, tail_logprob and completion_ids differ in length")
        counts = pc.list_flatten(table.column("top_count")).to_numpy()
        running = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        bounds = np.concatenate([[0], np.cumsum(lengths("top_count"))])
        if not np.array_equal(np.diff(running[bounds]), lengths("top_ids")):
            faults.append("top_count does not add up to the entries of its trace")
    if metadata.tail_draws:
        faults += _draw_faults(lengths, table)
    if faults:
        return faults
    try:
        traces = codec.from_table(table, metadata)
        codec.check(traces, metadata)
    except (UserError, ValueError) as error:
        return [str(error)]
    if traces.top is not None and (repeated := _num_repeated(traces.top)):
        return [f"{repeated} positions have an id twice among their entries"]
    if traces.top is not None and traces.draws is not None and (kept := _num_kept(traces.top, traces.draws)):
        return [f"{kept} draws from the tail are among the entries of their position"]
    return []


def _draw_faults(lengths: Callable[[str], Array], table: pa.Table) -> list[str]:
    """Return the contradictions between the columns of draws."""
    if not np.array_equal(lengths("draw_ids"), lengths("draw_logprobs")):
        return ["draw_ids and draw_logprobs differ in length"]
    if not np.array_equal(lengths("draw_count"), lengths("completion_ids")):
        return ["draw_count and completion_ids differ in length"]
    counts = pc.list_flatten(table.column("draw_count")).to_numpy()
    running = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    bounds = np.concatenate([[0], np.cumsum(lengths("draw_count"))])
    if not np.array_equal(np.diff(running[bounds]), lengths("draw_ids")):
        return ["draw_count does not add up to the draws of its trace"]
    return []


def _columns_with_nulls(table: pa.Table) -> list[str]:
    """Return the columns with a null that the writer never writes, also within a turn's text or a reward's name."""
    columns = {name: table.column(name) for name in _NEVER_NULL}
    for name, field in (("messages", "role"), ("messages", "content"), ("rewards", "name")):
        items = pc.list_flatten(table.column(name))
        columns |= {f"{name} items": items, f"{name}.{field}": pc.struct_field(items, field)}
    return [name for name, column in columns.items() if column.null_count]


def _num_kept(top: TopK, draws: Draws) -> int:
    """Count the draws whose id is an entry of the same position."""
    top_E, draw_E = (
        np.repeat(np.arange(len(each), dtype=np.int64), each.count_T) << 32 | each.ids_E for each in (top, draws)
    )
    return int(np.isin(draw_E, top_E).sum())


def _num_repeated(top: TopK) -> int:
    """Count the positions where an id has more than one entry."""
    position_E = np.repeat(np.arange(len(top), dtype=np.int64), top.count_T)
    key_E = np.sort(position_E << 32 | top.ids_E)
    return len(np.unique(key_E[1:][key_E[1:] == key_E[:-1]] >> 32))
