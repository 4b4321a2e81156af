"""How far models are from a teacher on its own traces: means with intervals over traces, and paired differences.

In: the sums of every trace (`TraceSums`), one for each training seed. Out: rows of the report. A mean is in nats a token: the
sums of the traces divided by their mean number of tokens, so that it is the KL between the distributions of whole traces,
by the chain rule, divided by their length. The trace is the unit of resampling.

Shape suffixes: N traces, S training seeds.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill.files import write_atomic
from distill.records import Array, UserError
from distill.reports.comparison import difference_over_seeds
from distill.reports.run_report import DivergenceRow, IntervalRow, interval_row
from distill.reports.statistics import Floats, bca, over_seeds
from distill.reports.wording import minus

FILE = "divergence.parquet"
MEASURES = ("kl", "bound", "label_nll", "overconfidence")


@dataclass(frozen=True, slots=True, eq=False)
class TraceSums:
    """The sums over the tokens of each trace, by measure: float64 [N] each. tokens_N: number of tokens summed."""

    trace_id: list[str]
    tokens_N: Array
    sums: Mapping[str, Array]

    @staticmethod
    def concat(parts: Sequence[TraceSums]) -> TraceSums:
        """Join blocks of traces, ordered by trace id."""
        ids = [trace_id for part in parts for trace_id in part.trace_id]
        order = np.argsort(np.array(ids))
        return TraceSums(
            [ids[n] for n in order],
            np.concatenate([part.tokens_N for part in parts])[order],
            {name: np.concatenate([part.sums[name] for part in parts])[order] for name in MEASURES},
        )

    def write(self, path: Path) -> None:
        table = pa.table({"trace_id": self.trace_id, "tokens": self.tokens_N, **self.sums})
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        write_atomic(path, buffer.getvalue())

    @staticmethod
    def read(path: Path) -> TraceSums:
        table = pq.read_table(path)
        sums = {name: table.column(name).to_numpy() for name in MEASURES}
        return TraceSums(table.column("trace_id").to_pylist(), table.column("tokens").to_numpy(), sums)

    def per_token(self, measure: str) -> Floats:
        """[N] each trace's sum by the mean number of tokens of a trace: their mean is the mean over all tokens."""
        return np.asarray(self.sums[measure] / max(float(self.tokens_N.mean()), 1.0), np.float64)


def summary(seeds: Sequence[TraceSums]) -> DivergenceRow:
    """The measures of a model, or of the training seeds of one arm, with 95% intervals over traces (and seeds)."""
    _check_same(seeds)
    found = {name: _interval([one.per_token(name) for one in seeds]) for name in MEASURES}
    return DivergenceRow(
        kl=found["kl"],
        bound=found["bound"],
        label_nll=found["label_nll"],
        overconfidence=found["overconfidence"],
        traces=len(seeds[0].trace_id),
        tokens=int(seeds[0].tokens_N.sum()),
    )


def kl_difference(a: Sequence[TraceSums], b: Sequence[TraceSums], seed: int = 0) -> IntervalRow:
    """KL of arm a minus that of arm b, nats a token, paired trace by trace.

    Over seeds and traces if both arms have several seeds; otherwise over traces, on means over the seeds.
    """
    _check_same([*a, *b])
    a_SN, b_SN = (np.array([one.per_token("kl") for one in arm]) for arm in (a, b))
    if min(len(a_SN), len(b_SN)) > 1:
        return interval_row(difference_over_seeds(list(a_SN), list(b_SN), seed=seed, bounded=False).difference)
    return interval_row(bca(a_SN.mean(0) - b_SN.mean(0), seed=seed))


def _interval(values_SN: Sequence[Floats]) -> IntervalRow:
    if len(values_SN) == 1:
        return interval_row(bca(values_SN[0]))
    return interval_row(over_seeds(np.array(values_SN), bounded=False))


def _check_same(sums: Sequence[TraceSums]) -> None:
    if any(one.trace_id != sums[0].trace_id for one in sums):
        raise UserError("the arms were measured on different traces; run their divergence stages again.")


def text(row: IntervalRow | Mapping[str, Any], digits: int = 3, signed: bool = False) -> str:
    """A value in nats with its interval: 0.031 [0.027, 0.036]."""
    sign = "+" if signed else ""
    value, low, high = (f"{row[key]:{sign}.{digits}f}" for key in ("value", "low", "high"))
    return minus(f"{value} [{low}, {high}]")
