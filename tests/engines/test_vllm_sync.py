"""New weights in a live vLLM engine, by architecture: after a sync its log-probabilities are the new model's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distill import engines
from distill.recipe import EngineConfig

HEADS = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma": HEADS,
    "gemma2": {**HEADS, "sliding_window": 512},
    "gemma3_text": {**HEADS, "sliding_window": 512},
    "gpt2": {"hidden_size": 64, "num_attention_heads": 2},
    "opt": {"hidden_size": 64, "num_attention_heads": 2, "word_embed_proj_dim": 64, "ffn_dim": 64},
    "qwen3": HEADS,
    "qwen3_moe": {**HEADS, "moe_intermediate_size": 32},
    "mixtral": HEADS,
    "olmo2": HEADS,
}
TRAINER = """
import io, json, sys
sys.path[:0] = json.loads(sys.argv[1])
import torch
from pathlib import Path
from tiny_architectures import build
from distill import engines, models, recipe
from distill.progress import Screen
from distill.recipe import EngineConfig, LoraConfig
from distill.records import UserError
from distill.stages.context import Context
from distill.stages.sync_proof import prove_sync
model_type, fields, tokenizer, folder, adapted = json.loads(sys.argv[2])
tokenizer = models.load_tokenizer(tokenizer)
models.save(build(model_type, len(tokenizer), **fields), tokenizer, folder)
config = EngineConfig(fn="vllm", dtype="float32", kv_cache_gib=0.2)
engine = engines.open_engine(config, Path(folder), max_model_len=64, max_top_k=4)
model = models.load(folder, dtype="float32")
if adapted:
    model = models.add_lora(model, LoraConfig(rank=4))
stages = {"s": {"kind": "prune", "model": "base", "layers": 2}}
resolved = recipe.validate({"name": "t", "models": {"base": folder}, "stages": stages})
context = Context(recipe=resolved, run=Path(folder), name="s", screen=Screen(io.StringIO()))
before = {name: p.detach().clone() for name, p in model.named_parameters()}
prove_sync(engine, model, len(tokenizer), context)
assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), "the trainer's weights moved"
if adapted:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
engine.sync(models.exported_weights(model), version=1)
prove_sync(engine, model, len(tokenizer), context)
whole, old = engine.sync, {name: w.clone() for name, w in models.exported_weights(model)}
engine.sync = lambda weights, version: whole(
    ((name, old[name] if "embed" in name or "wte" in name else w) for name, w in weights), version
)
try:
    prove_sync(engine, model, len(tokenizer), context)
except UserError as error:
    print("REFUSED", error)
print("DONE")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "adapted"), [*((name, False) for name in FAMILIES), ("qwen3", True)])
def test_new_weights_reach_a_live_engine(model_type: str, adapted: bool, tokenizer: Any, tmp_path: Path) -> None:
    """Real vLLM, in a process of its own. The proof holds, puts the trainer's weights back, and finds an embedding that stays old."""
    if engines.expected(EngineConfig()) != "vllm":
        pytest.skip("vLLM is not installed")
    given = [model_type, FAMILIES[model_type], str(tokenizer.name_or_path), str(tmp_path / "m"), adapted]
    environment = {**os.environ, **engines.environment(EngineConfig(fn="vllm", dtype="float32"))}
    command = [sys.executable, "-c", TRAINER, json.dumps([p for p in sys.path if p]), json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert "DONE" in done.stdout, done.stderr[-2000:]
    assert "REFUSED stages.s.engine: the engine keeps old weights after a sync" in done.stdout
