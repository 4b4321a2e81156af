"""Traces as a torch Dataset and as a `datasets` Dataset: texts, tokens, verdicts and the distribution at every position.

In: a folder of shards, a selection, or one shard. Out: one dictionary a trace, with tensors. Nothing is loaded as a whole:
iteration decodes a few rows at a time; access by number goes through a copy of the shard that is mapped into memory
(`arrow_copies`).

Shapes: P prompt tokens, T completion tokens (the stop token included), K the largest number of stored entries at a position of this
trace, D the largest number of draws from the tail.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast, overload

import numpy as np
import torch

from distill.records import Array, TopK
from distill.traces import arrow_copies, batches
from distill.traces.batches import TraceBatch as TraceBatch
from distill.traces.reader import TraceReader, open_traces

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

ROWS = 16
"""Rows that are decoded at a time during iteration."""


class Trace(TypedDict):
    """One trace. Log-probabilities are natural logarithms under the teacher's raw distribution, before temperature and top-p.

    messages: the conversation before the completion. prompt_ids [P], completion_ids [T]: int64, as the engine read and sampled
    them. logprob [T]: of each sampled token; None where an endpoint gave none.
    top_ids, top_logprobs [T, K]: the stored entries at each position, the most probable first; unused places hold -1 and -inf.
    Row t is the distribution over token t of the completion. tail_logprob [T]: log of the mass outside the entries.
    draw_ids, draw_logprobs [T, D]: ids drawn from that tail, padded in the same way; draw_mass [T]: the mass that one draw stands
    for. All of them None where the folder has no distributions or draws.
    reward: the weighted sum; rewards: each by name; correct: the judge's verdict; None where it could not be judged.
    """

    trace_id: str
    problem_id: str
    sample: int
    messages: list[dict[str, str]]
    completion: str
    answer: str | None
    gold: str | None
    finish_reason: str
    prompt_ids: torch.Tensor
    completion_ids: torch.Tensor
    logprob: torch.Tensor | None
    top_ids: torch.Tensor | None
    top_logprobs: torch.Tensor | None
    tail_logprob: torch.Tensor | None
    draw_ids: torch.Tensor | None
    draw_logprobs: torch.Tensor | None
    draw_mass: torch.Tensor | None
    reward: float | None
    rewards: dict[str, float | None]
    correct: bool | None


def load_traces(folder: str | Path) -> TraceDataset:
    """Return the traces of a folder of shards, a selection (what a `filter` stage writes), a stage's folder, or one shard file.

    Raises DataError if there are none, or they are damaged.
    """
    path = Path(folder)
    if (path / "stage.json").is_file() and (path / "traces").is_dir():
        path = path / "traces"
    return TraceDataset(open_traces(path))


class TraceDataset(torch.utils.data.Dataset[Trace]):
    """Traces in the order of their shards: `len`, `dataset[5]`, iteration; a slice or a list of numbers gives a smaller
    TraceDataset. Works in a DataLoader, with workers: `DataLoader(traces, batch_size=8, collate_fn=traces.collate)`.

    Reading a damaged or missing shard raises DataError.
    """

    def __init__(self, reader: TraceReader, index: Array | None = None) -> None:
        self._reader = reader
        self._index = index
        counts = [reader.rows_of(shard) for shard in reader.shards]
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._index is None else len(self._index)

    @overload
    def __getitem__(self, which: int) -> Trace: ...
    @overload
    def __getitem__(self, which: slice | Sequence[int] | Array | torch.Tensor) -> TraceDataset: ...
    def __getitem__(self, which: int | slice | Sequence[int] | Array | torch.Tensor) -> Trace | TraceDataset:
        """Return one trace by its number (negative from the end), or those of a slice or of several numbers."""
        if isinstance(which, int | np.integer):
            if not -len(self) <= which < len(self):
                raise IndexError(f"trace {which} of {len(self)}")
            return self._trace(int(which) % len(self))
        numbers = np.arange(len(self)) if self._index is None else self._index
        return TraceDataset(self._reader, numbers[which if isinstance(which, slice) else np.asarray(which, np.int64)])

    def __iter__(self) -> Iterator[Trace]:
        if self._index is not None and (np.diff(self._index) <= 0).any():
            for number in range(len(self)):
                yield self._trace(number)
            return
        reader = self._reader
        if self._index is not None:
            keep = np.zeros(reader.num_rows, bool)
            keep[self._index] = True
            reader = reader.where(keep)
        for block in reader.blocks(ROWS):
            table = arrow_copies.table_of(block, reader.metadata)
            for row in range(len(table)):
                yield _as_trace(arrow_copies.row_of(table, row))

    def __repr__(self) -> str:
        said = self._reader.metadata
        return f"TraceDataset({str(self._reader.path)!r}, {len(self)} traces of {said.model}, task {said.task}, top_k {said.top_k})"

    @property
    def metadata(self) -> dict[str, Any]:
        """How the traces were made: model, weights, tokenizer, task, template, sampling, top_k, mass, vocab_size, versions, ..."""
        return self._reader.metadata.tree()

    @property
    def fingerprint(self) -> str:
        """A hash of the content of the whole folder or selection."""
        return self._reader.fingerprint

    def to_datasets(self) -> datasets.Dataset:
        """Return the same rows as a `datasets` Dataset, mapped into memory.

        Columns as in a shard: lists instead of tensors, and the entries flat, without padding: `top_count[t]` of `top_ids`
        and `top_logprobs` belong to position t, after those of the positions before (draws in the same way). `rewards` is a list of
        {name, value}. `distill.traces.batches.collate` takes such rows.
        """
        import datasets

        if not len(self):
            return datasets.Dataset.from_dict({})
        chosen = [part for part in map(self._rows, range(len(self._reader.shards))) if len(part[1])]
        parts = [
            datasets.Dataset.from_file(str(arrow_copies.copy_of(self._reader, self._reader.shards[n]))).select(rows)
            for n, rows in chosen
        ]
        whole = datasets.concatenate_datasets(parts)
        return whole if self._index is None else whole.select(self._index)

    @staticmethod
    def collate(
        traces: Sequence[Trace],
        *,
        pad_id: int = 0,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> TraceBatch:
        """Pad traces to one batch, for a DataLoader's `collate_fn`; the losses of `distill.losses` take it (`batches.collate`)."""
        rows = [_as_row(trace) for trace in traces]
        return batches.collate(rows, pad_id=pad_id, max_length=max_length, pad_to_multiple_of=pad_to_multiple_of)

    def __getstate__(self) -> dict[str, Any]:
        return {"_reader": self._reader, "_index": self._index, "_starts": self._starts}

    def _rows(self, shard: int) -> tuple[int, Array]:
        """Return a shard's number, and the numbers of its rows that are here."""
        one = self._reader.shards[shard]
        selected = self._reader.selected
        return shard, np.arange(one.rows) if selected is None else np.asarray(selected.get(one.file, np.empty(0, int)))

    def _trace(self, number: int) -> Trace:
        place = number if self._index is None else int(self._index[number])
        shard = int(np.searchsorted(self._starts, place, side="right")) - 1
        row = int(self._rows(shard)[1][place - self._starts[shard]])
        return _as_trace(arrow_copies.row_of(self._tables(shard), row))

    @functools.cached_property
    def _opened(self) -> dict[int, pa.Table]:
        return {}

    def _tables(self, shard: int) -> pa.Table:
        if shard not in self._opened:
            self._opened[shard] = arrow_copies.open_copy(self._reader, self._reader.shards[shard])
        return self._opened[shard]


def _as_trace(row: dict[str, Any]) -> Trace:
    top_ids, top_logprobs = _padded(row, "top")
    draw_ids, draw_logprobs = _padded(row, "draw")
    return Trace(
        trace_id=row["trace_id"],
        problem_id=row["problem_id"],
        sample=row["sample"],
        messages=row["messages"],
        completion=row["completion"],
        answer=row["answer"],
        gold=row["gold"],
        finish_reason=row["finish_reason"],
        prompt_ids=torch.from_numpy(row["prompt_ids"].astype(np.int64)),
        completion_ids=torch.from_numpy(row["completion_ids"].astype(np.int64)),
        logprob=_floats(row, "logprob"),
        top_ids=top_ids,
        top_logprobs=top_logprobs,
        tail_logprob=_floats(row, "tail_logprob"),
        draw_ids=draw_ids,
        draw_logprobs=draw_logprobs,
        draw_mass=_floats(row, "draw_mass"),
        reward=row["reward"],
        rewards={each["name"]: each["value"] for each in row["rewards"] or ()},
        correct=row["correct"],
    )


def _floats(row: dict[str, Any], name: str) -> torch.Tensor | None:
    return None if row.get(name) is None else torch.from_numpy(row[name].astype(np.float32))


def _padded(row: dict[str, Any], prefix: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return a row's entries or draws as rectangles [T, K] of ids and log-probabilities; None if it has none."""
    if f"{prefix}_ids" not in row:
        return None, None
    count_T, ids_E, logp_E = (row[f"{prefix}_{name}"] for name in ("count", "ids", "logprobs"))
    ids_TK, logp_TK = TopK(count_T, ids_E, logp_E, count_T).dense()
    return torch.from_numpy(ids_TK), torch.from_numpy(logp_TK)


def _as_row(trace: Trace) -> batches.TraceRow:
    """Return a trace with its entries flat again, as `batches.collate` takes it."""
    row: dict[str, Any] = {
        name: trace[name]
        for name in ("trace_id", "prompt_ids", "completion_ids", "logprob", "tail_logprob", "draw_mass")
        if trace[name] is not None
    }
    for prefix, ids, logprobs in (
        ("top", trace["top_ids"], trace["top_logprobs"]),
        ("draw", trace["draw_ids"], trace["draw_logprobs"]),
    ):
        if ids is not None and logprobs is not None:
            held_TK = ids >= 0
            row |= {
                f"{prefix}_count": held_TK.sum(1),
                f"{prefix}_ids": ids[held_TK],
                f"{prefix}_logprobs": logprobs[held_TK],
            }
    return cast(batches.TraceRow, row)
