"""Rows of a data set, streamed: JSON lines, JSON, CSV, Parquet and Arrow files, compressed or not, folders, hub data sets.

`open_table` finds what a path or hub id means. Rows are dictionaries with a number from 1; a line that is no row is passed to
a callback with its number and the reason.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill import jsonl
from distill.errors import DataError
from distill.files import file_hash
from distill.plug import nearest
from distill.records import stable_hash

Reject = Callable[[int, str], None]
Rows = Iterator[tuple[int, dict[str, Any]]]

LINES, JSON, CSV, PARQUET, ARROW = (
    (".jsonl", ".ndjson"),
    (".json",),
    (".csv", ".tsv"),
    (".parquet",),
    (".arrow", ".feather"),
)
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
SPLITS = {"train": "train", "training": "train", "test": "test", "validation": "validation", "valid": "validation",
          "val": "validation", "dev": "validation", "eval": "test"}  # fmt: skip
TEXT = " Of plain text nobody knows what is a question: of one question a line make JSON lines with jq -R '{question: .}' FILE.txt > FILE.jsonl."
BATCH_ROWS = 256


@dataclass(frozen=True, slots=True)
class Table:
    """A data set's rows. name: for people, with a fingerprint; splits: of all splits there are, the one read first."""

    name: str
    rows: Callable[[Reject], Rows]
    splits: tuple[str, ...] = ()

    def head(self, num: int) -> list[dict[str, Any]]:
        """Return the first `num` rows."""
        found = []
        for _, row in self.rows(lambda number, reason: None):
            found.append(row)
            if len(found) == num:
                break
        return found


def kind_of(path: Path) -> str | None:
    """Return a data file's format suffix, without that of its compression; None for other files."""
    suffixes = path.suffixes[-2:] if path.suffix in COMPRESSED else path.suffixes[-1:]
    known = (*LINES, *JSON, *CSV, *PARQUET, *ARROW)
    return suffixes[0] if suffixes and suffixes[0] in known else None


def is_table(path: Path | None) -> bool:
    """Return whether a path is a data file or a folder with data files."""
    if path is None:
        return False
    return bool(_files(path)) if path.is_dir() else kind_of(path) is not None


def open_table(path: Path, where: str, split: str = "train") -> Table:
    """Open a data file, or a split of a folder: one of data files, or one that `datasets` saved. Raises UserError."""
    if path.is_file():
        kind = kind_of(path)
        if kind is None:
            known = ", ".join((*LINES, *JSON, *CSV, *PARQUET, *ARROW))
            raise DataError(
                f"{where}: {path}: unknown file format; known are {known}, and {', '.join(COMPRESSED)} of them."
                + (TEXT if path.suffix == ".txt" else "")
            )
        return Table(f"{path.name} ({file_hash(path)[:16]})", lambda reject: _read(path, kind, reject, where))
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved(path, split, where)
    by_split: dict[str, list[Path]] = {}
    for file in _files(path):
        by_split.setdefault(_split_of(file, path), []).append(file)
    if not by_split:
        raise DataError(
            f"{where}: {path}: holds no data files (JSON lines, JSON, CSV, Parquet, Arrow) and no saved data set."
        )
    chosen = split if split in by_split else next(iter(by_split)) if len(by_split) == 1 and split == "train" else None
    if chosen is None:
        raise DataError(f"{where}: {path}: there is no split {split!r}.{nearest(split, by_split)}")
    files = by_split[chosen]
    mark = stable_hash(*(f"{file.relative_to(path)}={file_hash(file)}" for file in files))
    return Table(
        f"{path.name}, split {chosen} ({mark})", lambda reject: _read_all(files, reject, where), tuple(by_split)
    )


def splits_of(path: Path) -> tuple[str, ...]:
    """Return the splits of a folder of data files or of one that `datasets` saved; none for a file or a single saved split."""
    if (path / "dataset_dict.json").is_file():
        return tuple(json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"])
    if not path.is_dir() or (path / "state.json").is_file():
        return ()
    return tuple(dict.fromkeys(_split_of(file, path) for file in _files(path)))


def of_dataset(name: str, table: Any) -> Table:
    """Return a `datasets.Dataset` as a table."""
    return Table(name, lambda _: ((number, dict(row)) for number, row in enumerate(table, 1)))


def _saved(path: Path, split: str, where: str) -> Table:
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{where}: {path}: cannot be read as a saved data set: {' '.join(str(error).split())}"
        ) from None
    splits: tuple[str, ...] = ()
    if isinstance(found, Mapping):
        splits = tuple(found)
        if split not in found:
            raise DataError(f"{where}: {path}: there is no split {split!r}.{nearest(split, found)}")
        found = found[split]
    table = of_dataset(f"{path.name}, split {split}", found)
    return Table(table.name, table.rows, splits)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith((".", "_")) and _is_data(p))


def _is_data(path: Path) -> bool:
    return kind_of(path) is not None and path.name not in (
        "dataset_infos.json",
        "dataset_info.json",
        "config.json",
        "state.json",
    )


def _split_of(file: Path, folder: Path) -> str:
    """Return the split that a file's name, or a folder on its way, begins with; train if none does."""
    for part in reversed(file.relative_to(folder).parts):
        word = part.split(".")[0].replace("_", "-").split("-")[0].lower()
        if word in SPLITS:
            return SPLITS[word]
    return "train"


def _read_all(files: list[Path], reject: Reject, where: str) -> Rows:
    number = 0
    for file in files:
        before = number
        number = yield from _numbered(file, before, reject, where)


def _numbered(file: Path, before: int, reject: Reject, where: str) -> Generator[tuple[int, dict[str, Any]], None, int]:
    """Yield a file's rows with the numbers of a file before it counted; return the last number."""
    last = before

    def rejected(number: int, reason: str) -> None:
        reject(before + number, f"{file.name}: {reason}")

    for number, row in _read(file, kind_of(file) or "", rejected, where):
        last = before + number
        yield last, row
    return last


def _read(path: Path, kind: str, reject: Reject, where: str) -> Rows:
    try:
        if kind in PARQUET:
            yield from _parquet(path)
            return
        if kind in ARROW:
            yield from _arrow(path)
            return
        with _open(path) as file:
            if kind in CSV:
                yield from _csv(file, kind, reject)
            else:
                yield from _json(file, path, reject)
    except (OSError, EOFError, lzma.LZMAError, ValueError) as error:
        raise DataError(f"{where}: {path}: cannot be read: {' '.join(str(error).split())}") from None


def _open(path: Path) -> io.BufferedReader:
    """Open a file, decompressed by its suffix."""
    import pyarrow as pa

    match path.suffix:
        case ".gz":
            return io.BufferedReader(gzip.GzipFile(path))
        case ".bz2":
            return io.BufferedReader(bz2.BZ2File(path))
        case ".xz":
            return io.BufferedReader(lzma.LZMAFile(path))
        case ".zst":
            return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))
    return io.BufferedReader(io.FileIO(path))


def _json(file: io.BufferedReader, path: Path, reject: Reject) -> Rows:
    """Yield the rows of JSON lines, of one array, or of one object of columns."""
    start = file.peek(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if start == b"[" and not _is_lines(file):
        yield from _array(json.loads(file.read().decode("utf-8-sig"), parse_constant=jsonl.refuse_constant), reject)
        return
    if kind_of(path) in JSON:
        text = file.read()
        try:
            whole = json.loads(text.decode("utf-8-sig"), parse_constant=jsonl.refuse_constant)
        except ValueError:
            yield from jsonl.rows(io.BytesIO(text), reject)
        else:
            yield from _array(_rows_of(whole), reject)
        return
    yield from jsonl.rows(file, reject)


def _is_lines(file: io.BufferedReader) -> bool:
    """Return whether a file that begins with [ is one of lines, the first of which is an array of its own."""
    line = file.peek(4096).split(b"\n", 1)[0]
    try:
        first = json.loads(line.decode("utf-8-sig"))
    except ValueError:
        return False
    return b"\n" in file.peek(4096).strip() and not (first and isinstance(first[0], dict))


def _rows_of(whole: Any) -> Any:
    if isinstance(whole, dict):
        lists = {key: value for key, value in whole.items() if isinstance(value, list)}
        rows = [value for value in lists.values() if value and all(isinstance(each, dict) for each in value)]
        if len(rows) == 1 and len(whole) <= 3 and "messages" not in whole and "conversations" not in whole:
            return rows[0]
        if (
            lists
            and len(lists) == len(whole)
            and len({len(value) for value in lists.values()}) == 1
            and "messages" not in whole
        ):
            return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
        return [whole]
    return whole


def _array(rows: Any, reject: Reject) -> Rows:
    if not isinstance(rows, list):
        raise ValueError(f"holds {type(rows).__name__}, not rows")
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict):
            try:
                jsonl.check_text(row)
            except ValueError as error:
                reject(number, str(error))
                continue
            yield number, row
        else:
            reject(number, f"is {type(row).__name__}, not an object")


def _csv(file: io.BufferedReader, kind: str, reject: Reject) -> Rows:
    csv.field_size_limit(1 << 28)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    reader = csv.DictReader(text, delimiter="\t" if kind == ".tsv" else ",")
    for number, row in enumerate(reader, 1):
        if None in row or None in row.values():
            reject(number, "has another number of columns than the header")
            continue
        yield number, {key: value for key, value in row.items() if value != ""}


def _parquet(path: Path) -> Rows:
    import pyarrow.parquet as pq

    number = 0
    for batch in pq.ParquetFile(path).iter_batches(BATCH_ROWS):
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _arrow(path: Path) -> Rows:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        try:
            reader: Any = pa.ipc.open_stream(source)
            batches = iter(reader)
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(n) for n in range(reader.num_record_batches))
        number = 0
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield number, row
