"""Says in at most ten minutes what works on this machine's GPU: `make gpu-smoke`. Needs no network and no test packages.

    python tests/gpu/smoke.py [--cpu] [--only NAME ...] [--report gpu-smoke.json] [--minutes 10]

Each check (`smoke_checks`) runs in a process of its own, so that a crash, a hang or an illegal memory access ends that check
only. A line a check: ok, failed or skipped, seconds, peak memory, and what was found. The report, a JSON file, has the same
with the errors in full: post it when something fails. --cpu runs what makes sense without a GPU.

Exit code: 0, 1 if a check failed, 3 if there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CHECKS = HERE / "smoke_checks.py"
NAMES = (
    "machine", "kernels", "attention", "kl_of_itself", "train_step", "resume", "transformers_engine", "vllm_engine",
    "recipe", "two_processes",
)  # fmt: skip
ON_A_GPU = ("vllm_engine", "recipe", "two_processes")
"""Of these, a CPU's own tests and `make quickstart` are the better check."""
SECONDS_EACH = 240
"""The longest that one check may take."""
NO_GPU, FAILED = 3, 1


def run_check(name: str, device: str, folder: Path, seconds: float, script: Path = CHECKS) -> dict[str, Any]:
    """Run one check in a process of its own and return its result: name, status, detail, seconds, peak_gib, error."""
    result_file = folder / f"{name}.json"
    command = [sys.executable, str(script), name, device, str(folder), str(result_file)]
    path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    began = time.monotonic()
    # A session of its own, so that the processes that a check starts end with it.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"},
    )  # fmt: skip
    try:
        said = process.communicate(timeout=seconds)[0]
        ended = ""
    except subprocess.TimeoutExpired:
        ended = f"not done after {seconds:.0f} seconds"
    if ended or process.returncode != 0:
        _end(process)
    result: dict[str, Any] = {"name": name, "status": "failed", "detail": ended, "peak_gib": None, "error": ""}
    if ended:
        result["error"] = process.communicate()[0][-4000:]
    elif result_file.is_file():
        result |= json.loads(result_file.read_text(encoding="utf-8"))
    else:
        result |= {"detail": f"the process ended: {_status(process.returncode)}", "error": said[-4000:]}
    return {**result, "seconds": round(time.monotonic() - began, 1)}


def _skipped(name: str, reason: str) -> dict[str, Any]:
    return {"name": name, "status": "skipped", "detail": reason, "seconds": 0.0, "peak_gib": None, "error": ""}


def _end(process: subprocess.Popen[str]) -> None:
    """Kill what is left of a check's processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _status(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def line(result: dict[str, Any]) -> str:
    """Return a check's line."""
    peak = "" if result["peak_gib"] is None else f"{result['peak_gib']:.1f} GiB"
    return f"{result['status']:<8} {result['name']:<20} {result['seconds']:>6.1f} s {peak:>9}  {result['detail']}"


def main(arguments: list[str] | None = None) -> int:
    """Run the checks; return the exit code."""
    parser = argparse.ArgumentParser(description="Say what works on this machine's GPU.")
    parser.add_argument("--cpu", action="store_true", help="run the checks that make sense without a GPU")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--report", type=Path, default=Path("gpu-smoke.json"), help="the JSON file to write")
    parser.add_argument("--minutes", type=float, default=10.0, help="no check starts later than this")
    asked = parser.parse_args(arguments)
    device, results = ("cpu" if asked.cpu else "cuda"), []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-smoke-") as folder:
        machine = run_check("machine", device, Path(folder), SECONDS_EACH)
        if not asked.cpu and machine.get("gpus") == 0:
            print(f"no GPU: {machine['detail']} (--cpu runs the checks that make sense without one)")
            return NO_GPU
        for name in asked.only:
            left = 60 * asked.minutes - (time.monotonic() - began)
            if name == "machine":
                result = machine
            elif asked.cpu and name in ON_A_GPU:
                result = _skipped(name, "needs a GPU")
            elif left < 5:
                result = _skipped(name, "the time is over (--minutes)")
            else:
                result = run_check(name, device, Path(folder), min(SECONDS_EACH, left))
            results.append(result)
            print(line(result), flush=True)
    failed = [result["name"] for result in results if result["status"] == "failed"]
    report = {"device": device, "seconds": round(time.monotonic() - began, 1), "failed": failed, "checks": results}
    asked.report.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"{len(failed)} failed; the report is {asked.report}")
    return FAILED if failed else 0


if __name__ == "__main__":
    sys.exit(main())
