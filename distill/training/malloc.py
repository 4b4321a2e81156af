"""Keep freed memory in the process instead of returning it to the kernel (glibc's malloc).

Each training step frees its activations and allocates as much again. By default glibc returns such blocks to the kernel
and gets them back as new pages, which costs a tenth of a bf16 step on a CPU, and more with more threads.
"""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""Parameters of mallopt(3), from glibc's malloc.h."""


def keep_freed() -> None:
    """Make this process reuse its freed memory until it ends. Does nothing without glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(MMAP_MAX, 0)  # large blocks too come from the heap
        mallopt(TRIM_THRESHOLD, -1)  # and the heap never shrinks
