"""Statistics of a folder (or selection) of traces, in one streaming pass."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from distill.traces.reader import open_traces

_COLUMNS = ("problem_id", "prompt_tokens", "completion_tokens", "reward", "correct", "finish_reason",
            "top_count", "tail_logprob", "draw_count")  # fmt: skip


LEAST_MASS = 0.9
"""The mean mass of the stored entries below which a warning is given."""


@dataclass(frozen=True, slots=True)
class Stats:
    """Statistics of traces. Rates are over the traces that have the value; nan if none has.

    mean_support: entries a position. mean_tail_mass: probability outside the entries, a position. Both of positions that have a
    distribution. mean_draws: draws from the tail, a position.
    bytes_per_position: of the shards on disk, all their rows and columns.
    completion_lengths: upper bound (a power of two) -> number of traces with at most that many tokens and more than half.
    """

    traces: int
    problems: int
    prompt_tokens: int
    completion_tokens: int
    mean_support: float
    mean_tail_mass: float
    mean_draws: float
    bytes_per_position: float
    correct_rate: float
    mean_reward: float
    clipped_ratio: float
    completion_lengths: dict[int, int]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def warning(self) -> str:
        """A line if the entries hold less than LEAST_MASS of the probability on average; else empty."""
        if not self.mean_tail_mass > 1 - LEAST_MASS:
            return ""
        return (
            f"warning: the stored entries hold {1 - self.mean_tail_mass:.0%} of the probability on average, and a student learns of the rest "
            "only how much it is; raise top_logprobs and mass, or store tail_draws"
        )

    def __str__(self) -> str:
        numbers = [
            (name, value)
            for name, value in list(self.as_dict().items())[:-1]
            if isinstance(value, int) or not math.isnan(value)
        ]
        lines = [f"{name.replace('_', ' ')}: {_show(value)}" for name, value in numbers]
        widest = max(self.completion_lengths.values(), default=1)
        lines.append("completion lengths:")
        lines += [
            f"  <= {bound:>7,} tokens {num:>9,} {'#' * math.ceil(40 * num / widest)}"
            for bound, num in self.completion_lengths.items()
        ]
        return "\n".join(lines)


def _show(value: float | int) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def stats(path: str | Path) -> Stats:
    """Compute the statistics of the traces at a path. Raises UserError as reading does."""
    reader = open_traces(path)
    problems: set[str] = set()
    sums = dict.fromkeys(
        ("prompt", "entries", "tail", "held", "draws", "correct", "judged", "reward", "rewarded", "cut"), 0.0
    )
    lengths = np.zeros(64, np.int64)
    num_completion = 0
    for table in reader.tables(1024, _COLUMNS):
        column = {name: table.column(name) for name in table.column_names}
        problems.update(column["problem_id"].to_pylist())
        tokens = column["completion_tokens"].to_numpy()
        num_completion += int(tokens.sum(dtype=np.int64))
        exponents = np.ceil(np.log2(np.maximum(tokens, 1))).astype(int)
        lengths += np.bincount(exponents, minlength=64)
        tail = pc.list_flatten(column["tail_logprob"]).to_numpy().astype(np.float64)
        held = pc.list_flatten(column["top_count"]).to_numpy() > 0
        for key, amount in (
            ("prompt", pc.sum(column["prompt_tokens"]).as_py()),
            ("entries", pc.sum(pc.list_flatten(column["top_count"])).as_py()),
            ("tail", np.exp(tail[held]).sum()),
            ("held", held.sum()),
            ("draws", pc.sum(pc.list_flatten(column["draw_count"])).as_py() if "draw_count" in column else 0),
            ("correct", pc.sum(column["correct"]).as_py()),
            ("judged", pc.count(column["correct"]).as_py()),
            ("reward", pc.sum(column["reward"]).as_py()),
            ("rewarded", pc.count(column["reward"]).as_py()),
            ("cut", pc.sum(pc.equal(column["finish_reason"], "length")).as_py()),
        ):
            sums[key] += amount or 0
    positions_on_disk = sum(shard.positions for shard in reader.shards)
    return Stats(
        traces=reader.num_rows,
        problems=len(problems),
        prompt_tokens=int(sums["prompt"]),
        completion_tokens=num_completion,
        mean_support=_ratio(sums["entries"], sums["held"] or num_completion),
        mean_tail_mass=_ratio(sums["tail"], sums["held"]) if reader.metadata.top_k else math.nan,
        mean_draws=_ratio(sums["draws"], num_completion) if reader.metadata.tail_draws else math.nan,
        bytes_per_position=_ratio(sum(shard.bytes for shard in reader.shards), positions_on_disk),
        correct_rate=_ratio(sums["correct"], sums["judged"]),
        mean_reward=_ratio(sums["reward"], sums["rewarded"]),
        clipped_ratio=_ratio(sums["cut"], reader.num_rows),
        completion_lengths={1 << int(i): int(lengths[i]) for i in np.flatnonzero(lengths)},
    )


def _ratio(total: float, num: float) -> float:
    return float(total / num) if num else math.nan
