"""prune: write a model with fewer layers, in a folder that transformers and vLLM load."""

from __future__ import annotations

from distill import models
from distill.recipe import PruneStage
from distill.records import Cost
from distill.stages.context import Context, Result, save_model

SAVED = "bfloat16"


def run(config: PruneStage, context: Context) -> Result:
    folder = context.model_dir(config.model)
    trust = context.trusts(config.model)
    context.phase(f"loading {config.model}")
    model = models.load(folder, dtype=SAVED, trust_remote_code=trust)
    if changed := models.mend_generation_config(model):
        context.say(changed)
    before = models.num_layers(model)
    kept = models.prune_layers(model, config.layers)
    context.phase("saving the model")
    tokenizer = models.load_tokenizer(folder, trust_remote_code=trust)
    fingerprint = save_model(model, tokenizer, context, SAVED, trust_remote_code=trust)
    params = sum(p.numel() for p in model.parameters())
    context.say(f"kept {len(kept)} of {before} layers: {params / 1e6:.0f}M parameters")
    return Result(Cost(), {"layers_kept": kept, "params": params}, fingerprint)
