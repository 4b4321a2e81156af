"""Freed memory stays in the process: allocating it again costs no page faults."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
from distill.training import malloc
if sys.argv[1] == "keep":
    malloc.keep_freed()
def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(40 << 18)  # 40 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(20)
print(faults(20))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's mallopt")
def test_freed_memory_is_allocated_again_without_page_faults():
    def faults(mode):
        command = [sys.executable, "-c", SCRIPT, mode]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    pages = 20 * 10240  # of 4 KiB
    assert faults("keep") < 0.1 * pages
    assert faults("as it is") > 0.5 * pages
