"""prune: write a model with fewer layers or narrower ones, in a folder that transformers and vLLM load.

Layers are chosen first, then widths in the layers that are left, then matrices are repaired. All of it is computed in float32
and saved in bfloat16. `pruned.json` in the stage's folder says which layers and channels are left, and how they were chosen.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from distill import models
from distill.compute.flops import ModelShape, forward_flops
from distill.files import write_digested
from distill.models import prune_choice, prune_repair, prune_width
from distill.models.prune_probe import Probe, make_probe, mean_kl, own_targets
from distill.recipe import PruneStage
from distill.records import Cost
from distill.stages.context import Context, Result, save_model
from distill.stages.inputs.prune_traces import read_traces

SAVED = "bfloat16"
RECORD = "pruned.json"


def run(config: PruneStage, context: Context) -> Result:
    folder = context.model_dir(config.model)
    trust = context.trusts(config.model)
    context.phase(f"loading {config.model}")
    model = models.load(folder, dtype="float32" if config.measures else SAVED, trust_remote_code=trust)
    if changed := models.mend_generation_config(model):
        context.say(changed)
    before = models.num_layers(model)
    tokenizer = models.load_tokenizer(folder, trust_remote_code=trust)
    if config.measures:
        model, record, cost = measured(model.eval(), config, context, tokenizer)
    else:
        assert config.layers is not None, "checked by the config"
        record, cost = {"layers_kept": models.prune_layers(model, config.layers)}, Cost()
    context.phase("saving the model")
    fingerprint = save_model(model, tokenizer, context, SAVED, trust_remote_code=trust)
    params = sum(p.numel() for p in model.parameters())
    kept = record["layers_kept"]
    widths = "".join(f", {key} {size}" for key, size in record.get("widths", {}).items())
    context.say(f"kept {len(kept)} of {before} layers{widths}: {params / 1e6:.0f}M parameters")
    write_digested(context.folder / RECORD, {**record, "layers": before, "params": params})
    metrics = {key: value for key, value in record.items() if key != "channels"}
    return Result(cost, {**metrics, "layers_before": before, "params": params}, fingerprint)


@dataclass(slots=True)
class _Work:
    """A model that is being pruned, and its record."""

    model: Any
    fit: Probe
    held: Probe
    record: dict[str, Any] = field(default_factory=dict)


def measured(model: Any, config: PruneStage, context: Context, tokenizer: Any) -> tuple[Any, dict[str, Any], Cost]:
    """Prune a model by what it does on traces; return it, the record and the cost of the forward passes."""
    import torch

    new = None
    if config.narrows:
        new = prune_width.new_widths(model.config, config.hidden, config.ffn, config.heads)
    context.phase("reading the traces")
    traces = read_traces(config, context, tokenizer)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device)
    every = prune_repair.HELD
    held = traces[every - 1 :: every] if config.repair else []
    fit = [trace for n, trace in enumerate(traces) if not config.repair or n % every != every - 1]
    work = _Work(model, make_probe(fit, device), make_probe(held, device))
    shape = ModelShape.from_config(model.config.to_dict())
    for probe in (work.fit, work.held):
        own_targets(model, probe)
    if config.repair:
        prune_repair.check_repairable(model, work.fit)
    kept = _choose_layers(work, config, context)
    streams = None
    if config.repair:
        context.phase("recording the whole model's hidden states")
        streams = prune_repair.streams_of(model, work.fit, kept, middle=config.narrows)
    total = models.num_layers(model)
    work.record["layers_kept"] = models.prune_layers(model, kept)
    if new is not None:
        streams = _cut_width(work, new, streams, context)
    if streams is not None:
        context.phase("repairing")
        sites = prune_repair.sites_of(kept, total, narrowed=config.narrows)
        done = prune_repair.repair(work.model, work.fit, work.held, streams, sites)
        work.record["repair"] = dataclasses.asdict(done)
        context.say(_said(done))
    if work.held.batches or work.fit.batches:
        work.record["kl"] = mean_kl(work.model, work.held if config.repair else work.fit)
    return work.model, work.record, _cost(shape, work, total)


def _choose_layers(work: _Work, config: PruneStage, context: Context) -> list[int]:
    total = models.num_layers(work.model)
    if config.layers is None:
        return list(range(total))
    models.check_layers(config.layers, total)
    if config.by == "importance":
        live = context.live(total - config.layers, "layers")
        kept, removed = prune_choice.greedy_layers(work.model, work.fit, config.layers, progress=live.update)
        live.close()
        work.record["removed"] = [dataclasses.asdict(one) for one in removed]
        return kept
    if config.by == "block_influence":
        context.phase("measuring block influence")
        kept, influence = prune_choice.least_influence(work.model, work.fit, config.layers)
        work.record["block_influence"] = influence
        return kept
    return models.kept_layers(total, config.layers)


def _cut_width(
    work: _Work, new: prune_width.Widths, streams: prune_repair.Streams | None, context: Context
) -> prune_repair.Streams | None:
    """Cut the widths of the model in place of `work`; return the streams of the channels that are left."""
    context.phase("ranking channels")
    channels, shares = prune_width.rank_channels(work.model, work.fit, new)
    work.model = prune_width.cut_width(work.model, channels, shares)
    work.record["widths"] = {key: value for key, value in dataclasses.asdict(new).items() if key != "groups"}
    work.record["channels"] = dataclasses.asdict(channels)
    return None if streams is None else streams.at(channels.hidden)


def _said(done: prune_repair.Repair) -> str:
    if done.strength is None:
        return f"repair: no fit was better on the held-out positions ({done.before:.3g} nats), so none was made"
    return f"repair of {len(done.fitted)} layers: {done.before:.3g} to {done.after:.3g} nats on the held-out positions"


def _cost(shape: ModelShape, work: _Work, layers: int) -> Cost:
    """The cost of all forward passes, in tokens that passed all layers of the whole model."""
    probes = (work.fit, work.held)
    layer_tokens = sum(probe.layer_tokens for probe in probes)
    rows = [int(n) for probe in probes for batch in probe.batches for n in batch.valid_NT.sum(1)]
    context = sum(n * (n + 1) / 2 for n in rows) / max(sum(rows), 1)
    heads = sum(probe.heads for probe in probes)
    return Cost(
        tokens_scored=round(layer_tokens / layers),
        flops=forward_flops(shape.with_layers(1), layer_tokens, context, heads),
    )
