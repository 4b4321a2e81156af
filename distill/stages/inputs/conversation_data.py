"""Conversations that a stage reads from a file, a folder or a hub data set; what is left out is counted by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from distill.conversations import Conversation, Reader, Table, is_table, open_table
from distill.conversations.tables import of_dataset
from distill.errors import DataError, MachineError
from distill.models import hub
from distill.plug import nearest
from distill.recipe import RowsConfig
from distill.records import UserError
from distill.stages.context import find_data

SHOWN = 5


@dataclass(slots=True)
class DroppedRows:
    """Why rows or traces are left out, counted; the first few by number."""

    reasons: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)

    def add(self, reason: str, count: int = 1) -> None:
        if count:
            self.reasons[reason] += count

    def reject(self, number: int, reason: str) -> None:
        """Count a row that cannot be used. reason: what is wrong with it."""
        self.add("not usable")
        if len(self.first) < SHOWN:
            self.first.append(f"row {number} left out: {reason}")

    def lines(self) -> list[str]:
        """Return the first rows with their reasons, then the counts."""
        return [*self.first, *(f"{count} left out: {reason}" for reason, count in self.reasons.items())]


def is_shard(path: Path) -> bool:
    """Return whether a Parquet file is a shard of traces rather than a data set of someone else's."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from distill.traces.schema import METADATA_KEY

    try:
        return METADATA_KEY in (pq.read_schema(path).metadata or {})
    except (OSError, pa.ArrowInvalid):
        return True  # the reader of traces says what is wrong with it


def open_rows(data: str, config: RowsConfig, where: str) -> Table:
    """Open a data file, a folder or a hub data set. Raises UserError if `data` is none of them."""
    table, most = _open(data, config, where), config.max_rows
    return table if most is None else replace(table, rows=lambda reject: islice(table.rows(reject), most))


def _open(data: str, config: RowsConfig, where: str) -> Table:
    path = find_data(data)
    if path is None:
        return _from_hub(data, config.split, config.subset, where)
    if not is_table(path) and not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
        raise DataError(
            f"{where}: {path} is neither a folder of traces, a data file (JSON lines, JSON, CSV, Parquet, Arrow), a folder of "
            "them, nor what `datasets` saved."
        )
    return open_table(path, where, config.split)


def conversations(table: Table, reader: Reader, left_out: DroppedRows) -> Iterator[Conversation]:
    """Yield the conversations of a table's rows; rows that are none are counted."""
    for number, row in table.rows(left_out.reject):
        try:
            yield from reader.read(row, number)
        except ValueError as error:
            left_out.reject(number, str(error))
    left_out.add("generations that their row calls wrong", reader.wrong)


def nothing_found(table: Table, left_out: DroppedRows) -> str:
    """Return why a table gave nothing: its first rows' faults, or that it is empty."""
    if left_out.first:
        return " ".join(f"{line}." for line in left_out.first[:2])
    return "It has no rows." if not table.head(1) else ""


def is_hub_id(data: str) -> bool:
    """Return whether a name could be a data set's on the hub: owner/name, or owner/name@revision."""
    return hub.dataset_id(data) is not None


def _from_hub(data: str, split: str, subset: str | None, where: str) -> Table:
    """Open a split of a hub data set at the commit that the stage's inputs are recorded with."""
    import datasets

    found = hub.dataset_id(data)
    if found is None:
        raise UserError(
            f"{where}: {data!r} is no stage, file, folder or hub dataset (owner/name, or owner/name@revision)."
        )
    name, revision = found
    commit = hub.dataset_commit(name, revision)
    with hub.offline_unless_reachable():
        try:
            loaded = datasets.load_dataset(name, subset, revision=revision if commit == hub.UNVERIFIED else commit)
        except (OSError, ValueError) as error:
            raise MachineError(
                f"{where}: {data!r} cannot be loaded: {' '.join(str(error).split())} Without a network, give a JSONL file "
                "or a folder that `datasets` saved."
            ) from None
    table = _split_of(loaded, split, where)
    if revision is not None and hub.loaded_commit(table) not in (commit, hub.UNVERIFIED):
        raise MachineError(
            f"{where}: {data!r} is asked for, and without a network there is only {name}@{hub.loaded_commit(table)} in the "
            "cache. Take that one, or run where the hub can be reached."
        )
    return of_dataset(f"{name} ({hub.loaded_commit(table)[:16]}), split {split}", table)


def _split_of(found: Any, split: str, where: str) -> Any:
    if not isinstance(found, Mapping):
        return found
    if split not in found:
        raise UserError(f"{where}: there is no split {split!r}.{nearest(split, found)}")
    return found[split]
