"""A process that runs a generate stage in a fork of itself for every line on stdin, so that the fork can be killed at any moment.

In: a line with the folder of the run and the endpoint's address. Out: the fork's process id, and when it has ended, its status.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import warm
from scored_runs import SUMS

WORK = {"problems": 40, "samples": 8, "sampling": {"max_tokens": 6}, "top_logprobs": 5, "shard_rows": 48}


def stage(run: Path, url: str, folder: str) -> int:
    import io

    from distill import recipe
    from distill.progress import Screen
    from distill.stages import generate
    from distill.stages.context import Context

    engine = {"fn": "openai", "base_url": url, "model": "tiny", "batch_size": 4, "key": "$SERVED_KEY"}
    tree = {
        "name": "t",
        "models": {"a": folder},
        "tasks": {"sums": SUMS},
        "stages": {"traces": {"kind": "generate", "model": "a", "task": "sums", "engine": engine, **WORK}},
    }
    ctx = Context(recipe=recipe.validate(tree), run=run, name="traces", screen=Screen(io.StringIO()))
    ctx.folder.mkdir(parents=True, exist_ok=True)
    generate.run(ctx.recipe.stages["traces"], ctx)
    return 0


def serve() -> None:
    import importlib

    for module in (*warm.IMPORTS, "distill.engines.served.engine"):
        importlib.import_module(module)
    from distill import models

    # What every attempt would do in the same way takes a second each: done once, before the forks.
    load = functools.cache(models.load_tokenizer)
    models.load_tokenizer = lambda folder, **options: load(Path(folder))  # type: ignore[assignment]
    models.tokenizer_fingerprint = functools.cache(models.tokenizer_fingerprint)  # type: ignore[assignment]
    for line in sys.stdin:
        run, url, folder = line.split()
        tokenizer = models.load_tokenizer(Path(folder))
        models.tokenizer_fingerprint(tokenizer)
        gc.freeze()
        pid = warm.fork(lambda run=run, url=url, folder=folder: stage(Path(run), url, folder), dict(os.environ))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
