"""How others lay a teacher's top-k out in Parquet, rebuilt from their descriptions to measure against.

DistillKit (README and sample_common.py of arcee-ai/DistillKit): per position the top k by descending probability; the
first `exact_k` log-probabilities as bfloat16, a least-squares polynomial in the rank (float32 coefficients, here with
a square-root term) for the rest; ids packed into ceil(log2(vocabulary)) bits each; both byte strings as
list<list<uint8>>, one row a sequence, written with pyarrow's defaults. `BUDGET` and `RECOMMENDED` are its README's two
configurations. Naive: list<list<float32>> and list<list<int64>>, pyarrow's defaults.

Shapes: T positions, K entries, B bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from distill.records import Array


@dataclass(frozen=True, slots=True)
class Polynomial:
    k: int
    exact_k: int
    powers: Sequence[float]

    def terms(self) -> Array:
        """[K - exact, P] float32 in the rank."""
        rank = np.arange(self.k - self.exact_k, dtype=np.float32)[:, None]
        return rank ** np.asarray(self.powers, np.float32)


BUDGET = Polynomial(50, 1, (0, 1, 0.5))
RECOMMENDED = Polynomial(128, 16, (0, 1, 2, 3, 4, 0.5))


def nested(rows_TX: Array, offsets: Array, kind: pa.DataType) -> pa.Array:
    """list<list<kind>>, one outer row a sequence."""
    num, width = rows_TX.shape
    inner_offsets = pa.array(np.arange(num + 1, dtype=np.int32) * width)
    inner = pa.ListArray.from_arrays(inner_offsets, pa.array(rows_TX.reshape(-1)).cast(kind))
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), inner)


def parquet(columns: dict[str, pa.Array]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def naive(ids_TK: Array, logp_TK: Array, offsets: Array) -> bytes:
    return parquet(
        {"ids": nested(ids_TK, offsets, pa.int64()), "logprobs": nested(logp_TK, offsets, pa.float32())}
    )  # fmt: skip


def distillkit(config: Polynomial, ids_TK: Array, logp_TK: Array, offsets: Array, vocab_size: int) -> bytes:
    exact = torch.from_numpy(logp_TK[:, : config.exact_k]).bfloat16().view(torch.uint8).numpy()
    rest = logp_TK[:, config.exact_k : config.k].astype(np.float64)
    coefficients = np.linalg.lstsq(config.terms().astype(np.float64), rest.T, rcond=None)[0].T
    coefficients = np.ascontiguousarray(coefficients, np.float32).view(np.uint8)
    bits = (vocab_size - 1).bit_length()
    spread = (ids_TK[:, : config.k, None] >> np.arange(bits)) & 1
    packed = np.packbits(spread.reshape(len(ids_TK), -1).astype(np.uint8), axis=1, bitorder="little")
    return parquet(
        {
            "compressed_logprobs": nested(np.concatenate([exact, coefficients], 1), offsets, pa.uint8()),
            "bytepacked_indices": nested(packed, offsets, pa.uint8()),
        }
    )  # fmt: skip


def decode(
    config: Polynomial, logp_TB: torch.Tensor, ids_TB: torch.Tensor, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and float32 log-probabilities [T, K] from the bytes of a sequence, in whole tensors."""
    num_exact = 2 * config.exact_k
    exact = logp_TB[:, :num_exact].contiguous().view(torch.bfloat16).float()
    coefficients = logp_TB[:, num_exact:].contiguous().view(torch.float32)
    logp = torch.cat([exact, coefficients @ torch.from_numpy(config.terms()).T], dim=1)
    bits = (vocab_size - 1).bit_length()
    start = torch.arange(config.k) * bits
    padded = torch.nn.functional.pad(ids_TB, (0, 4)).long()
    byte, shift = start // 8, start % 8
    word = sum(padded[:, byte + n] << (8 * n) for n in range((bits + 14) // 8))
    return (word >> shift) & ((1 << bits) - 1), logp


def distillkit_rows(data: bytes, lists: bool) -> Any:
    """Each sequence's two byte tensors: through Python lists, as `datasets` hands them to a trainer, or straight
    from Arrow's memory, which is the best that could be done with the layout."""
    table = pq.read_table(pa.BufferReader(data))
    for name in ("compressed_logprobs", "bytepacked_indices"):
        table = table.set_column(table.column_names.index(name), name, table.column(name).combine_chunks())
    logp, ids = (table.column(name).chunk(0) for name in ("compressed_logprobs", "bytepacked_indices"))
    for n in range(len(table)):
        if lists:
            yield tuple(torch.tensor(c[n].as_py(), dtype=torch.uint8) for c in (logp, ids))
        else:
            yield tuple(
                torch.from_numpy(c[n].values.flatten().to_numpy().reshape(len(c[n]), -1).copy()) for c in (logp, ids)
            )
