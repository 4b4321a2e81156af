"""How fast the trace store decodes, captures and reads, and how fast DistillKit's layout decodes beside it.

    python tests/bench/bench_traces.py [--rounds 5] [--out DIR]

On chat traces of the real small model (`chat_traces.py`; made on the first run) and, where the quickstart has run, on
its traces. All on one core, interleaved in one process.

Shapes: T positions, K entries.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chat_traces
import harness
import peers_traces as peers
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from distill.records import Array, TopK, UserError
from distill.traces import codec
from distill.traces.reader import open_traces
from distill.traces.schema import DISTRIBUTION_COLUMNS
from distill.traces.writer import TraceWriter

COLUMNS = ["trace_id", "prompt_ids", "completion_ids", "logprob", *DISTRIBUTION_COLUMNS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    chat = chat_traces.load()
    ids_TK, logp_TK = chat_traces.candidates(chat)
    harness.report("traces_decode", decoding(chat, ids_TK, logp_TK, options.rounds), options.out)
    harness.report("traces_store", storing(chat, ids_TK, logp_TK, options.rounds), options.out)
    try:
        row = arithmetic(Path("runs/quickstart/traces/traces"))
    except UserError as error:
        print(f"the quickstart's traces are left out: {error}")
    else:
        harness.report("traces_quickstart", [row], options.out)


# ------------------------------------------------------------------------------------------------- speeds


def decoding(chat: chat_traces.Chat, ids_TK: Array, logp_TK: Array, rounds: int) -> list[dict[str, Any]]:
    """Positions a second of one core, file bytes to numbers; ours checks page checksums and normalises."""
    full = TopK.from_dense(ids_TK, logp_TK)
    logp_T, num = chat_traces.sampled_logp(chat, ids_TK, logp_TK), len(chat.ids_T)
    rows: list[dict[str, Any]] = []
    for config in (peers.BUDGET, peers.RECOMMENDED):
        k = config.k
        data = peers.distillkit(config, ids_TK[:, :k], logp_TK[:, :k], chat.offsets, 49152)
        sizes: dict[str, float] = {}

        def theirs(lists: bool, data: bytes = data, config: peers.Polynomial = config) -> Callable[[], float]:
            return lambda: timed(
                lambda: [peers.decode(config, *row, 49152) for row in peers.distillkit_rows(data, lists)]
            )

        def ours(mass: float, k: int = k, sizes: dict[str, float] = sizes) -> Callable[[], float]:
            top = full.truncate(top_k=k, mass=None if mass == 1 else mass)
            meta = chat_traces.metadata(k, mass)
            shard = codec.encode(codec.to_table(chat_traces.block_of(chat, top, logp_T), meta), meta)
            sizes[f"ours, mass {mass}"] = float(top.count_T.mean())

            def read() -> Any:
                file = pq.ParquetFile(pa.BufferReader(shard), page_checksum_verification=True)
                names = ["completion_ids", *DISTRIBUTION_COLUMNS]
                return codec.from_table(file.read(columns=names, use_threads=False), meta)

            return lambda: timed(read)

        variants = {
            "DistillKit, Python lists": theirs(True),
            "DistillKit, Arrow memory": theirs(False),
            **{f"ours, mass {mass}": ours(mass) for mass in (1.0, 0.98, 0.95)},
        }
        measured = harness.interleaved(variants, rounds)
        for name, seconds in measured.items():
            rows.append(
                {
                    "layout": name,
                    "k": k,
                    "entries": sizes.get(name, float(k)),
                    "positions/s": num / min(seconds),
                    "over lists": 1 / harness.ratio(measured, name, "DistillKit, Python lists"),
                    "over Arrow": 1 / harness.ratio(measured, name, "DistillKit, Arrow memory"),
                }
            )
    return rows


def storing(chat: chat_traces.Chat, ids_TK: Array, logp_TK: Array, rounds: int) -> list[dict[str, Any]]:
    """Capture and reading through the store's front doors, CPU seconds of one core."""
    logp_T, rows = chat_traces.sampled_logp(chat, ids_TK, logp_TK), []
    for k, mass in ((64, 1.0), (64, 0.98), (64, 0.95), (16, 0.95)):
        bounds = list(zip(chat.offsets[:-1].tolist(), chat.offsets[1:].tolist(), strict=True))

        def capture(k: int = k, mass: float = mass, bounds: Any = bounds) -> list[TopK]:
            return [TopK.from_dense(ids_TK[a:b, :k], logp_TK[a:b, :k]).truncate(top_k=k, mass=mass) for a, b in bounds]

        host = min(timed(capture) for _ in range(rounds)) / len(chat.ids_T)
        top = TopK.concat(capture())
        copies = 12
        blocks = [chat_traces.block_of(chat, _copied(top), logp_T, f"{i}-") for i in range(copies)]
        num = copies * len(chat.ids_T)
        with tempfile.TemporaryDirectory() as folder:
            started, waited = time.process_time(), 0.0
            with TraceWriter(folder, chat_traces.metadata(k, mass)) as writer:
                for block in blocks:
                    before = time.thread_time()
                    writer.add(block)
                    waited += time.thread_time() - before
            written = time.process_time() - started
            reader = open_traces(folder)
            measured = harness.interleaved(
                {
                    "in order": lambda reader=reader: timed(lambda: list_all(reader.blocks())),
                    "shuffled": lambda reader=reader: timed(lambda: list_all(reader.shuffled(1, columns=COLUMNS))),
                },
                rounds,
            )
        rows.append(
            {
                "k": k,
                "mass": mass,
                "entries": float(top.count_T.mean()),
                "arrays to TopK, cut, us/position": 1e6 * host,
                "add, us/position": 1e6 * waited / num,
                "writing, both threads, us/position": 1e6 * written / num,
                "read in order, M/s": num / min(measured["in order"]) / 1e6,
                "read shuffled to train on, M/s": num / min(measured["shuffled"]) / 1e6,
            }
        )
    return rows


def _copied(top: TopK) -> TopK:
    return TopK(top.count_T, top.ids_E, top.logp_E, top.tail_T)


def list_all(blocks: Any) -> int:
    return sum(len(block) for block in blocks)


def timed(run: Callable[[], Any]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def arithmetic(folder: Path) -> dict[str, Any]:
    """The quickstart's own traces: everything in the shards, text and verdicts included."""
    reader = open_traces(folder)
    positions = sum(shard.positions for shard in reader.shards)
    distribution_bytes = sum(chat_traces.column_bytes((folder / shard.file).read_bytes()) for shard in reader.shards)
    return {
        "positions": positions,
        "entries": sum(shard.entries for shard in reader.shards) / positions,
        "bytes, all": sum(shard.bytes for shard in reader.shards) / positions,
        "bytes, distribution": distribution_bytes / positions,
    }


if __name__ == "__main__":
    main()
