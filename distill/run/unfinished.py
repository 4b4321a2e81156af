"""Describe what an unfinished stage has on disk to resume from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def kept(folder: Path, config: Any) -> str:
    """What a stage can resume from, such as "the checkpoint of step 10 of 24" or "320 of 640 traces"; "" if nothing.

    folder: the stage's folder. config: its config, for the total number.
    """
    steps = sorted(folder.glob("checkpoints/step-*/state.json"))
    if steps:
        step = int(steps[-1].parent.name.removeprefix("step-"))
        total = getattr(config, "steps", None)
        return f"the checkpoint of step {step}{f' of {total}' if total else ''}"
    try:
        manifests = [json.loads(path.read_bytes()) for path in folder.glob("traces/manifest-*.json")]
        rows = sum(shard["rows"] for manifest in manifests for shard in manifest["shards"])
    except (ValueError, TypeError, KeyError):
        return ""  # the next start says what is damaged
    if not rows:
        return ""
    problems, samples = getattr(config, "problems", None), getattr(config, "samples", None)
    return f"{rows}{f' of {problems * samples}' if problems and samples else ''} traces"
