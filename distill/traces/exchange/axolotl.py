"""axolotl's columns for knowledge distillation, as its KD trainer takes them: prepared rows, in Parquet or JSONL.

    input_ids, attention_mask, labels           [L]
    target_token_ids, target_logprobs           [L] lists of the entries of a position
    target_mask                                 [L] lists of 1 (an entry that is learned) and 0

Row j of the targets is about the token input_ids[j + 1], as the README of its KD integration has it ("Target alignment"); the last
row, and those that predict the prompt, hold one masked place. Ids are exact, log-probabilities float32.

It has no place for the mass outside the entries. Written are the teacher's own log-probabilities, which add up to less than 1, so
what is missing is that mass; axolotl divides them by their sum (kd_normalize_topk). Rows that were divided already, which its data
preparation stores, have lost it: they are read only on request (`without_tail`), as if the teacher gave the other ids nothing.

Shapes: L tokens of a row, K entries of the widest position.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import pyarrow as pa

from distill.errors import DataError
from distill.records import Array, Traces
from distill.traces.exchange.foreign import ForeignRow, export_row, learned

TARGETS: Final = ("target_token_ids", "target_logprobs", "target_mask")
MASKED: Final = -1e9
"""The log-probability of a masked place, as axolotl's collator pads."""

SCHEMA: Final = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.int64())),
        pa.field("attention_mask", pa.list_(pa.int64())),
        pa.field("labels", pa.list_(pa.int64())),
        pa.field("target_token_ids", pa.list_(pa.list_(pa.int64()))),
        pa.field("target_logprobs", pa.list_(pa.list_(pa.float32()))),
        pa.field("target_mask", pa.list_(pa.list_(pa.int64()))),
    ]
)


def columns(names: frozenset[str]) -> list[str]:
    """Return the columns to read of a data set that has these. Raises DataError if they are not axolotl's."""
    needed = {"input_ids", "labels", *TARGETS}
    if names >= needed:
        return [name for name in SCHEMA.names if name in names]
    raise DataError(
        f"no prepared KD data set of axolotl's: needs the columns {', '.join(sorted(needed))}; there are {', '.join(sorted(names))}."
    )


def rows(batch: pa.RecordBatch) -> Iterator[ForeignRow]:
    """Decode the rows of a batch of a data set's columns."""
    for n in range(len(batch)):
        ids_L, labels_L = (
            np.asarray(batch.column(name)[n].as_py() or [], np.int64) for name in ("input_ids", "labels")
        )
        mask = batch.column("attention_mask")[n].as_py() if "attention_mask" in batch.schema.names else None
        is_token_L = np.ones(len(ids_L), bool) if mask is None else np.asarray(mask) > 0
        counts, kept = zip(*(_flat(batch, name, n) for name in TARGETS), strict=True)
        if not all(np.array_equal(counts[0], other) for other in counts[1:]):
            raise DataError(f"row {n} of a block: {', '.join(TARGETS)} differ in their numbers of places.")
        filled_RK = np.arange(counts[0].max(initial=0)) < counts[0][:, None]
        entry_ids, entry_logp = np.zeros(filled_RK.shape, np.int64), np.full(filled_RK.shape, -np.inf, np.float32)
        entry_ids[filled_RK] = kept[0]
        entry_logp[filled_RK] = np.where(kept[2] > 0, kept[1], -np.inf)
        yield ForeignRow(ids_L, learned(labels_L, len(ids_L)) & is_token_L, np.ones(len(ids_L)), entry_ids, entry_logp)


def table(traces: Traces, width: int) -> pa.Table:
    """Encode a block of traces as rows of these columns."""
    made: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for n in range(len(traces)):
        row = export_row(traces, n, width)
        made["input_ids"].append(row.ids_L)
        made["attention_mask"].append(np.ones(len(row.ids_L), np.int64))
        made["labels"].append(row.labels_L)
        # One masked place in the positions without entries, and in a last row, about the token after the end.
        empty_L = np.concatenate([row.count_R == 0, [True]])
        counts = [max(int(count), 1) for count in row.count_R] + [1]
        ids_LK, logp_LK = np.vstack([row.entry_ids_RK, np.zeros((1, width), np.int64)]), row.entry_logp_RK
        logp_LK = np.vstack([logp_LK, np.full((1, width), -np.inf, np.float32)])
        made["target_token_ids"].append([ids_LK[j, :k] for j, k in enumerate(counts)])
        made["target_logprobs"].append([np.maximum(logp_LK[j, :k], np.float32(MASKED)) for j, k in enumerate(counts)])
        made["target_mask"].append([np.full(k, 0 if empty_L[j] else 1) for j, k in enumerate(counts)])
    return pa.Table.from_pydict(made, schema=SCHEMA)


def _flat(batch: pa.RecordBatch, name: str, n: int) -> tuple[Array, Array]:
    """Return the number of a row's places at each position, and all their values."""
    lists = batch.column(name)[n].values
    if lists is None:
        return np.empty(0, np.int64), np.empty(0)
    counts = np.diff(lists.offsets.to_numpy()).astype(np.int64)
    return counts, lists.flatten().to_numpy(zero_copy_only=False)
