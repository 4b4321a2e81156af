"""Killed while vLLM writes: the stage, run again, adds exactly the missing traces and reports the same metrics."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distill.traces.reader import open_traces
from distill.traces.verify import verify

HERE = Path(__file__).parent

# vLLM is loaded once; every child is a fork that runs the stage with it, on one thread, which is all that survives.
STAGE = """
    import io, os, random, sys, time, traceback
    from pathlib import Path
    import pandas, torch
    torch.set_num_threads(1)
    from distill import engines, recipe
    from distill.progress import Screen
    from distill.stages import generate, sampling
    from distill.stages.context import Context
    model, out, num_kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    sums = {"fn": "reasoning_gym", "dataset": "chain_sum",
            "options": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}}
    stage = {"kind": "generate", "model": "a", "task": "sums", "problems": 48, "samples": 2, "top_logprobs": 8,
             "mass": 0.9, "shard_rows": 8, "sampling": {"max_tokens": 12},
             "engine": {"fn": "vllm", "dtype": "float32", "batch_size": 8}}
    tree = recipe.validate({"name": "t", "models": {"a": model}, "tasks": {"sums": sums}, "stages": {"traces": stage}})
    config = tree.stages["traces"]
    engine = engines.open_engine(config.engine, Path(model), max_model_len=128, max_top_k=8)
    engines.open_engine = lambda *_, **options: engine
    engine.close = lambda: None
    sampling.BLOCK_ROWS = 8
    draw = random.Random(3)

    def shards(run):
        return len(list((run / "traces" / "traces").glob("shard-*.parquet")))

    def attempt(run, goal=None):
        '''Whether the stage was killed: soon after it had written as many shards.'''
        (run / "traces").mkdir(parents=True, exist_ok=True)
        child = os.fork()
        if child == 0:
            try:
                generate.run(config, Context(recipe=tree, run=run, name="traces", screen=Screen(io.StringIO())))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        ended, status = 0, 0
        while goal is not None and not ended:
            if shards(run) >= goal:
                time.sleep(draw.uniform(0, 0.1))
                os.kill(child, 9)
                break
            time.sleep(0.002)
            ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status):
            sys.exit("a stage failed")
        return os.WIFSIGNALED(status)

    attempt(out / "whole")
    killed, halfway = 0, 0
    for kill in range(num_kills):
        killed += attempt(out / "killed", shards(out / "killed") + draw.randint(0, 3))
        halfway += 0 < shards(out / "killed") < shards(out / "whole")
    attempt(out / "killed")
    print("killed", killed, "halfway", halfway)
"""


@pytest.mark.slow
@pytest.mark.fault(3)
def test_killed_while_vllm_writes_the_traces_are_those_of_an_uninterrupted_run(tiny_dir, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", re.sub(r"^    ", "", STAGE, flags=re.M), str(tiny_dir), str(tmp_path), "5"],
        capture_output=True, text=True, env=environment, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    killed, halfway = map(int, re.search(r"killed (\d+) halfway (\d+)", run.stdout).groups())
    assert killed >= 3
    assert halfway >= 2
    whole, killed_at = (tmp_path / name / "traces" / "traces" for name in ("whole", "killed"))
    assert verify(killed_at).ok
    assert not verify(killed_at).notes
    want, got = (
        {i: (b, n) for b in open_traces(path).blocks() for n, i in enumerate(b.trace_id)} for path in (whole, killed_at)
    )
    assert want.keys() == got.keys()
    assert sum(shard.rows for shard in open_traces(killed_at).shards) == len(got) == 96
    same = 0
    for trace_id, (block, n) in got.items():
        other, m = want[trace_id]
        assert block.messages[n] == other.messages[m]
        if not np.array_equal(block.completion_ids[n], other.completion_ids[m]):
            continue  # a draw on the edge between two tokens, in other company
        same += 1
        np.testing.assert_allclose(block.logprob[n], other.logprob[m], atol=2e-3)
        np.testing.assert_allclose(block.top_of(n).tail_T, other.top_of(m).tail_T, atol=0.1)
    assert same >= 92
