"""Compiles what the product launches, for GPUs that are not here, and reads the resources of the machine code.

The product's own launch code runs on meta tensors, and `Compiled` stands for its kernels: each launch is compiled as Triton
compiles it on such a GPU (types, divisibility of pointers and sizes, number of warps), and nothing runs. So a new block
size, number of warps or type is measured without a list of them here.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

THREADS_PER_WARP = 32
REGISTERS_PER_THREAD = 255
REGISTERS_PER_BLOCK = 65_536
REGISTERS_ARE_GIVEN_BY = 256
"""A warp takes its registers in pieces of this many."""

SHARED_KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Shared memory that one block can have, KiB, by compute capability (CUDA programming guide, technical specifications)."""

TARGETS = tuple(SHARED_KIB)


class Resources(NamedTuple):
    """What a kernel takes. registers: by thread. shared: bytes by block. local: bytes by thread outside registers (spills)."""

    kernel: str
    constants: str
    warps: int
    registers: int
    shared: int
    local: int

    def excess(self, capability: int) -> list[str]:
        """Return what does not fit a GPU, in words."""
        threads = self.warps * THREADS_PER_WARP
        by_warp = -(-self.registers * THREADS_PER_WARP // REGISTERS_ARE_GIVEN_BY) * REGISTERS_ARE_GIVEN_BY
        limits = {
            "bytes of spills": (self.local, 0),
            "registers of a thread": (self.registers, REGISTERS_PER_THREAD),
            "registers of a block": (by_warp * self.warps, REGISTERS_PER_BLOCK),
            "bytes of shared memory": (self.shared, SHARED_KIB[capability] << 10),
            "threads": (threads, 1024),
        }
        return [f"{have} {what}, at most {most}" for what, (have, most) in limits.items() if have > most]


class Compiled:
    """Stands for a module of Triton kernels: a launch compiles the kernel and notes its resources in `taken`."""

    def __init__(self, source: Any, folder: Path) -> None:
        self.source, self.folder = source, folder
        self.taken: dict[str, Resources] = {}

    def __getattr__(self, name: str) -> _Launcher:
        return _Launcher(self, name)


class _Launcher:
    def __init__(self, owner: Compiled, name: str) -> None:
        self.owner, self.name = owner, name

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **constants: Any) -> None:
            kernel = getattr(self.owner.source, self.name).warmup(*args, grid=grid, **constants)
            if kernel.hash not in self.owner.taken:
                self.owner.taken[kernel.hash] = _resources(kernel, self.owner.folder, f"{self.name} {constants}")

        return launch


class _Elsewhere:
    """The part of Triton's driver that compiling asks for, of a GPU that is not here."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 9000 + self.capability  # not the number of a device that is here: compiled kernels are kept by it

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, THREADS_PER_WARP)


@contextlib.contextmanager
def as_if_on(capability: int) -> Iterator[None]:
    """Compile for a compute capability (90 for 9.0) inside the context."""
    before = driver._active  # `reset_active` asks for a GPU
    driver.set_active(_Elsewhere(capability))
    try:
        yield
    finally:
        driver._active = before


def _resources(kernel: Any, folder: Path, constants: str) -> Resources:
    """Read a kernel's machine code."""
    binary = folder / f"{kernel.hash}.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (registers, stack, local) = (int(re.search(rf"{name}:(\d+)", said)[1]) for name in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    meta = kernel.metadata
    # What ptxas counts as shared holds a part that the system reserves on newer GPUs; the launch asks for `meta.shared`.
    return Resources(meta.name, constants, meta.num_warps, registers, meta.shared, stack + local)
