"""Bytes against the error of the gradient: schema 1 at many k and mass settings, DistillKit's layout, plain lists.

    python tests/bench/bench_traces_curve.py [--out DIR]

On chat traces of the real small model (`chat_traces.py`; made on the first run). Bytes are those of the columns that
hold the distribution.

Shapes: T positions, K entries, E entries over all positions, V vocabulary, D hidden size.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import chat_traces
import harness
import numpy as np
import peers_traces as peers
import torch

from distill.records import Array, TopK
from distill.traces import codec, quantisation

SETTINGS = [(k, mass) for k in (8, 16, 32, 50, 64, 128, 256) for mass in (1.0, 0.98, 0.95, 0.9)]
STRIDE = 8
"""Every STRIDE-th position is in the gradient's error."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    chat = chat_traces.load()
    harness.report("traces_curve", curve(chat, *chat_traces.candidates(chat)), options.out)


def curve(chat: chat_traces.Chat, ids_TK: Array, logp_TK: Array) -> list[dict[str, Any]]:
    """A row a layout and setting: bytes a position, codec error, and the error of the gradient."""
    full = TopK.from_dense(ids_TK, logp_TK)
    logp_T, num = chat_traces.sampled_logp(chat, ids_TK, logp_TK), len(chat.ids_T)
    pick = np.arange(0, num, STRIDE)
    rows: list[dict[str, Any]] = []
    targets: list[tuple[TopK, bool]] = []
    for config, name in ((peers.BUDGET, "DistillKit budget"), (peers.RECOMMENDED, "DistillKit recommended")):  # fmt: skip
        ids, logp = ids_TK[:, : config.k], logp_TK[:, : config.k]
        data = peers.distillkit(config, ids, logp, chat.offsets, 49152)
        names = ("compressed_logprobs", "bytepacked_indices")
        true = full.truncate(top_k=config.k)
        back = rectangular(*peer_decoded(config, data))
        common = {
            "k": config.k,
            "entries": config.k,
            "bytes": chat_traces.column_bytes(data, names) / num,
        }
        errors = codec_error(true, back)
        for tail in (True, False):
            how = "tail bucket" if tail else "its own: no tail"
            rows.append({"layout": f"{name}, {how}", **common, "KL mean": errors.mean(), "KL max": errors.max()})  # fmt: skip
            targets.append((positions(back, pick), tail))
    for k in (50, 64):
        data = peers.naive(ids_TK[:, :k], logp_TK[:, :k], chat.offsets)
        size = chat_traces.column_bytes(data, ("ids", "logprobs")) / num
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
                codec.to_table(chat_traces.block_of(chat, true, logp_T), chat_traces.metadata(k, mass, exact)),
                chat_traces.metadata(k, mass, exact),
            )
            back = true if exact else decoded(true)
            errors = codec_error(true, back)
            size = chat_traces.column_bytes(data) / num
            rows.append(
                {"layout": "ours, exact" if exact else "ours", "k": k, "mass": mass, "entries": true.count_T.mean(), "bytes": size,
                 "B/entry": size / true.count_T.mean(), "KL mean": errors.mean(), "KL max": errors.max()}
            )  # fmt: skip
            targets.append((positions(back, pick), True))
    for student in chat.students_TD:
        for row, (whole, median) in zip(rows, gradient_errors(chat, targets, pick, student), strict=True):
            row |= {f"gradient {student}": whole, f"median {student}": median}
    return rows


def decoded(top: TopK) -> TopK:
    steps_E, tail_T = quantisation.quantise(top)
    return TopK(top.count_T, top.ids_E, quantisation.dequantise(top.count_T, steps_E, tail_T), tail_T)


def peer_decoded(config: peers.Polynomial, data: bytes) -> tuple[Array, Array]:
    parts = [peers.decode(config, *row, 49152) for row in peers.distillkit_rows(data, lists=False)]
    return np.concatenate([p[0].numpy() for p in parts]), np.concatenate([p[1].numpy() for p in parts])


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
    q_T = np.add.reduceat(np.exp(back.logp_E.astype(float)), first_T) + np.exp(back.tail_T.astype(float))
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
            ids, logp = (torch.from_numpy(x) for x in _float(top.slice(start, start + len(chosen))).dense())
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


if __name__ == "__main__":
    main()
