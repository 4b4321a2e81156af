"""DistillKit's logit data sets: Parquet rows with input_ids, and for each position of the model its k most probable entries.

    compressed   compressed_logprobs and bytepacked_indices, lists of bytes a position; how they are encoded stands in
                 compression_config.yaml beside the files (`distillkit_codec`)
    plain        token_ids and top_values, lists of k a position

labels (-100: not learned) and, for packed rows, attention_mask (the number of the text that a token belongs to) are read where they
are there. Refused: the legacy form (packed_indices, exact_values, coeffs), which holds logits less their mean, so the mass outside
the entries is lost.

Written is the compressed form without loss: ids exact, log-probabilities float32. A position of fewer than k entries is filled with
id 0 and -1e4, and a position of the prompt has the token that follows, with probability 1, and is not learned (labels).

Shapes: L tokens of a row, R positions with entries, K entries, B bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pydantic
import yaml

from distill import plug
from distill.errors import DataError, UserError
from distill.records import Array, Traces
from distill.traces.exchange import distillkit_codec as codec
from distill.traces.exchange.foreign import ExportRow, ForeignRow, export_row, learned

CONFIG: Final = "compression_config.yaml"
FILLER: Final = -1e4
"""The log-probability of a place without an entry. With -inf, DistillKit's p log(p/q) would be NaN."""
COMPRESSED: Final = ("compressed_logprobs", "bytepacked_indices")
PLAIN: Final = ("token_ids", "top_values")
LEGACY: Final = ("packed_indices", "exact_values", "coeffs")
ROWS_A_FILE: Final = 4096

_BYTES = pa.list_(pa.list_(pa.uint8()))
SCHEMA: Final = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.uint64())),
        pa.field("labels", pa.list_(pa.int64())),
        pa.field("compressed_logprobs", _BYTES),
        pa.field("bytepacked_indices", _BYTES),
    ]
)


def read_config(path: Path) -> codec.Compression:
    """Read a compression configuration, or DistillKit's whole recipe that contains one. Raises UserError."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {error}") from None
    if isinstance(tree, Mapping) and "teacher" in tree:
        tree = (tree["teacher"] or {}).get("logprob_compressor")
    try:
        return codec.Compression.model_validate(tree)
    except pydantic.ValidationError as error:
        raise UserError(plug.explain(error, str(path), codec.Compression.model_fields)) from None


def columns(names: frozenset[str]) -> list[str]:
    """Return the columns to read of a data set that has these. Raises DataError if there is none of the known forms."""
    for form in (COMPRESSED, PLAIN):
        if names >= {"input_ids", *form}:
            return [name for name in ("input_ids", "labels", "attention_mask", *form) if name in names]
    if names >= set(LEGACY):
        raise DataError(
            "this is DistillKit's legacy form, which holds logits less their mean: the mass outside the entries is lost, and no train "
            "stage can do without it. Capture the logits again with a logprob_compressor."
        )
    raise DataError(
        f"no DistillKit data set: needs the columns input_ids and {' and '.join(COMPRESSED)}, or {' and '.join(PLAIN)}; there are "
        f"{', '.join(sorted(names))}."
    )


def rows(batch: pa.RecordBatch, config: codec.Compression | None) -> Iterator[ForeignRow]:
    """Decode the rows of a batch of a data set's columns."""
    for n in range(len(batch)):
        ids_L = _numbers(batch, "input_ids", n)
        labels = _numbers(batch, "labels", n) if "labels" in batch.schema.names else None
        docs = _numbers(batch, "attention_mask", n) if "attention_mask" in batch.schema.names else np.ones(len(ids_L))
        if "top_values" in batch.schema.names:
            entry_ids, entry_logp = (_rectangle(batch, name, n) for name in PLAIN)
        else:
            if config is None:
                raise UserError(
                    f"a compressed data set needs the configuration that it was captured with: put {CONFIG} beside the files, or give "
                    "--config."
                )
            entry_logp = codec.decode_logprobs(_rectangle(batch, COMPRESSED[0], n).astype(np.uint8), config)
            entry_ids = codec.decode_ids(_rectangle(batch, COMPRESSED[1], n).astype(np.uint8), config)
        is_token_L = docs > 0
        yield ForeignRow(
            ids_L, learned(labels, len(ids_L)) & is_token_L, docs, entry_ids, entry_logp.astype(np.float32)
        )


def table(traces: Traces, config: codec.Compression) -> pa.Table:
    """Encode a block of traces as rows of the compressed form."""
    made = [export_row(traces, n, config.k) for n in range(len(traces))]
    encoded = [_encoded(row, config) for row in made]
    return pa.table(
        {
            "input_ids": pa.array([row.ids_L for row in made], SCHEMA.field("input_ids").type),
            "labels": pa.array([row.labels_L for row in made], SCHEMA.field("labels").type),
            "compressed_logprobs": _nested([each[0] for each in encoded]),
            "bytepacked_indices": _nested([each[1] for each in encoded]),
        },
        schema=SCHEMA,
    )


def _encoded(row: ExportRow, config: codec.Compression) -> tuple[Array, Array]:
    ids_RK, logp_RK = row.entry_ids_RK.copy(), np.where(row.entry_logp_RK > -np.inf, row.entry_logp_RK, FILLER)
    empty = row.count_R == 0
    ids_RK[empty, 0], logp_RK[empty, 0] = row.ids_L[1:][empty], 0.0
    return codec.encode_logprobs(logp_RK), codec.encode_ids(ids_RK, config)


def _nested(rectangles: list[Array]) -> pa.Array:
    """Return rectangles of bytes [R, B] as list<list<uint8>>."""
    inner = np.concatenate([[0], np.cumsum(np.concatenate([np.full(len(r), r.shape[1]) for r in rectangles]))])
    outer = np.concatenate([[0], np.cumsum([len(r) for r in rectangles])])
    values = pa.array(np.concatenate([r.reshape(-1) for r in rectangles]))
    lists = pa.ListArray.from_arrays(pa.array(inner.astype(np.int32)), values)
    return pa.ListArray.from_arrays(pa.array(outer.astype(np.int32)), lists)


def _numbers(batch: pa.RecordBatch, name: str, n: int) -> Array:
    values = batch.column(name)[n].values
    return np.empty(0, np.int64) if values is None else values.to_numpy(zero_copy_only=False).astype(np.int64)


def _rectangle(batch: pa.RecordBatch, name: str, n: int) -> Array:
    """Return a list of equally long lists as an array. Raises DataError if they differ in length."""
    lists = batch.column(name)[n].values
    if lists is None or not len(lists):
        return np.empty((0, 0))
    widths = np.unique(np.diff(lists.offsets.to_numpy()))
    if len(widths) != 1:
        raise DataError(
            f"{name}: the positions of a row have between {widths[0]} and {widths[-1]} values; DistillKit's have one number."
        )
    return np.asarray(lists.flatten().to_numpy(zero_copy_only=False).reshape(len(lists), int(widths[0])))
