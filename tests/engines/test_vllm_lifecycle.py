"""What a vLLM engine does to its process: the group of processes that it finds, and the order of sleep, new weights and waking."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distill import engines
from distill.recipe import EngineConfig

pytestmark = pytest.mark.slow

GROUP = """
import os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from distill import engines
from distill.recipe import EngineConfig
config = EngineConfig(fn="vllm", dtype="float32", kv_cache_gib=0.1)
os.environ.update(engines.environment(config))
folder, own = Path(sys.argv[1]), sys.argv[2] == "own"
if own:
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=0, world_size=1)
    group = dist.group.WORLD
for _ in range(2):
    engines.open_engine(config, folder, max_model_len=64, max_top_k=1).close()
assert dist.is_initialized() is own
if own:
    assert dist.group.WORLD is group
    dist.all_reduce(torch.ones(1))
print("DONE")
"""


def skip_without_vllm() -> None:
    if engines.expected(EngineConfig()) != "vllm":
        pytest.skip("vLLM is not installed")


@pytest.mark.parametrize("whose", ["own", "none"])
def test_a_group_that_was_there_before_the_engine_is_there_after_it(tiny_dir: Path, tmp_path: Path, whose: str) -> None:
    """A group of one process, as accelerate or an embedding program makes it; without one the engine's is gone with it."""
    skip_without_vllm()
    done = subprocess.run(
        [sys.executable, "-c", GROUP, str(tiny_dir), whose, str(tmp_path / "store")],
        capture_output=True, text=True, check=False, env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "DONE" in done.stdout


class Recorder:
    """In place of vllm.LLM: what an engine asks of it, in order. A sleeping engine cannot be had without a GPU."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        core = SimpleNamespace(batch_queue=["a step behind the last request"])
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(engine_core=core), step=self.step)

    def step(self) -> None:
        self.asked.append("step")
        self.llm_engine.engine_core.engine_core.batch_queue.clear()

    def sleep(self, level: int) -> None:
        self.asked.append(("sleep", level))

    def wake_up(self, tags: list[str]) -> None:
        self.asked.append(("wake", tags))

    def collective_rpc(self, method: Any, args: tuple[Any, ...] = ()) -> list[Any]:
        if method.__name__ == "_reload":
            self.asked.append(("weights", [name for name, _ in args[0]]))
        return [(set(), set())]

    def reset_prefix_cache(self) -> bool:
        self.asked.append("prefix cache")
        return True


def test_an_engine_sleeps_once_and_wakes_weights_first_and_its_cache_last():
    skip_without_vllm()
    import torch

    from distill.engines.vllm import VllmEngine

    engine = object.__new__(VllmEngine)
    engine._llm = llm = Recorder()
    engine._live, engine._tied, engine._across, engine._float32_head = set(), False, False, False
    engine._sleeps, engine._asleep, engine.version = True, False, 0
    weights = [("a", torch.ones(1))]
    engine.sync(weights, version=1)
    assert llm.asked == ["step", ("weights", ["a"]), "prefix cache"]
    llm.asked.clear()
    engine.sleep()
    engine.sleep()
    engine.sync(weights, version=2)
    woken = [("wake", ["weights"]), ("weights", ["a"]), ("wake", ["kv_cache"]), "prefix cache"]
    assert llm.asked == [("sleep", 2), *woken]
    assert engine.version == 2
    llm.asked.clear()
    engine._sleeps = False
    engine.sleep()
    assert llm.asked == []
    engine._live, engine._sleeps = {"0"}, True
    with pytest.raises(RuntimeError, match="in flight"):
        engine.sleep()
