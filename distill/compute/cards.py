"""GPUs by name (`cards.toml`), as machines that predictions can be made for without having them."""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources

from distill.machine import Dtype, Machine, Rates, Width, name_of
from distill.plug import nearest
from distill.records import UserError

PRODUCTS = 0.685
"""Share of the data sheet's rate that large matrix products reach; fitted to training on one H100 (tests/bench/RESULTS.md)."""
COPYING = 0.85
"""Share of the data sheet's bandwidth that a copy reaches."""
GIB = 2.0**30


@dataclass(frozen=True, slots=True)
class Cards:
    """`count` GPUs of one kind in a node. memory_gib: of each. bfloat16, float32: dense TFLOP/s. bandwidth: TB/s. link: GB/s."""

    key: str
    count: int
    name: str
    memory_gib: float
    bfloat16: float
    float32: float
    bandwidth: float
    link: float

    @property
    def memory(self) -> float:
        """Bytes of one GPU."""
        return self.memory_gib * GIB

    def machine(self, widths: Iterable[Width]) -> Machine:
        """One of the GPUs as a `Machine`, with rates at the widths of some models."""
        by_dtype: dict[Dtype, float] = {"bfloat16": self.bfloat16, "float32": self.float32}
        rates = {dtype: Rates(*[PRODUCTS * tflops * 1e12] * 4) for dtype, tflops in by_dtype.items()}
        return Machine(
            key="",
            device="cuda",
            name=self.name,
            cores=0,
            memory=self.memory,
            bandwidth=COPYING * self.bandwidth * 1e12,
            rates={name_of(width): dict(rates) for width in widths},
            card=self.key,
            link=self.link * 1e9,
        )


@functools.cache
def table() -> dict[str, dict[str, object]]:
    """Return the facts of every GPU by its name."""
    text = resources.files("distill.compute").joinpath("cards.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def parse(text: str) -> Cards:
    """Read NAME or NAME:COUNT, such as h100:8. Raises UserError with the known names."""
    name, colon, count = text.strip().lower().partition(":")
    if name not in table():
        raise UserError(f"--gpu {text}: there is no GPU {name!r}.{nearest(name, table())} Known: {', '.join(table())}.")
    if colon and not re.fullmatch(r"[1-9]\d*", count):
        raise UserError(
            f"--gpu {text}: after the colon comes the number of GPUs, as in {name}:8; the memory follows from the name. "
            f"Known: {', '.join(table())}."
        )
    return Cards(name, int(count or 1), **table()[name])  # type: ignore[arg-type]
