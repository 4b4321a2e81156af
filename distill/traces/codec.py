"""Traces <-> Arrow tables <-> Parquet bytes.

Blocks of `Traces` (numpy columns) are written and read back unchanged, except log-probabilities, which are rounded
(`quantisation.py`) unless the metadata says `exact`. Token columns are converted without a Python object a token and mostly
without a copy: arrays that are read are read-only, many of them views of Arrow's memory. Text must be UTF-8 in Parquet, so
surrogate pairs are joined and lone surrogates become U+FFFD. The sampled tokens themselves are `completion_ids`.

Files and folders are in `folder.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill.errors import DataError
from distill.records import Array, Draws, Messages, Ragged, TopK, Traces
from distill.traces import prompts, quantisation
from distill.traces.schema import DISTRIBUTION_COLUMNS, DRAW_COLUMNS, METADATA_KEY, Metadata

MAX_LOGPROB = 1e-3
"""Rounding may raise a log-probability this far above 0; a higher value is an error."""

_SPLIT = (
    "prompt_ids",
    "completion_ids",
    "logprob",
    "top_count",
    "top_ids",
    "top_steps",
    "top_logprobs",
)
"""Bytes of one significance next to each other compress better, for ids and steps as for floats."""


# ------------------------------------------------------------------------------------------ Traces -> bytes


def to_table(traces: Traces, metadata: Metadata) -> pa.Table:
    """Convert a block to an Arrow table with its metadata.

    Raises ValueError if columns contradict each other, an id is outside the vocabulary or a log-probability is invalid.
    """
    check(traces, metadata)
    num = len(traces)
    columns: dict[str, Any] = {
        "trace_id": pa.array(traces.trace_id, pa.string()),
        "problem_id": pa.array(traces.problem_id, pa.string()),
        "sample": pa.array(np.asarray(traces.sample, np.int32)),
        "messages": _messages([prompts.whole(row, metadata.prompt) for row in traces.messages]),
        "completion": _text(traces.completion),
        "answer": _text(traces.answer),
        "gold": _text(traces.gold),
        "prompt_tokens": pa.array(traces.prompt_ids.lengths.astype(np.int32)),
        "completion_tokens": pa.array(traces.completion_ids.lengths.astype(np.int32)),
        "prompt_ids": _list(traces.prompt_ids, np.uint32),
        "completion_ids": _list(traces.completion_ids, np.uint32),
        "logprob": _list(_rounded(traces.logprob, metadata), np.float32),
        "reward": pa.array(traces.reward, pa.float64()),
        "rewards": _rewards(traces.rewards, num),
        "correct": pa.array(traces.correct, pa.bool_()),
        "finish_reason": pa.array(traces.finish_reason, pa.string()),
    }
    columns |= {name: pa.nulls(num, metadata.arrow_schema.field(name).type) for name in DISTRIBUTION_COLUMNS}
    if traces.top is not None:
        columns |= _distribution(traces.top, traces.completion_ids.offsets, metadata)
    if traces.draws is not None:
        columns |= _draws(traces.draws, traces.completion_ids.offsets, metadata)
    schema = metadata.arrow_schema.with_metadata({METADATA_KEY: metadata.to_json()})
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def encode(table: pa.Table, metadata: Metadata) -> pa.Buffer:
    """Return the table as one Parquet file with a checksum on every page; equal tables give equal bytes."""
    floats, words = ["tail_logprob"], ["finish_reason", "rewards.list.element.name"]
    if metadata.tail_draws:
        floats.append("draw_logprobs")
    split = [*_SPLIT, *(["draw_ids"] if metadata.tail_draws else []), *(floats if metadata.exact else [])]
    if not metadata.exact:  # rounded tails and draws are a few hundred distinct floats
        words += [f"{name}.list.element" for name in floats]
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.combine_chunks(),
        sink,
        row_group_size=max(len(table), 1),
        compression="zstd",
        compression_level=1,
        write_page_checksum=True,
        column_encoding={f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in split},
        use_dictionary=words,
        write_statistics=[
            "trace_id",
            "problem_id",
            "prompt_tokens",
            "completion_tokens",
            "reward",
        ],
    )
    return sink.getvalue()


def check(traces: Traces, metadata: Metadata) -> None:
    """Raise ValueError if columns contradict each other or hold invalid values."""
    for name in ("problem_id", "sample", "messages", "completion", "answer", "gold", "prompt_ids",
                 "completion_ids", "logprob", "reward", "correct", "finish_reason"):  # fmt: skip
        if len(getattr(traces, name)) != len(traces):
            raise ValueError(f"{name} has {len(getattr(traces, name))} rows, not {len(traces)}")
    lengths_N = traces.logprob.lengths
    # An endpoint that gives text alone has no log-probabilities: those rows are empty.
    unknown_N = (lengths_N == 0) & (metadata.top_k == 0)
    if not np.array_equal(lengths_N[~unknown_N], traces.completion_ids.lengths[~unknown_N]):
        raise ValueError("logprob and completion_ids differ in length")
    _check_ids(traces.prompt_ids.values, metadata, "prompt_ids")
    _check_ids(traces.completion_ids.values, metadata, "completion_ids")
    _check_logprobs(traces.logprob.values, "logprob")
    top = traces.top
    if (top is None) != (metadata.top_k == 0) and len(traces):
        raise ValueError(f"top_k is {metadata.top_k}, but top is {'None' if top is None else 'given'}")
    if top is None:
        return
    if len(top) != traces.completion_ids.offsets[-1]:
        raise ValueError(f"top has {len(top)} positions, not {traces.completion_ids.offsets[-1]}")
    num_entries = int(top.count_T.sum(dtype=np.int64))
    if not num_entries == len(top.ids_E) == len(top.logp_E) or len(top.tail_T) != len(top):
        raise ValueError("the columns of top differ in length")
    _check_ids(top.ids_E, metadata, "top ids")
    _check_logprobs(top.logp_E, "top log-probabilities")
    if len(top) and not top.tail_T.max() <= MAX_LOGPROB:
        raise ValueError("a tail's log-mass is above 0 or not a number")
    held_T = _held(top.count_T, metadata)
    if not held_T.all() and np.any(top.tail_T[~held_T] != 0):
        raise ValueError("a position without entries has a tail whose mass is not 1")
    quantisation.check(_at(top, held_T), metadata.top_k)
    _check_draws(traces, metadata)


def _held(count_T: Array, metadata: Metadata) -> Array:
    """Return the positions that have a distribution: all, unless the metadata says that only a share of them does."""
    return np.ones(len(count_T), bool) if metadata.position_share == 1 else np.asarray(count_T) > 0


def _at(top: TopK, held_T: Array) -> TopK:
    """Return the distributions at the positions that have entries."""
    return top if held_T.all() else TopK(top.count_T[held_T], top.ids_E, top.logp_E, top.tail_T[held_T])


def _check_draws(traces: Traces, metadata: Metadata) -> None:
    draws = traces.draws
    if (draws is None) != (metadata.tail_draws == 0) and len(traces):
        raise ValueError(f"tail_draws is {metadata.tail_draws}, but draws are {'none' if draws is None else 'given'}")
    if draws is None:
        return
    if len(draws) != traces.completion_ids.offsets[-1]:
        raise ValueError(f"draws has {len(draws)} positions, not {traces.completion_ids.offsets[-1]}")
    if not int(draws.count_T.sum(dtype=np.int64)) == len(draws.ids_E) == len(draws.logp_E):
        raise ValueError("the columns of draws differ in length")
    if len(draws) and not 0 <= draws.count_T.min() <= draws.count_T.max() <= metadata.tail_draws:
        raise ValueError(f"positions have up to {draws.count_T.max()} draws, not {metadata.tail_draws} (tail_draws)")
    _check_ids(draws.ids_E, metadata, "drawn ids")
    _check_logprobs(draws.logp_E, "log-probabilities of draws")


def _check_ids(ids: Array, metadata: Metadata, what: str) -> None:
    if len(ids) and not 0 <= ids.min() <= ids.max() < metadata.vocab_size:
        raise ValueError(f"{what} from {ids.min()} to {ids.max()} with a vocabulary of {metadata.vocab_size}")


def _check_logprobs(logprobs: Array, what: str) -> None:
    # A NaN makes min and max NaN, and every comparison with it false.
    if len(logprobs) and not -np.inf < logprobs.min() <= logprobs.max() <= MAX_LOGPROB:
        raise ValueError(f"{what}: some are above 0, infinite or not numbers")


def _rounded(rows: Ragged, metadata: Metadata) -> Ragged:
    values = rows.values if metadata.exact else quantisation.round_logprobs(rows.values)
    return Ragged(values, rows.offsets)


def _distribution(top: TopK, position_offsets: Array, metadata: Metadata) -> dict[str, pa.Array]:
    entry_offsets = top.offsets[position_offsets]
    tail_T = top.tail_T
    if metadata.exact:
        values = {"top_logprobs": _list(Ragged(top.logp_E, entry_offsets), np.float32)}
    else:
        held_T = _held(top.count_T, metadata)
        steps_E, quantised_T = quantisation.quantise(_at(top, held_T))
        tail_T = np.zeros(len(top), np.float32)
        tail_T[held_T] = quantised_T
        values = {"top_steps": _list(Ragged(steps_E, entry_offsets), np.uint16)}
    return {
        "top_count": _list(Ragged(top.count_T, position_offsets), np.int32),
        "top_ids": _list(Ragged(top.ids_E, entry_offsets), np.uint32),
        "tail_logprob": _list(Ragged(tail_T, position_offsets), np.float32),
        **values,
    }


def _draws(draws: Draws, position_offsets: Array, metadata: Metadata) -> dict[str, pa.Array]:
    offsets = draws.offsets[position_offsets]
    logp_E = draws.logp_E if metadata.exact else quantisation.round_draws(draws.logp_E)
    return {
        "draw_count": _list(Ragged(draws.count_T, position_offsets), np.uint8),
        "draw_ids": _list(Ragged(draws.ids_E, offsets), np.uint32),
        "draw_logprobs": _list(Ragged(logp_E, offsets), np.float32),
    }


def _list(rows: Ragged, dtype: Any) -> pa.Array:
    start, stop = int(rows.offsets[0]), int(rows.offsets[-1])
    offsets = np.asarray(rows.offsets, np.int64) - start
    values = pa.array(np.ascontiguousarray(rows.values[start:stop], dtype))
    kind = pa.large_list(pa.field("element", values.type, nullable=False))
    return pa.LargeListArray.from_arrays(pa.array(offsets), values, type=kind)


def _text(column: Sequence[str | None]) -> pa.Array:
    try:
        return pa.array(column, pa.string())
    except UnicodeEncodeError:
        return pa.array([None if text is None else clean_text(text) for text in column], pa.string())


def clean_text(text: str) -> str:
    """Return the text as valid Unicode: surrogate pairs joined, lone surrogates replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _messages(column: Sequence[Messages]) -> pa.Array:
    """Convert conversations to lists of {role, content} structs."""
    for row in column:
        for turn in row:
            if set(turn) != {"role", "content"}:
                raise ValueError(f"a message has the keys role and content, not {sorted(turn)}")
    flat = [turn for row in column for turn in row]
    values = pa.StructArray.from_arrays(
        [_text([turn["role"] for turn in flat]), _text([turn["content"] for turn in flat])],
        ["role", "content"],
    )
    offsets = np.cumsum([0, *map(len, column)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def _rewards(rewards: dict[str, list[float | None]], num: int) -> pa.Array:
    names = sorted(rewards)
    offsets = np.arange(num + 1, dtype=np.int32) * len(names)
    values = [rewards[name][row] for row in range(num) for name in names]
    named = pa.StructArray.from_arrays(
        [pa.array(names * num, pa.string()), pa.array(values, pa.float64())], ["name", "value"]
    )
    return pa.ListArray.from_arrays(pa.array(offsets), named)


# ------------------------------------------------------------------------------------------ bytes -> Traces


def from_table(table: pa.Table, metadata: Metadata) -> Traces:
    """Convert a table to Traces. Columns that were not read are empty: no tokens, no text, no verdict.

    `top` and `draws` are None if they were not captured or one of their columns was not read.
    """
    num = len(table)
    column = {name: _whole(table.column(name)) for name in table.column_names}

    def texts(name: str, missing: Any = "") -> Any:
        return column[name].to_pylist() if name in column else [missing] * num

    def lists(name: str) -> Ragged:
        if name not in column:
            return Ragged(np.empty(0, np.float32), np.zeros(num + 1, np.int64))
        return _ragged(column[name], metadata)

    return Traces(
        trace_id=texts("trace_id"),
        problem_id=texts("problem_id"),
        sample=column["sample"].to_numpy() if "sample" in column else np.zeros(num, np.int32),
        messages=[prompts.own(tuple(row or ()), metadata.prompt) for row in texts("messages", ())],
        completion=texts("completion"),
        answer=texts("answer", None),
        gold=texts("gold", None),
        prompt_ids=lists("prompt_ids"),
        completion_ids=lists("completion_ids"),
        logprob=lists("logprob"),
        top=_top(column, metadata),
        reward=texts("reward", None),
        rewards=_reward_columns(texts("rewards", ())),
        correct=texts("correct", None),
        finish_reason=texts("finish_reason"),
        draws=_draws_of(column, metadata),
    )


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _ragged(array: pa.LargeListArray, metadata: Metadata) -> Ragged:
    offsets = array.offsets.to_numpy()
    start, stop = int(offsets[0]), int(offsets[-1])
    values = array.values.slice(start, stop - start).to_numpy(zero_copy_only=True)
    if values.dtype == np.uint32:  # signed, as everything that computes with ids wants them
        wide = metadata.vocab_size > 2**31
        values = values.astype(np.int64) if wide else values.view(np.int32)
    return Ragged(values, offsets - start if start else offsets)


def _top(column: dict[str, Any], metadata: Metadata) -> TopK | None:
    if metadata.top_k == 0 or not all(name in column for name in DISTRIBUTION_COLUMNS):
        return None

    def flat(name: str) -> Array:
        return _ragged(column[name], metadata).values

    count_T, ids_E, tail_T = flat("top_count"), flat("top_ids"), flat("tail_logprob")
    value_E = flat("top_logprobs" if metadata.exact else "top_steps")
    adds_up = int(count_T.sum(dtype=np.int64)) == len(ids_E) == len(value_E)
    held_T = _held(count_T, metadata)
    if not adds_up or len(count_T) != len(tail_T) or (len(count_T) and count_T[held_T].min(initial=1) < 1):
        raise DataError("top_count does not add up to top_ids: the file is damaged or was written by another program.")
    if not metadata.exact:
        value_E = quantisation.dequantise(count_T[held_T], value_E, tail_T[held_T])
    return TopK(count_T, ids_E, value_E, tail_T)


def _draws_of(column: dict[str, Any], metadata: Metadata) -> Draws | None:
    if metadata.tail_draws == 0 or not all(name in column for name in DRAW_COLUMNS):
        return None
    count_T, ids_E, logp_E = (_ragged(column[name], metadata).values for name in DRAW_COLUMNS)
    if not int(count_T.sum(dtype=np.int64)) == len(ids_E) == len(logp_E):
        raise DataError(
            "draw_count does not add up to draw_ids: the file is damaged or was written by another program."
        )
    return Draws(count_T.astype(np.int32), ids_E, logp_E)


def _reward_columns(
    rows: Iterable[Iterable[Mapping[str, Any]]],
) -> dict[str, list[float | None]]:
    maps = [{each["name"]: each["value"] for each in row} for row in rows]
    names = sorted({name for row in maps for name in row})
    return {name: [row.get(name) for row in maps] for name in names}
