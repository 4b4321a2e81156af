"""The C library's memory, told to keep what training frees.

A step frees its activations and takes as much again in the next. glibc gives such blocks back to the kernel each time and
gets them as new pages, which costs a tenth of a bf16 step on a CPU, and more the more threads take pages at once.
"""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""Parameters of mallopt(3), from glibc's malloc.h."""


def keep_freed() -> None:
    """From here on this process reuses its freed memory; it shrinks only when it ends. Does nothing without glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(MMAP_MAX, 0)  # large blocks too come from the heap
        mallopt(TRIM_THRESHOLD, -1)  # and the heap never shrinks
