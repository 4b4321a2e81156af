"""The search for schema 1's layout: every form of every column in every encoding, and the errors of the steps.

    python tests/bench/bench_codec.py [--top-k 64] [--mass 0.95] [--out DIR]

On chat traces of the real small model (`chat_traces.py`). Each column alone in a Parquet file: lists, one row a trace,
zstd, one row group. The winners are in `distill/traces/distribution.py`; RESULTS.md has the table.

Shapes: T positions, E entries over all of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_traces_curve
import chat_traces
import harness
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill.records import Array, TopK

ENCODINGS = ("PLAIN", "DELTA_BINARY_PACKED", "BYTE_STREAM_SPLIT", "dictionary")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--mass", type=float, default=0.95)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    pa.set_cpu_count(1)
    chat = chat_traces.load()
    top = TopK.from_dense(*chat_traces.candidates(chat))
    top = top.truncate(top_k=options.top_k, mass=options.mass)
    print(f"{len(top)} positions, {len(top.ids_E) / len(top):.1f} entries each")
    harness.report("codec_columns", list(columns(top, chat.offsets)), options.out)
    harness.report("codec_errors", list(errors(top)), options.out)


def columns(top: TopK, offsets: Array) -> Iterator[dict[str, Any]]:
    """Bytes of each form of each column: an entry for those of entries, a position for the others."""
    per_entry, per_position = top.offsets[offsets], offsets
    forms: list[tuple[str, str, Array, Any, Array]] = []
    first_T, position_E = top.offsets[:-1], np.repeat(np.arange(len(top)), top.count_T)
    by_id_E = np.lexsort((top.ids_E, position_E))
    sorted_E = top.ids_E[by_id_E]
    gaps_E = np.diff(sorted_E, prepend=0)
    gaps_E[first_T] = sorted_E[first_T]
    distinct, inverse_E, counts = np.unique(top.ids_E, return_inverse=True, return_counts=True)
    rank = np.empty(len(distinct), np.int64)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(distinct))
    forms += [
        ("ids", "by probability", top.ids_E, np.uint32, per_entry),
        ("ids", "ascending", sorted_E, np.uint32, per_entry),
        ("ids", "ascending, gaps", gaps_E, np.uint32, per_entry),
        ("ids", f"by probability, rank in a table of {len(distinct)}", rank[inverse_E], np.uint32, per_entry),
    ]  # fmt: skip
    for steps in (8, 16, 32, 64):
        below_E = nats(top, steps)
        delta_E = np.diff(below_E, prepend=0)
        delta_E[first_T] = 0
        label = f"1/{steps} nat"
        forms += [
            ("log-probs", f"{label}, below 1", np.rint(-top.logp_E * steps), np.uint16, per_entry),
            ("log-probs", f"{label}, below the first", below_E, np.uint16, per_entry),
            ("log-probs", f"{label}, below the first, ids ascending", below_E[by_id_E], np.uint16, per_entry),
            ("log-probs", f"{label}, below the one before", delta_E, np.uint16, per_entry),
        ]  # fmt: skip
    root_E = roots(top)
    fall_E = np.diff(-root_E, prepend=0)
    fall_E[first_T] = 0
    forms += [
        ("log-probs", "sqrt(p / first) in 1/255", root_E, np.uint16, per_entry),
        ("log-probs", "sqrt(p / first) in 1/255, fall", fall_E, np.uint16, per_entry),
        ("log-probs", "float32", top.logp_E, np.float32, per_entry),
        ("log-probs", "float16", top.logp_E.astype(np.float16), np.float16, per_entry),
        ("count", "", top.count_T, np.int32, per_position),
        ("tail", "float32", top.tail_T, np.float32, per_position),
        ("tail", "float16", top.tail_T.astype(np.float16), np.float16, per_position),
    ]
    for steps in (16, 32):
        odds_T = np.rint(log_odds(top) * steps)
        below_T = np.rint((top.logp_E[first_T] - top.tail_T) * steps)
        forms += [
            ("tail", f"log-odds, 1/{steps} nat, integer", odds_T - odds_T.min(), np.uint16, per_position),
            ("tail", f"below the first, 1/{steps} nat, integer", below_T - below_T.min(), np.uint16, per_position),
            ("tail", f"log-odds rounded to 1/{steps} nat, float32", -np.log1p(np.exp(-odds_T / steps)), np.float32, per_position),
        ]  # fmt: skip
    for column, form, values, dtype, bounds in forms:
        for encoding in ENCODINGS:
            if encoding == "DELTA_BINARY_PACKED" and np.issubdtype(dtype, np.floating):
                continue
            for level in (1, 9) if column in ("ids", "log-probs") else (1,):
                size, seconds = parquet(values.astype(dtype), bounds, encoding, level)
                yield {
                    "column": column,
                    "form": form,
                    "encoding": encoding,
                    "zstd": level,
                    "bytes": size / len(values),
                    "read ns": 1e9 * seconds / len(values),
                }


def parquet(values: Array, bounds: Array, encoding: str, level: int) -> tuple[int, float]:
    """Bytes of a file with one list column, and CPU seconds to read it."""
    data = pa.array(values)
    kind = pa.large_list(pa.field("element", data.type, nullable=False))
    table = pa.table({"x": pa.LargeListArray.from_arrays(pa.array(bounds.astype(np.int64)), data, type=kind)})
    how: dict[str, Any] = {"use_dictionary": encoding == "dictionary"}
    if encoding != "dictionary":
        how["column_encoding"] = {"x.list.element": encoding}
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", compression_level=level, row_group_size=len(table), **how)
    buffer, best = sink.getvalue(), np.inf
    for _ in range(2):
        started = time.process_time()
        pq.ParquetFile(pa.BufferReader(buffer)).read(use_threads=False)
        best = min(best, time.process_time() - started)
    return len(memoryview(buffer)), best


# -------------------------------------------------------------------------------------------- forms, errors


def nats(top: TopK, steps: int) -> Array:
    """[E] steps below the position's first entry."""
    first_E = np.repeat(top.logp_E[top.offsets[:-1]], top.count_T)
    return np.rint((first_E - top.logp_E) * steps).astype(np.int64)


def roots(top: TopK) -> Array:
    """[E] sqrt(p / p of the first) in 1/255, at least 1: what minimises KL for a given number of levels."""
    first_E = np.repeat(top.logp_E[top.offsets[:-1]], top.count_T)
    return np.maximum(np.rint(255 * np.exp((top.logp_E - first_E) / 2)), 1).astype(np.int64)


def log_odds(top: TopK) -> Array:
    """[T] log of tail over entries."""
    kept_T = np.add.reduceat(np.exp(top.logp_E.astype(float)), top.offsets[:-1])
    return np.asarray(top.tail_T.astype(float) - np.log(kept_T))


def errors(top: TopK) -> Iterator[dict[str, Any]]:
    """KL(true || decoded) of each rounding, the tail rounded to 1/16 of its log-odds."""
    odds_T = np.rint(log_odds(top) * 16) / 16
    tail_T = -np.log1p(np.exp(-odds_T))

    def measured(form: str, weight_E: Array) -> dict[str, Any]:
        total_T = np.add.reduceat(weight_E, top.offsets[:-1])
        scale_T = -np.expm1(tail_T) / total_T
        logp_E = np.log(weight_E * np.repeat(scale_T, top.count_T))
        error_T = bench_traces_curve.codec_error(top, TopK(top.count_T, top.ids_E, logp_E, tail_T))
        return {"form": form, "KL mean": float(error_T.mean()), "KL max": float(error_T.max())}

    for steps in (8, 16, 24, 32, 64):
        yield measured(f"1/{steps} nat below the first", np.exp(-nats(top, steps) / steps))
    yield measured("sqrt(p / first) in 1/255", (roots(top) / 255.0) ** 2)
    clipped_E = np.minimum(np.rint(-top.logp_E.astype(float) * 16), 255) / 16
    raw = TopK(top.count_T, top.ids_E, -clipped_E, top.tail_T)
    error_T = bench_traces_curve.codec_error(top, raw)
    yield {
        "form": "1/16 nat below 1 in a byte, entries normalised with the tail",
        "KL mean": float(error_T.mean()),
        "KL max": float(error_T.max()),
    }


if __name__ == "__main__":
    main()
