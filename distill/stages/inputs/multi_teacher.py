"""Join several trace sets with the same traces, scored by different teachers, by trace_id.

The first set determines the order. A buffer of the first set at a time is joined with the rows of the others that have its
trace ids; of their shards only those with such rows are read. This is cheap if the sets have the same order, as score
stages write them, and correct for any order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from distill.records import Array, TopK, Traces, UserError, draw_seed, stable_hash
from distill.traces.reader import TraceReader
from distill.training.loss.multi_teacher import TeacherMixture
from distill.training.packing import Example

BUFFER_ROWS = 2048
COLUMNS = (
    "trace_id", "prompt_ids", "completion_ids", "top_count", "top_ids", "top_logprobs", "tail_logprob",
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class JoinedSource:
    """Traces with a distribution of each teacher. readers: of the common traces, each in its own order."""

    readers: Sequence[TraceReader]
    rows: Sequence[Mapping[str, int]]
    shares: Sequence[float]
    seed: int

    @property
    def num_examples(self) -> int:
        return self.readers[0].num_rows

    @property
    def fingerprint(self) -> str:
        return stable_hash(*(reader.fingerprint for reader in self.readers), *self.shares)

    def epoch(self, index: int, skip: int = 0) -> Iterator[Example]:
        first, *others = self.readers
        blocks = first.shuffled(
            draw_seed(self.seed, index),
            buffer_rows=BUFFER_ROWS, rows=BUFFER_ROWS, skip=skip, columns=COLUMNS,
        )  # fmt: skip
        for block in blocks:
            found = [_tops_of(other, rows, block.trace_id) for other, rows in zip(others, self.rows[1:], strict=True)]
            for n, trace_id in enumerate(block.trace_id):
                tops = [_top_of(block, n), *(tops[trace_id] for tops in found)]
                yield Example(
                    trace_id,
                    block.prompt_ids[n],
                    block.completion_ids[n],
                    TeacherMixture.of(tops, self.shares),
                )

    def complete(self, examples: list[Example]) -> list[Example]:
        return examples


def join(
    readers: Sequence[TraceReader], shares: Mapping[str, float], seed: int, where: str
) -> tuple[JoinedSource, int]:
    """Return the traces that every set has with the same tokens, and the number of the first set's traces that others lack.

    shares: by the sets' names in the recipe, in the readers' order. Raises UserError if there is no common trace.
    """
    tokens = [_tokens_of(reader) for reader in readers]
    common = {
        trace_id for trace_id, mark in tokens[0].items() if all(other.get(trace_id) == mark for other in tokens[1:])
    }
    if not common:
        raise UserError(
            f"{where}: {', '.join(shares)} have no trace in common (by trace_id, with the same tokens). Score the same "
            "traces with each teacher: stages of kind score with the same data."
        )
    kept = [
        reader.where(np.array([trace_id in common for trace_id in one], bool))
        for reader, one in zip(readers, tokens, strict=True)
    ]
    rows = [{trace_id: n for n, trace_id in enumerate(t for t in one if t in common)} for one in tokens]
    total = sum(shares.values())
    source = JoinedSource(kept, rows, [share / total for share in shares.values()], seed)
    return source, len(tokens[0]) - len(common)


def _tokens_of(reader: TraceReader) -> dict[str, int]:
    """Return a hash of each trace's token ids, by trace_id, in the order of `blocks`."""
    return {
        trace_id: hash((block.prompt_ids[n].tobytes(), block.completion_ids[n].tobytes()))
        for block in reader.blocks(256, ["trace_id", "prompt_ids", "completion_ids"])
        for n, trace_id in enumerate(block.trace_id)
    }


def _tops_of(reader: TraceReader, rows: Mapping[str, int], wanted: Sequence[str]) -> dict[str, TopK]:
    """The distributions of the wanted traces, by trace_id."""
    keep: Array = np.zeros(len(rows), bool)
    keep[[rows[trace_id] for trace_id in wanted]] = True
    return {
        trace_id: _top_of(block, n)
        for block in reader.where(keep).blocks(256, COLUMNS)
        for n, trace_id in enumerate(block.trace_id)
    }


def _top_of(block: Traces, n: int) -> TopK:
    top = block.top_of(n)
    assert top is not None, "sets without distributions are refused before they are joined"
    return top
