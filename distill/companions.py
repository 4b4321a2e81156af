"""Hide builds of torch's companion packages that cannot be loaded beside a CPU build of torch.

vLLM's build for CPUs requires torchvision, torchaudio and torchcodec. Without PyTorch's own package index, installers choose their
builds for CUDA; importing one beside a CPU build of torch fails, and with it the import of peft and of vLLM. Nothing in distill uses
them, so they are made invisible in this process, as if they were not installed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


def hide() -> None:
    """Make companions of another build than torch's invisible: importing them raises ImportError."""
    for name in misfits():
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def misfits(paths: Iterable[str] | None = None, machine: str | None = None) -> Mapping[str, str]:
    """Return the versions of the installed companions that are of another build than a CPU build of torch.

    paths: folders of installed packages, sys.path by default. machine: processor, this one's by default; only x86_64 has builds
    for CUDA under the same names. Reads folder names only, which takes less than a millisecond each.
    """
    found: dict[str, str] = {}
    for folder in sys.path if paths is None else paths:
        try:
            entries = os.listdir(folder or ".")
        except OSError:  # a path that does not exist, or a zip file
            continue
        for entry in entries:
            name, _, version = entry.removesuffix(".dist-info").partition("-")
            if entry.endswith(".dist-info") and (name == "torch" or name in COMPANIONS):
                found.setdefault(name, version)
    build = _build(found.pop("torch", ""))
    if build != "cpu" or (machine or os.uname().machine) != "x86_64":
        return {}
    return {name: version for name, version in sorted(found.items()) if _build(version) != build}


def _build(version: str) -> str:
    """The build in a version: "cpu" in 2.13.0+cpu."""
    return version.partition("+")[2]
