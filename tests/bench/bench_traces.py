"""The trace store against others' layouts: bytes, codec error, gradient error, decoding, capturing, reading.

    python tests/bench/bench_traces.py [--rounds 5] [--out DIR]

On chat traces of the real small model (`chat_traces.py`; made on the first run) and, where the quickstart has run, on
its traces. All on one core, interleaved in one process. Bytes are those of the columns that hold the distribution.

Shapes: T positions, K entries, E entries over all positions, V vocabulary, D hidden size.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chat_traces
import harness
import numpy as np
import peers_traces as peers
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from distill.records import Array, Ragged, Sampling, TopK, Traces, UserError
from distill.traces import codec, distribution
from distill.traces.reader import open_traces
from distill.traces.schema import DISTRIBUTION_COLUMNS, Metadata
from distill.traces.writer import TraceWriter

WIDTH = 256
SETTINGS = [(k, mass) for k in (8, 16, 32, 50, 64, 128, 256) for mass in (1.0, 0.98, 0.95, 0.9)]
COLUMNS = ["trace_id", "prompt_ids", "completion_ids", "logprob", *DISTRIBUTION_COLUMNS]
STRIDE = 8
"""Every STRIDE-th position is in the gradient's error."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    chat = chat_traces.load()
    ids_TK, logp_TK = candidates(chat)
    harness.report("traces_curve", curve(chat, ids_TK, logp_TK), options.out)
    harness.report("traces_decode", decoding(chat, ids_TK, logp_TK, options.rounds), options.out)
    harness.report("traces_store", storing(chat, ids_TK, logp_TK, options.rounds), options.out)
    try:
        row = arithmetic(Path("runs/quickstart/traces/traces"))
    except UserError as error:
        print(f"the quickstart's traces are left out: {error}")
    else:
        harness.report("traces_quickstart", [row], options.out)


def candidates(chat: chat_traces.Chat) -> tuple[Array, Array]:
    """The WIDTH most probable tokens of every position: ids, float32 log-probabilities [T, WIDTH]."""
    path = chat_traces.KEPT.with_name("chat_top.npz")
    if not path.is_file():
        parts = []
        for start in range(0, len(chat.ids_T), 256):
            rows = torch.from_numpy(chat.logp(start, min(start + 256, len(chat.ids_T))))
            parts.append(rows.topk(WIDTH, dim=-1))
        np.savez(
            path,
            ids=np.concatenate([p.indices.numpy() for p in parts]),
            logp=np.concatenate([p.values.numpy() for p in parts]),
        )
    kept = np.load(path)
    return kept["ids"], kept["logp"]


def metadata(top_k: int, mass: float, exact: bool = False) -> Metadata:
    return Metadata(
        model="SmolLM2-135M-Instruct", weights="w", tokenizer="t", chat_template="c", vocab_size=49152, task="chat",
        task_fingerprint="f", template="chat", sampling=Sampling(), top_k=top_k, mass=mass, exact=exact, engine="transformers",
    )  # fmt: skip


def block_of(chat: chat_traces.Chat, top: TopK, logp_T: Array, name: str = "") -> Traces:
    num = len(chat.text)
    return Traces(
        trace_id=[f"{name}{n}" for n in range(num)],
        problem_id=[f"problem{n}" for n in range(num)],
        sample=np.zeros(num, np.int32),
        messages=[json.dumps([{"role": "user", "content": text}]) for text in chat.prompt_text],
        completion=chat.text,
        answer=[None] * num,
        gold=[None] * num,
        prompt_ids=Ragged(chat.prompt_ids, chat.prompt_offsets),
        completion_ids=Ragged(chat.ids_T, chat.offsets),
        logprob=Ragged(logp_T, chat.offsets),
        top=top,
        reward=[None] * num,
        rewards={},
        correct=[None] * num,
        finish_reason=["length"] * num,
    )


def sampled_logp(chat: chat_traces.Chat, ids_TK: Array, logp_TK: Array) -> Array:
    hit_TK = ids_TK == chat.ids_T[:, None]
    return np.where(hit_TK.any(1), (logp_TK * hit_TK).sum(1), -12.0).astype(np.float32)


def column_bytes(data: Any, names: Any = DISTRIBUTION_COLUMNS) -> int:
    """Compressed bytes of columns in a Parquet file."""
    file = pq.ParquetFile(pa.BufferReader(data)).metadata
    columns = [
        file.row_group(g).column(c)
        for g in range(file.num_row_groups)
        for c in range(file.num_columns)
    ]
    return sum(c.total_compressed_size for c in columns if c.path_in_schema.split(".")[0] in names)


# ------------------------------------------------------------------------------- bytes against gradient error


def curve(chat: chat_traces.Chat, ids_TK: Array, logp_TK: Array) -> list[dict[str, Any]]:
    """A row a layout and setting: bytes a position, codec error, and the error of the gradient."""
    full = TopK.from_dense(ids_TK, logp_TK)
    logp_T, num = sampled_logp(chat, ids_TK, logp_TK), len(chat.ids_T)
    pick = np.arange(0, num, STRIDE)
    rows: list[dict[str, Any]] = []
    targets: list[tuple[TopK, bool]] = []
    for config, name in ((peers.BUDGET, "DistillKit budget"), (peers.RECOMMENDED, "DistillKit recommended")):  # fmt: skip
        ids, logp = ids_TK[:, : config.k], logp_TK[:, : config.k]
        data = peers.distillkit(config, ids, logp, chat.offsets, 49152)
        names = ("compressed_logprobs", "bytepacked_indices")
        true = full.truncate(top_k=config.k)
        back = rectangular(*peer_decoded(config, data))
        common = {"k": config.k, "entries": config.k, "bytes": column_bytes(data, names) / num}
        errors = codec_error(true, back)
        for tail in (True, False):
            how = "tail bucket" if tail else "its own: no tail"
            rows.append({"layout": f"{name}, {how}", **common, "KL mean": errors.mean(), "KL max": errors.max()})  # fmt: skip
            targets.append((positions(back, pick), tail))
    for k in (50, 64):
        data = peers.naive(ids_TK[:, :k], logp_TK[:, :k], chat.offsets)
        size = column_bytes(data, ("ids", "logprobs")) / num
        rows.append(
            {
                "layout": "naive lists",
                "k": k,
                "entries": k,
                "bytes": size,
                "KL mean": 0.0,
                "KL max": 0.0,
            }
        )
        targets.append((positions(full.truncate(top_k=k), pick), True))
    for k, mass in SETTINGS:
        for exact in (False, True) if (k, mass) == (64, 0.98) else (False,):
            true = full.truncate(top_k=k, mass=None if mass == 1 else mass)
            data = codec.encode(
                codec.to_table(block_of(chat, true, logp_T), metadata(k, mass, exact)),
                metadata(k, mass, exact),
            )
            back = true if exact else decoded(true)
            errors = codec_error(true, back)
            size = column_bytes(data) / num
            rows.append(
                {"layout": "ours, exact" if exact else "ours", "k": k, "mass": mass, "entries": true.count_T.mean(), "bytes": size,
                 "B/entry": size / true.count_T.mean(), "KL mean": errors.mean(), "KL max": errors.max()}
            )  # fmt: skip
            targets.append((positions(back, pick), True))
    for student in chat.students_TD:
        for row, (whole, median) in zip(
            rows, gradient_errors(chat, targets, pick, student), strict=True
        ):
            row |= {f"gradient {student}": whole, f"median {student}": median}
    return rows


def decoded(top: TopK) -> TopK:
    steps_E, tail_T = distribution.quantise(top)
    return TopK(
        top.count_T, top.ids_E, distribution.dequantise(top.count_T, steps_E, tail_T), tail_T
    )


def peer_decoded(config: peers.Polynomial, data: bytes) -> tuple[Array, Array]:
    parts = [peers.decode(config, *row, 49152) for row in peers.distillkit_rows(data, lists=False)]
    return np.concatenate([p[0].numpy() for p in parts]), np.concatenate(
        [p[1].numpy() for p in parts]
    )


def rectangular(ids_TK: Array, logp_TK: Array) -> TopK:
    """Entries as they are; what they leave of 1 is the tail (next to nothing where they exceed it)."""
    rest_T = 1 - np.exp(logp_TK.astype(np.float64)).sum(1)
    tail_T = np.log(np.maximum(rest_T, 1e-9))
    count_T = np.full(len(ids_TK), ids_TK.shape[1], np.int32)
    return TopK(count_T, ids_TK.reshape(-1), logp_TK.reshape(-1), tail_T)


def positions(top: TopK, pick: Array) -> TopK:
    return TopK.concat([top.slice(int(t), int(t) + 1) for t in pick])


def codec_error(true: TopK, back: TopK) -> Array:
    """[T] KL(true || decoded) over entries + tail, the decoded normalised, in nat."""
    first_T = true.offsets[:-1]
    p_E, tail_T = np.exp(true.logp_E.astype(float)), np.exp(true.tail_T.astype(float))
    total_T = np.add.reduceat(p_E, first_T) + tail_T
    q_T = np.add.reduceat(np.exp(back.logp_E.astype(float)), first_T) + np.exp(
        back.tail_T.astype(float)
    )
    with np.errstate(invalid="ignore"):
        tail_kl_T = np.where(tail_T > 0, tail_T * (true.tail_T - back.tail_T), 0.0)
    kl_T = np.add.reduceat(p_E * (true.logp_E.astype(float) - back.logp_E), first_T) + tail_kl_T
    return (kl_T / total_T) - np.log(total_T) + np.log(q_T)


def gradient_errors(
    chat: chat_traces.Chat, targets: list[tuple[TopK, bool]], pick: Array, student: str
) -> list[tuple[float, float]]:
    """Of each target: |error| / |gradient| of forward KL by the student's hidden states, over all positions, and its
    median a position. The oracle has the whole vocabulary: (q - p) W. With a tail bucket the tokens outside the entries
    get T q / P; without one (DistillKit's default, "zero") the entries alone are the target.
    """
    head_VD = torch.from_numpy(chat.head_VD)
    wrong, per_position, norm = (
        np.zeros(len(targets)),
        [[] for _ in targets],
        0.0,
    )
    for start in range(0, len(pick), 128):
        chosen = pick[start : start + 128]
        teacher = torch.from_numpy(chat.teacher_TD[chosen]) @ head_VD.T
        q = (torch.from_numpy(chat.students_TD[student][chosen]) @ head_VD.T).softmax(-1)
        gradient = (q - teacher.softmax(-1)) @ head_VD
        norm += float(gradient.square().sum())
        for number, (top, tail) in enumerate(targets):
            ids, logp = (
                torch.from_numpy(x) for x in _float(top.slice(start, start + len(chosen))).dense()
            )
            kept = ids >= 0
            ids = ids.clamp(min=0)
            p_S = torch.where(kept, logp.exp(), 0.0)
            q_S = torch.where(kept, q.gather(1, ids), 0.0)
            if tail:
                mass = torch.from_numpy(np.exp(top.tail_T[start : start + len(chosen)])).float()
                scale = mass / (1 - q_S.sum(1)).clamp(min=1e-9)
                target = q * scale[:, None]
                target.scatter_add_(1, ids, torch.where(kept, p_S - q_S * scale[:, None], 0.0))
                estimate = (q - target) @ head_VD
            else:
                target = torch.zeros_like(q).scatter_add_(1, ids, p_S)
                estimate = (q * p_S.sum(1, keepdim=True) - target) @ head_VD
            error = estimate - gradient
            wrong[number] += float(error.square().sum())
            per_position[number].append((error.norm(dim=1) / gradient.norm(dim=1)).numpy())
    return [
        (float(np.sqrt(w / norm)), float(np.median(np.concatenate(parts))))
        for w, parts in zip(wrong, per_position, strict=True)
    ]


def _float(top: TopK) -> TopK:
    return TopK(top.count_T, top.ids_E, top.logp_E.astype(np.float32), top.tail_T)


# ------------------------------------------------------------------------------------------------- speeds


def decoding(
    chat: chat_traces.Chat, ids_TK: Array, logp_TK: Array, rounds: int
) -> list[dict[str, Any]]:
    """Positions a second of one core, file bytes to numbers; ours checks page checksums and normalises."""
    full = TopK.from_dense(ids_TK, logp_TK)
    logp_T, num = sampled_logp(chat, ids_TK, logp_TK), len(chat.ids_T)
    rows: list[dict[str, Any]] = []
    for config in (peers.BUDGET, peers.RECOMMENDED):
        k = config.k
        data = peers.distillkit(config, ids_TK[:, :k], logp_TK[:, :k], chat.offsets, 49152)
        sizes: dict[str, float] = {}

        def theirs(
            lists: bool, data: bytes = data, config: peers.Polynomial = config
        ) -> Callable[[], float]:
            return lambda: timed(
                lambda: [
                    peers.decode(config, *row, 49152) for row in peers.distillkit_rows(data, lists)
                ]
            )

        def ours(mass: float, k: int = k, sizes: dict[str, float] = sizes) -> Callable[[], float]:
            top = full.truncate(top_k=k, mass=None if mass == 1 else mass)
            meta = metadata(k, mass)
            shard = codec.encode(codec.to_table(block_of(chat, top, logp_T), meta), meta)
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


def storing(
    chat: chat_traces.Chat, ids_TK: Array, logp_TK: Array, rounds: int
) -> list[dict[str, Any]]:
    """Capture and reading through the store's front doors, CPU seconds of one core."""
    logp_T, rows = sampled_logp(chat, ids_TK, logp_TK), []
    for k, mass in ((64, 1.0), (64, 0.98), (64, 0.95), (16, 0.95)):
        bounds = list(zip(chat.offsets[:-1].tolist(), chat.offsets[1:].tolist(), strict=True))

        def capture(k: int = k, mass: float = mass, bounds: Any = bounds) -> list[TopK]:
            return [
                TopK.from_dense(ids_TK[a:b, :k], logp_TK[a:b, :k]).truncate(top_k=k, mass=mass)
                for a, b in bounds
            ]

        host = min(timed(capture) for _ in range(rounds)) / len(chat.ids_T)
        top = TopK.concat(capture())
        copies = 12
        blocks = [block_of(chat, _copied(top), logp_T, f"{i}-") for i in range(copies)]
        num = copies * len(chat.ids_T)
        with tempfile.TemporaryDirectory() as folder:
            started, waited = time.process_time(), 0.0
            with TraceWriter(folder, metadata(k, mass)) as writer:
                for block in blocks:
                    before = time.thread_time()
                    writer.add(block)
                    waited += time.thread_time() - before
            written = time.process_time() - started
            reader = open_traces(folder)
            measured = harness.interleaved(
                {
                    "in order": lambda reader=reader: timed(lambda: list_all(reader.blocks())),
                    "shuffled": lambda reader=reader: timed(
                        lambda: list_all(reader.shuffled(1, columns=COLUMNS))
                    ),
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
    distribution_bytes = sum(
        column_bytes((folder / shard.file).read_bytes()) for shard in reader.shards
    )
    return {
        "positions": positions,
        "entries": sum(shard.entries for shard in reader.shards) / positions,
        "bytes, all": sum(shard.bytes for shard in reader.shards) / positions,
        "bytes, distribution": distribution_bytes / positions,
    }


if __name__ == "__main__":
    main()
