"""Checks of smoke_checks.py that run engines and recipes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from smoke_context import Context, Skipped

from distill import engines, models
from distill.recipe import EngineConfig
from distill.records import Request, Sampling

ROOT = Path(__file__).resolve().parents[2]


def _trainer_logp(at: Context, model: Any, completions: list[Any], prompts: dict[str, Any]) -> list[Any]:
    """The log-probabilities of completions under the trainer's model."""
    from distill.training.loss.objective import StoredObjective
    from distill.training.loss.sparse import cross_entropy
    from distill.training.packing import Example, pack
    from distill.training.policy import Policy, StudentModule

    policy = Policy(StudentModule(model, StoredObjective(cross_entropy), 49152), None, at.device)
    (batch,) = pack([Example(c.request_id, prompts[c.request_id], c.ids_T) for c in completions], micro_tokens=4096)
    logp_T = policy.logp(batch)
    ends = dict(zip(batch.trace_ids, batch.doc_offsets[1:], strict=False))
    return [logp_T[ends[c.request_id] - 1 - len(c.ids_T) : ends[c.request_id] - 1] for c in completions]


def _engine(at: Context, config: EngineConfig) -> str:
    """Generate, score what was generated, compare with the trainer; new weights, and compare again."""
    engine = engines.open_engine(config, at.model_dir(), max_model_len=128, max_top_k=16)
    if config.fn == "vllm":
        at.facts["cuda_graphs"] = at.gpu and not engine._llm.llm_engine.vllm_config.model_config.enforce_eager
    rng = np.random.default_rng(0)
    prompts = {str(n): rng.integers(100, 1000, 8 + n).astype(np.int32) for n in range(6)}
    asked = [Request(key, ids, seed=n) for n, (key, ids) in enumerate(prompts.items())]
    done = sorted(engine.generate(asked, Sampling(max_tokens=24), top_k=16), key=lambda c: c.request_id)
    assert len(done) == 6
    assert all(c.top is not None and len(c.ids_T) for c in done)
    to_score = [Request(c.request_id, prompts[c.request_id], completion_ids=c.ids_T) for c in done]

    def gap(mine: Any, theirs: Any, what: str) -> str:
        off = float(np.abs(np.concatenate(list(mine)) - np.concatenate(list(theirs))).mean())
        assert off < at.near, f"{what}: log-probabilities differ by {off:.1e} nats on average"
        return f"{what} {off:.0e}"

    scored = [c.logprob_T for c in engine.score(to_score, top_k=16)]
    model = at.model().eval()
    found = [
        gap(scored, [c.logprob_T for c in done], "score against generate"),
        gap(scored, _trainer_logp(at, model, done, prompts), "against the trainer"),
    ]
    sleeping = config.sleep and hasattr(engine, "sleep")
    if sleeping:
        before = torch.cuda.mem_get_info()[0]
        engine.sleep()
        torch.cuda.empty_cache()
        found.append(f"sleep frees {(torch.cuda.mem_get_info()[0] - before) / 2**30:.1f} GiB")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.02 * torch.randn_like(parameter))
    engine.sync(models.exported_weights(model), version=1)
    rescored = [c.logprob_T for c in engine.score(to_score, top_k=16)]
    moved = float(np.abs(np.concatenate(rescored) - np.concatenate(scored)).mean())
    assert moved > 2 * at.near, f"new weights move the log-probabilities by {moved:.1e} only"
    found.append(gap(rescored, _trainer_logp(at, model, done, prompts), "after a sync" + " and a sleep" * sleeping))
    at.facts["weights_moved_by"] = moved
    engine.close()
    return "nats: " + ", ".join(found)


def transformers_engine(at: Context) -> str:
    return _engine(at, EngineConfig(fn="transformers", dtype=at.dtype))


def vllm_engine(at: Context) -> str:
    if engines.expected(EngineConfig(fn="auto")) != "vllm":
        raise Skipped("vLLM is not installed")
    on_gpu = {"memory_share": 0.5, "sleep": True} if at.gpu else {}
    found = _engine(at, EngineConfig(fn="vllm", dtype=at.dtype, kv_cache_gib=0.5, **on_gpu))
    return f"{'with' if at.facts['cuda_graphs'] else 'without'} CUDA graphs; {found}"


# -------------------------------------------------------------------------------------------------------- recipes

SHORT = (
    "stages.cold_start.steps=8", "stages.teacher.steps=2", "stages.teacher.prompts=4", "stages.traces.problems=64", "stages.unseen.problems=16",
    "stages.clean.keep=[{fn: length, max_tokens: 1000}]", "stages.kl.epochs=null", "stages.kl.steps=4", "stages.kl.keep_truncated=true",
    "stages.sft.epochs=null", "stages.sft.steps=4", "stages.sft.keep_truncated=true", "stages.verdict.problems=32",
    *(f"stages.{stage}.engine.fn=transformers" for stage in ("teacher", "traces", "unseen", "verdict")),
)  # fmt: skip


def _distill_run(at: Context, runs: str, *overrides: str) -> None:
    command = [
        sys.executable,
        "-m",
        "distill.cli",
        "run",
        "recipes/quickstart.yaml",
        "--runs",
        str(at.folder / runs),
        *overrides,
    ]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def recipe(at: Context) -> str:
    """The quickstart with few steps: training, RL, traces, two students, a comparison, a report."""
    _distill_run(at, "recipe", *SHORT)
    report = json.loads((at.folder / "recipe" / "quickstart" / "report.json").read_text())
    return f"quickstart in short: {len(report['arms'])} models compared"


def two_processes(at: Context) -> str:
    """A stage on two GPUs, sharded."""
    if torch.cuda.device_count() < 2:
        raise Skipped("needs two GPUs")
    sharded = "stages.cold_start.distributed={processes: 2, strategy: fsdp2}"
    _distill_run(at, "two", "--only", "cold_start", "stages.cold_start.steps=4", sharded)
    return "four steps over two GPUs (fsdp2)"
