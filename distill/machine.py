"""Measure this machine (matrix-product speed by dtype, memory, memory bandwidth) and choose a dtype from that.

`python -m distill.machine 576x1536 ...` measures in a separate process and prints JSON, so that the command line does not
import torch. A measurement is cached for one hour in the user's cache and recorded in each run's environment.json.

The timed products are the three of a layer in training, at the model's own width: forward (x W^T), gradient by the input
(g W) and gradient by the weight (g^T x). They are timed because processor features do not predict the speed: a processor
with only AVX2 multiplies bfloat16 10 to 100 times slower than float32, one with AMX or AVX-512-BF16 four times faster, and
it also depends on the libraries.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from distill.files import read_digested, write_atomic, write_digested
from distill.records import UserError, stable_hash

Dtype = Literal["bfloat16", "float32"]
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")
Width = tuple[int, int]
"""(hidden size, intermediate size) of a model."""

ROWS = 256
"""Tokens in the products of training and prefill."""
DECODE_ROWS = 64
"""Sequences in a decoding step."""
PRODUCT_FLOPS = 0.5e9
"""Maximum FLOPs of one timed product: the output dimension of a wide matrix is cut, so that timing takes under a second."""
REPEATS = 24
"""Timed repetitions of each product, at most."""
PRODUCT_SECONDS = 0.1
"""After this time in one product of one dtype, it is not timed again."""
HOPELESS = 10.0
"""A dtype whose first run is this many times slower than the fastest is not timed again."""
CACHE_SECONDS = 3600.0
"""Age until which a cached measurement is used."""
METHOD = "CPU time"
"""Part of the cache key: a measurement by another method is not reused."""
SETTINGS = ("ONEDNN_", "DNNL_", "ATEN_", "MKL_", "OMP_", "KMP_", "GOMP_", "CUDA_VISIBLE_DEVICES")
"""Prefixes of environment variables that change the speed of products."""


@dataclass(frozen=True, slots=True)
class Rates:
    """FLOP/s of one dtype at one width: the three products of training, and the forward product of a decoding step."""

    forward: float
    by_input: float
    by_weight: float
    decode: float

    @property
    def training(self) -> float:
        """FLOP/s over the three products together."""
        return 3.0 / (1 / self.forward + 1 / self.by_input + 1 / self.by_weight)

    @property
    def engine(self) -> float:
        """FLOP/s of forward products with half of the work in prefill and half in decoding."""
        return 2.0 / (1 / self.forward + 1 / self.decode)


@dataclass(frozen=True, slots=True)
class Machine:
    """A measured machine.

    key: the machine and settings that the measurement is valid for (`key`). device: cpu or cuda. memory: bytes, of the GPU
    if there is one. bandwidth: of memory, bytes/s. rates: by width ("576x1536") and dtype. card: the name of a GPU that was
    looked up and not measured ("" otherwise). link: bytes/s from one GPU to another, 0 = unknown.
    """

    key: str
    device: str
    name: str
    cores: int
    memory: float
    bandwidth: float
    rates: dict[str, dict[Dtype, Rates]] = field(default_factory=dict)
    card: str = ""
    link: float = 0.0

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> Machine:
        """From a mapping as `asdict` gives it."""
        rates = {
            width: {dtype: Rates(**each) for dtype, each in by_dtype.items()}
            for width, by_dtype in tree["rates"].items()
        }
        return Machine(**{**tree, "rates": rates})

    def at(self, width: Width) -> dict[Dtype, Rates]:
        """Rates by dtype at a model's width, or at the measured width with the nearest hidden size."""
        if named := self.rates.get(name_of(width)):
            return named
        return min(self.rates.items(), key=lambda item: abs(int(item[0].partition("x")[0]) - width[0]))[1]

    def best(self, width: Width) -> float:
        """Return the FLOP/s of the faster dtype in training."""
        return max(rates.training for rates in self.at(width).values())


@dataclass(frozen=True, slots=True)
class Choice:
    """A dtype and the reason for it, in words for the user."""

    dtype: Dtype
    why: str


def choose(machine: Machine, width: Width, setting: str, purpose: Literal["training", "engine"]) -> Choice:
    """Choose the dtype of a stage's trainer or engine: the recipe's setting or, for "auto", the dtype measured as faster.

    On a GPU, "auto" is bfloat16 if the GPU supports it.
    """
    speed = {dtype: getattr(rates, purpose) for dtype, rates in machine.at(width).items()}
    # Sorted, so that bfloat16, which takes half the memory, wins a tie.
    fastest = max(sorted(speed), key=lambda dtype: speed[dtype])
    figures = ", ".join(f"{dtype} {speed[dtype] / 1e9:.3g}" for dtype in sorted(speed))
    measured = f"measured at width {name_of(width)}: {figures} GFLOP/s"
    if setting == "auto" and machine.device == "cuda":
        dtype: Dtype = "bfloat16" if "bfloat16" in speed else "float32"
        has = "has" if dtype == "bfloat16" else "lacks"
        return Choice(dtype, f"the GPU ({machine.name}) {has} bfloat16")
    if setting == "auto":
        return Choice(fastest, measured)
    given: Dtype = "bfloat16" if setting == "bfloat16" else "float32"
    if given not in speed:
        return Choice(given, f"as the recipe says; {machine.name} does not support {given} in hardware")
    slower = speed[fastest] / speed[given]
    if slower < 1.5:
        return Choice(given, "as the recipe says")
    return Choice(
        given,
        f"as the recipe says, but its products are {slower:.3g} times slower here than {fastest} ({measured}); "
        "dtype: auto takes the faster one",
    )


def _width(name: str) -> Width:
    hidden, _, inner = name.partition("x")
    return int(hidden), int(inner)


def width_of(config: Mapping[str, Any]) -> Width:
    """(hidden, intermediate) from a transformers config.json; intermediate defaults to four times hidden."""
    config = config.get("text_config") or config
    hidden = int(next((config[k] for k in ("hidden_size", "n_embd", "d_model") if config.get(k)), 1024))
    inner = config.get("intermediate_size") or config.get("n_inner") or config.get("ffn_dim")
    return hidden, int(inner if isinstance(inner, int) else 4 * hidden)


def name_of(width: Width) -> str:
    """A width as text: "576x1536"."""
    return f"{width[0]}x{width[1]}"


# ----------------------------------------------------------------------------------------------- measuring


def measure(widths: Iterable[Width]) -> Machine:
    """Measure in this process; takes about half a second per width. Imports torch."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = DTYPES
    memory, name = memory_bytes(), processor()
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        memory, name = float(properties.total_memory), str(properties.name)
        dtypes = DTYPES if torch.cuda.is_bf16_supported(including_emulation=False) else ("float32",)
    source = torch.ones(32 << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copying = min(busy_seconds(lambda: target.copy_(source), device) for _ in range(REPEATS))
    with torch.inference_mode():
        rates = {name_of(width): _rates(width, dtypes, device) for width in widths}
    return Machine(
        key=key(),
        device=device,
        name=name,
        cores=cores(),
        memory=memory,
        bandwidth=2.0 * source.nbytes / copying,
        rates=rates,
    )


def _rates(width: Width, dtypes: tuple[Dtype, ...], device: str) -> dict[Dtype, Rates]:
    import torch

    hidden, inner = width
    most = int(PRODUCT_FLOPS / (2 * ROWS * hidden)) // 64 * 64
    inner = min(inner, max(256, most))
    operands = {}
    for dtype in dtypes:
        kind = getattr(torch, dtype)
        operands[dtype] = tuple(
            torch.randn(shape, device=device).to(kind) for shape in ((ROWS, hidden), (inner, hidden), (ROWS, inner))
        )

    def product(name: str, dtype: Dtype) -> Callable[[], object]:
        x, w, g = operands[dtype]
        works: dict[str, Callable[[], object]] = {
            "forward": lambda: x @ w.t(),
            "by_input": lambda: g @ w,
            "by_weight": lambda: g.t() @ x,
            "decode": lambda: x[:DECODE_ROWS] @ w.t(),
        }
        return works[name]

    found: dict[Dtype, dict[str, float]] = {dtype: {} for dtype in dtypes}
    for name in ("forward", "by_input", "by_weight", "decode"):
        rows = DECODE_ROWS if name == "decode" else ROWS
        best = _best({dtype: product(name, dtype) for dtype in dtypes}, device)
        for dtype in dtypes:
            found[dtype][name] = 2.0 * rows * hidden * inner / best[dtype]
    return {dtype: Rates(**each) for dtype, each in found.items()}


def _best(works: Mapping[Dtype, Callable[[], object]], device: str) -> dict[Dtype, float]:
    """Seconds of each dtype: the minimum of interleaved runs within REPEATS and PRODUCT_SECONDS; a HOPELESS one runs once."""
    times = {dtype: busy_seconds(work, device) for dtype, work in works.items()}
    spent = dict.fromkeys(works, 0.0)
    for _ in range(REPEATS):
        for dtype, work in works.items():
            if times[dtype] < HOPELESS * min(times.values()) and spent[dtype] < PRODUCT_SECONDS:
                took = busy_seconds(work, device)
                spent[dtype] += took
                times[dtype] = min(times[dtype], took)
    return times


def busy_seconds(work: Callable[[], object], device: str) -> float:
    """Seconds that the work takes on an otherwise idle machine.

    On a CPU this is CPU time: the main thread's, or that of all threads divided by their number if that is more. Wall time
    can be several times as long on a busy machine, CPU time hardly changes because waiting threads do not spin.
    """
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return max(time.perf_counter() - start, 1e-9)
    mine, everybody = time.thread_time(), time.process_time()
    work()
    mine, everybody = time.thread_time() - mine, time.process_time() - everybody
    return max(mine, everybody / torch.get_num_threads(), 1e-9)


# --------------------------------------------------------------------------------------------------- cache


def measured(widths: Iterable[Width], cache: Path) -> Machine:
    """Return this machine: from the cache if it is recent and has these widths, else measured in a separate process.

    cache: a folder for measurements. Raises UserError if the measurement fails.
    """
    wanted = sorted({*widths}) or [(1024, 4096)]
    file = cache / f"{key()}.json"
    known: Machine | None = None
    if file.is_file() and time.time() - file.stat().st_mtime < CACHE_SECONDS:
        try:
            known = Machine.from_json(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError):
            known = None  # truncated, or written by another version: measure again
    missing = [width for width in wanted if known is None or name_of(width) not in known.rates]
    if known is not None and not missing:
        return known
    done = subprocess.run(
        [sys.executable, "-m", "distill.machine", *map(name_of, missing)],
        env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise UserError(f"this machine's speed cannot be measured: {done.stderr.strip()[-500:]}")
    fresh = Machine.from_json(json.loads(done.stdout.splitlines()[-1]))
    if known is not None:
        fresh.rates.update({k: v for k, v in known.rates.items() if k not in fresh.rates})
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(asdict(fresh), indent=1))
    return fresh


def of_run(run: Path, widths: Iterable[Width], cache: Path) -> Machine:
    """Return this machine from the run's environment.json; measured if that is of another machine or lacks a width."""
    wanted = list(widths)
    known = recorded(run)
    if known is not None and known.key == key():
        if all(name_of(width) in known.rates for width in wanted):
            return known
        wanted += [_width(name) for name in known.rates]
    return measured(wanted, cache)


def in_stage(run: Path, width: Width, cache: Path) -> Machine:
    """Return the machine from the run's environment.json; a missing width is measured and added.

    Does not compare `key`: the parent process has done so, and a stage runs with other environment variables.
    """
    known = recorded(run)
    if known is not None and name_of(width) in known.rates:
        return known
    found = measured([width], cache)
    if known is not None:
        found = replace(known, rates={**known.rates, **found.rates})
    file = run / "environment.json"
    write_digested(file, {**(read_digested(file) if file.is_file() else {}), "machine": asdict(found)})
    return found


def recorded(run: Path) -> Machine | None:
    """Return the machine in a run's environment.json; None if there is none, or if the file is not as written."""
    file = run / "environment.json"
    try:
        tree = read_digested(file) if file.is_file() else {}
        return Machine.from_json(tree["machine"]) if "machine" in tree else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def key() -> str:
    """Hash of everything that a measurement depends on: processor, cores, torch version, settings, method."""
    settings = {k: v for k, v in sorted(os.environ.items()) if k.startswith(SETTINGS)}
    settings.pop("OMP_WAIT_POLICY", None)  # stages set it
    torch = importlib.metadata.version("torch")
    return stable_hash(METHOD, platform.node(), processor(), cores(), torch, json.dumps(settings))


def cores() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """The processor's name, as the operating system gives it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory_bytes() -> float:
    """Bytes of memory that this process may use: the machine's, or the control group's limit if that is less."""
    limits = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(file)
        if path.is_file() and (text := path.read_text(encoding="ascii").strip()).isdigit():
            limits.append(float(text))
    return min(limits)


def main(arguments: list[str]) -> None:
    """Measure the widths given as "576x1536" and print the machine as JSON."""
    print(json.dumps(asdict(measure(map(_width, arguments)))))


if __name__ == "__main__":
    main(sys.argv[1:])
