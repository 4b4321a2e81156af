"""The same rows out of every file format, compressed or not, and out of folders."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from distill.conversations import open_table
from distill.records import UserError

ROWS = [{"question": "a é", "answer": "1"}, {"question": 'b, "quoted"\nline', "answer": "2"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def _zst(path: Path) -> None:
    with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd") as out:
        out.write(LINES)


def _csv(path: Path, delimiter: str) -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


WRITE: dict[str, Any] = {
    "a.jsonl": lambda p: p.write_bytes(LINES),
    "bom.jsonl": lambda p: p.write_bytes(b"\xef\xbb\xbf" + LINES),
    "a.ndjson": lambda p: p.write_bytes(LINES),
    "a.jsonl.gz": lambda p: p.write_bytes(gzip.compress(LINES)),
    "a.jsonl.bz2": lambda p: p.write_bytes(bz2.compress(LINES)),
    "a.jsonl.xz": lambda p: p.write_bytes(lzma.compress(LINES)),
    "a.jsonl.zst": _zst,
    "a.json": lambda p: p.write_text(json.dumps(ROWS, indent=1), encoding="utf-8-sig"),
    "lines.json": lambda p: p.write_bytes(LINES),
    "columns.json": lambda p: p.write_text(json.dumps({k: [r[k] for r in ROWS] for k in ROWS[0]})),
    "inside.json": lambda p: p.write_text(json.dumps({"version": 1, "data": ROWS})),
    "array.jsonl": lambda p: p.write_text(json.dumps(ROWS)),
    "a.json.gz": lambda p: p.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "a.csv": lambda p: _csv(p, ","),
    "a.tsv": lambda p: _csv(p, "\t"),
    "a.parquet": lambda p: pq.write_table(pa.Table.from_pylist(ROWS), p),
    "a.arrow": lambda p: pyarrow.feather.write_feather(pa.Table.from_pylist(ROWS), p, compression="uncompressed"),
}


@pytest.mark.parametrize("name", WRITE)
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    WRITE[name](tmp_path / name)
    rejected: list[Any] = []
    table = open_table(tmp_path / name, "data")
    assert list(table.rows(lambda *at: rejected.append(at))) == [(1, ROWS[0]), (2, ROWS[1])]
    assert not rejected


def test_folders_by_split(tmp_path: Path) -> None:
    hub = tmp_path / "hub" / "data"
    hub.mkdir(parents=True)
    for name, row in (
        ("train-00000-of-00002", ROWS[0]),
        ("train-00001-of-00002", ROWS[1]),
        ("test-00000-of-00001", ROWS[1]),
    ):
        pq.write_table(pa.Table.from_pylist([row]), hub / f"{name}.parquet")
    (tmp_path / "hub" / "README.md").write_text("card")
    train = open_table(hub.parent, "data")
    assert [row for _, row in train.rows(_never)] == ROWS
    assert [number for number, _ in train.rows(_never)] == [1, 2]
    assert [row for _, row in open_table(hub.parent, "data", "test").rows(_never)] == ROWS[1:]
    with pytest.raises(UserError, match=r"no split 'tset'\. Did you mean 'test'"):
        open_table(hub.parent, "data", "tset")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "saved"))
    assert [row for _, row in open_table(tmp_path / "saved", "data").rows(_never)] == ROWS
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
    assert [row for _, row in open_table(tmp_path / "one", "data").rows(_never)] == ROWS
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no data files"):
        open_table(tmp_path / "empty", "data")


def _never(number: int, reason: str) -> None:
    raise AssertionError(reason)


def test_bad_rows_cost_themselves_only(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([ROWS[0], [1, 2], {"question": "\ud800"}, ROWS[1]]))
    rejected: list[Any] = []
    assert [n for n, _ in open_table(path, "data").rows(lambda *at: rejected.append(at))] == [1, 4]
    assert [n for n, _ in rejected] == [2, 3]
    (tmp_path / "b.csv").write_text("question,answer\na,1\nb\nc,2,3\nd,4\n")
    rejected.clear()
    assert [
        row["answer"] for _, row in open_table(tmp_path / "b.csv", "data").rows(lambda *at: rejected.append(at))
    ] == ["1", "4"]
    assert len(rejected) == 2


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.json"])
def test_a_cut_file_is_one_message(name: str, tmp_path: Path) -> None:
    WRITE[name](tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(UserError, match=f"{name}: cannot be read"):
        list(open_table(tmp_path / name, "data").rows(_never))
    with pytest.raises(UserError, match="unknown file format") as said:
        open_table(Path(__file__), "data")
    assert "jq" not in str(said.value)


def test_plain_text_is_not_guessed_at(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("What is 3+4?\n")
    with pytest.raises(UserError, match=r"unknown file format.* jq -R '\{question: \.\}'"):
        open_table(tmp_path / "a.txt", "data")
