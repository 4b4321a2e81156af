"""Layers and widths chosen by measurement, and the repair: against models that are really pruned, masked or enumerated."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_architectures import build
from transformers import AutoModelForCausalLM

from distill import models
from distill.models import prune_choice, prune_probe, prune_repair, prune_width
from distill.models.prune import decoder_layers
from distill.models.prune_probe import Probe, ProbeTrace, make_probe, mean_kl, own_targets
from distill.models.prune_width import Channels, Widths
from distill.records import TopK, UserError


def traces(num: int, seed: int = 0) -> list[ProbeTrace]:
    rng = np.random.default_rng(seed)
    return [
        ProbeTrace(rng.integers(1, 500, rng.integers(2, 6)), rng.integers(1, 500, rng.integers(4, 9)), None)
        for _ in range(num)
    ]


def loud(model_type: str, **fields: Any) -> Any:
    """A tiny model whose layers do something: random weights are small."""
    model = build(model_type, 512, **fields).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4)
    return model


def probe_of(model: Any, num: int = 6, seed: int = 0) -> Probe:
    probe = make_probe(traces(num, seed))
    own_targets(model, probe)
    return probe


def logits(model: Any, ids: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0].double()


def plain_kl(model: Any, probe: Probe, given: list[ProbeTrace]) -> float:
    """mean_kl trace by trace in float64, the tail taken token by token."""
    total, num = 0.0, 0
    by_row = {tuple(row[valid].tolist()): (batch, n) for batch in probe.batches
              for n, (row, valid) in enumerate(zip(batch.ids_NT, batch.valid_NT, strict=True))}  # fmt: skip
    for trace in given:
        ids = np.concatenate([trace.prompt_ids, trace.completion_ids])
        batch, n = by_row[tuple(ids.tolist())]
        logq = logits(model, ids).log_softmax(-1)
        for p in torch.nonzero(batch.row_P == n)[:, 0].tolist():
            q = logq[int(batch.column_P[p])]
            kept = {int(i): float(x) for i, x in zip(batch.ids_PK[p], batch.logp_PK[p], strict=True) if x > -np.inf}
            rest = [v for v in range(len(q)) if v not in kept]
            total += sum(np.exp(x) * (x - float(q[i])) for i, x in kept.items())
            tail = float(batch.tail_P[p])
            total += np.exp(tail) * (tail - float(q[rest].logsumexp(0))) if tail > -np.inf else 0.0
            num += 1
    return total / num


def test_the_kl_is_that_of_the_buckets_at_the_right_positions() -> None:
    """Rows of several lengths, padded; positions with fewer entries than others."""
    model = loud("llama")
    rng = np.random.default_rng(1)
    given = []
    for trace in traces(5):
        dense = np.log(rng.dirichlet(np.full(512, 0.1), len(trace.completion_ids)) + 1e-9)
        order = np.argsort(-dense, axis=1)[:, :9]
        top = TopK.from_dense(order, np.take_along_axis(dense, order, 1).astype(np.float32)).truncate(mass=0.5)
        given.append(ProbeTrace(trace.prompt_ids, trace.completion_ids, top))
    probe = make_probe(given)
    assert len({int(n) for batch in probe.batches for n in batch.valid_NT.sum(1)}) > 1
    assert mean_kl(model, probe) == pytest.approx(plain_kl(model, probe, given), rel=1e-4)
    assert probe.positions == sum(len(trace.completion_ids) for trace in given)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "gpt2", "bloom", "falcon", "cohere2", "lfm2"])
def test_a_model_run_from_the_middle_is_the_pruned_model(model_type: str) -> None:
    """Every layer left out in turn, from hidden states that were computed before it; soft caps and scales included."""
    model = loud(model_type)
    probe = probe_of(model)
    assert mean_kl(model, probe) == pytest.approx(0, abs=1e-5)
    given = prune_probe.hidden_states(model, probe, {1})
    for layer in (0, 2, 3):
        pruned = copy.deepcopy(model)
        models.prune_layers(pruned, [n for n in range(4) if n not in (1, layer)])
        probe_2 = Probe(probe.batches)
        wanted = mean_kl(pruned, probe_2)
        assert wanted > 1e-5
        assert mean_kl(model, probe, {1, layer}, layer + 1, given[layer]) == pytest.approx(wanted, rel=1e-3, abs=1e-6)


def test_greedy_removal_takes_the_best_of_all_layers_each_time() -> None:
    model = loud("llama", num_hidden_layers=6)
    probe = probe_of(model)
    kept, removed = prune_choice.greedy_layers(model, probe, 3, candidates=6)
    left = list(range(6))
    for removal in removed:
        tried = {}
        for layer in left:
            pruned = copy.deepcopy(model)
            models.prune_layers(pruned, [n for n in left if n != layer])
            tried[layer] = mean_kl(pruned, Probe(probe.batches))
        assert removal.layer == min(tried, key=tried.__getitem__)
        assert removal.kl == pytest.approx(tried[removal.layer], rel=1e-3)
        left.remove(removal.layer)
    assert kept == left
    before = probe.layer_tokens
    assert prune_choice.greedy_layers(model, probe, 3, candidates=6) == (kept, removed)
    # Six rounds' first passes of 6, 5 and 4 layers; each candidate runs the layers above its own: 15, 10 and 6.
    assert probe.layer_tokens - before == (6 + 5 + 4 + 15 + 10 + 6) * probe.tokens


@pytest.mark.parametrize("by", ["importance", "block_influence"])
def test_layers_that_do_nothing_go_first(by: str) -> None:
    model = loud("llama")
    for index in (1, 2):
        layer = decoder_layers(model)[index]
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    probe = probe_of(model)
    if by == "importance":
        kept, removed = prune_choice.greedy_layers(model, probe, 2)
        assert [one.kl for one in removed] == pytest.approx([0, 0], abs=1e-5)
    else:
        kept, influence = prune_choice.least_influence(model, probe, 2)
        assert influence[1:3] == pytest.approx([0, 0], abs=1e-6)
        assert min(influence[0], influence[3]) > 0.01
    assert kept == [0, 3]
    assert models.prune_layers(model, kept) == kept
    assert mean_kl(model, Probe(probe.batches)) == pytest.approx(0, abs=1e-5)


# ------------------------------------------------------------------------------------------------- width


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("mistral", {}),
    ],
)
def test_a_narrow_model_is_the_model_with_channels_masked(
    model_type: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    """Neurons and head groups, by hooks that put zeros into the whole model; reloaded by plain transformers."""
    model = loud(model_type, **fields)
    rng = np.random.default_rng(3)
    ffn = [sorted(rng.choice(48, 40, replace=False).tolist()) for _ in range(4)]
    groups = [[int(rng.integers(2))] for _ in range(4)]
    narrow = prune_width.cut_width(copy.deepcopy(model), Channels(None, ffn, groups), {})
    narrow.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (saved.config.intermediate_size, saved.config.num_attention_heads, saved.config.num_key_value_heads) == (
        40,
        2,
        1,
    )
    assert sum(p.numel() for p in saved.parameters()) < sum(p.numel() for p in model.parameters())

    def keep(size: int, indices: list[int]) -> Any:
        mask = torch.zeros(size)
        mask[indices] = 1
        return lambda module, args: (args[0] * mask,)

    for layer, neurons, (group,) in zip(decoder_layers(model), ffn, groups, strict=True):
        layer.mlp.down_proj.register_forward_pre_hook(keep(48, neurons))
        width = layer.self_attn.o_proj.in_features // 2
        layer.self_attn.o_proj.register_forward_pre_hook(
            keep(2 * width, list(range(group * width, (group + 1) * width)))
        )
    ids = np.random.default_rng(4).integers(1, 500, 20)
    torch.testing.assert_close(logits(saved, ids), logits(model, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_dead_channels_are_found_and_cut_without_a_trace(tied: bool) -> None:
    """Hidden channels that nothing writes, neurons that add nothing: the narrow model is the same model."""
    model = loud("llama", tie_word_embeddings=tied)
    rng = np.random.default_rng(5)
    dead = sorted(rng.choice(32, 8, replace=False).tolist())
    idle = [sorted(rng.choice(48, 8, replace=False).tolist()) for _ in range(4)]
    model.get_input_embeddings().weight.data[:, dead] = 0
    for layer, neurons in zip(decoder_layers(model), idle, strict=True):
        layer.self_attn.o_proj.weight.data[dead] = 0
        layer.mlp.down_proj.weight.data[dead] = 0
        layer.mlp.down_proj.weight.data[:, neurons] = 0
    ids = np.random.default_rng(4).integers(1, 500, 20)
    before = logits(model, ids)
    channels, shares = prune_width.rank_channels(model, make_probe(traces(4)), Widths(24, 40, 4, 2))
    assert channels.hidden == sorted(set(range(32)) - set(dead))
    assert channels.ffn == [sorted(set(range(48)) - set(neurons)) for neurons in idle]
    assert channels.groups is None
    assert shares == {name: pytest.approx(1) for name in shares}
    assert len(shares) == 9
    narrow = prune_width.cut_width(model, channels, shares)
    assert narrow.config.hidden_size == 24
    assert narrow.config.head_dim == 8
    torch.testing.assert_close(logits(narrow, ids), before, atol=2e-3, rtol=2e-3)


def test_a_group_of_heads_that_writes_nothing_goes_first() -> None:
    model = loud("llama")
    for number, layer in enumerate(decoder_layers(model)):
        layer.self_attn.o_proj.weight.data.view(32, 2, -1)[:, number % 2] = 0
    channels, _ = prune_width.rank_channels(model, make_probe(traces(4)), Widths(32, 48, 2, 1))
    assert channels.groups == [[1], [0], [1], [0]]


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        ({"hidden": 640}, r"hidden: the model has 576; keep that many or fewer, not 640\."),
        ({"ffn": 1001}, r"ffn: 1001 is not a multiple of 8, .*; take 1000\."),
        ({"heads": 4}, r"heads: 4 query heads do not divide into groups of 3, .* \(9 heads, 3 key-value heads\); take 3\."),
        ({"hidden": 512}, r"a hidden size of 512 is not divisible by 9 heads, which transformers refuses; take hidden: 504\."),
        ({"hidden": 512, "heads": 6}, r"a hidden size of 512 is not divisible by 6 heads, .*; take hidden: 480\."),
    ],
)  # fmt: skip
def test_widths_that_nothing_loads_are_refused(cut: dict[str, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Widths(576, 1536, 9, 3).cut(**{"hidden": None, "ffn": None, "heads": None, **cut})


def test_architectures_with_other_parts_are_refused_in_words() -> None:
    for model_type in ("qwen3_moe", "deepseek_v3", "lfm2", "gemma2", "gpt2"):
        with pytest.raises(UserError, match=f"the widths of a {model_type} model cannot be cut, only those of llama"):
            prune_width.new_widths(build(model_type, 512).config, None, 40, None)
    with pytest.raises(UserError, match=r"vLLM takes hidden / heads as the size of a qwen2 model's heads, which is 8"):
        prune_width.new_widths(build("qwen2", 512).config, None, None, 2)
    model = build("llama", 512)
    model.model.layers[1].mlp.extra = torch.nn.Linear(3, 3)
    with pytest.raises(UserError, match=r"a weight 'model\.layers\.1\.mlp\.extra\.weight' of an unknown kind"):
        prune_width.cut_width(model, Channels(None, [list(range(40))] * 4, None), {})


# ------------------------------------------------------------------------------------------------- repair


def test_the_repair_gives_removed_neurons_work_to_their_twins() -> None:
    """Half of the neurons repeat the other half: without them the model is another one, after the fit it is itself again."""
    model = loud("llama")
    for layer in decoder_layers(model):
        for matrix in (layer.mlp.gate_proj, layer.mlp.up_proj):
            matrix.weight.data[24:] = matrix.weight.data[:24]
    fit, held = probe_of(model, 12), probe_of(model, 4, seed=9)
    kept = list(range(4))
    streams = prune_repair.streams_of(model, fit, kept, middle=True)
    narrow = prune_width.cut_width(copy.deepcopy(model), Channels(None, [list(range(24))] * 4, None), {})
    sites = prune_repair.sites_of(kept, 4, narrowed=True)
    done = prune_repair.repair(narrow, fit, held, streams, sites, strengths=(1e-7, 10.0))
    assert sites == kept
    assert done.strength == 1e-7
    assert done.before > 0.1
    assert done.after < 1e-3 * done.before
    assert mean_kl(narrow, held) == pytest.approx(done.after, abs=1e-6)
    ids = np.random.default_rng(4).integers(1, 500, 20)
    torch.testing.assert_close(logits(narrow, ids), logits(model, ids), atol=0.05, rtol=0.05)


def test_the_fit_is_the_ridge_solution_and_only_layers_before_gaps_are_fit() -> None:
    """Against an augmented least squares problem in float64, on the one matrix before the gap."""
    model = loud("llama")
    fit, held = probe_of(model, 8), probe_of(model, 3, seed=2)
    streams = prune_repair.streams_of(model, fit, [0, 3])
    wanted = torch.cat([x[b.valid_NT] for x, b in zip(streams.after[0], fit.batches, strict=True)]).double()
    pruned = copy.deepcopy(model)
    models.prune_layers(pruned, [0, 3])
    seen: list[torch.Tensor] = []
    hook = decoder_layers(pruned)[0].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    outs = prune_probe.hidden_states(pruned, fit)[1]
    hook.remove()
    x, out = (
        torch.cat([v[b.valid_NT] for v, b in zip(each, fit.batches, strict=True)]).double() for each in (seen, outs)
    )
    weight = 1 / wanted.norm(dim=1, keepdim=True)
    strength = 0.1 * ((weight * x) ** 2).sum(0).mean()
    rows = torch.cat([weight * x, strength.sqrt() * torch.eye(48, dtype=torch.float64)])
    target = torch.cat([weight * (wanted - out), torch.zeros(48, 32, dtype=torch.float64)])
    change = torch.linalg.lstsq(rows, target).solution.T
    assert prune_repair.sites_of([0, 3], 4, narrowed=False) == [0]
    assert prune_repair.sites_of([0, 1], 4, narrowed=False) == [1]
    prune_repair._fit_upwards(pruned, fit, streams, [0], 0.1, prune_probe.hidden_states(pruned, fit)[0])
    got = decoder_layers(pruned)[0].mlp.down_proj.weight - decoder_layers(model)[0].mlp.down_proj.weight
    torch.testing.assert_close(got.double(), change, atol=1e-3, rtol=1e-3)
    same = decoder_layers(pruned)[1].mlp.down_proj.weight
    assert torch.equal(same, decoder_layers(model)[3].mlp.down_proj.weight)
    assert mean_kl(pruned, held) > 0


def test_a_repair_that_helps_nobody_is_not_made() -> None:
    """Held-out positions decide: where every fit is worse there, the pruned model stays as it was, to the bit."""
    model = loud("llama")
    fit = probe_of(model, 6)
    streams = prune_repair.streams_of(model, fit, [0, 1, 2])
    pruned = copy.deepcopy(model)
    models.prune_layers(pruned, [0, 1, 2])
    held = probe_of(pruned, 3, seed=2)  # the pruned model itself is what is asked for
    before = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    done = prune_repair.repair(pruned, fit, held, streams, [2])
    assert done.strength is None
    assert done.before == done.after == pytest.approx(0, abs=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pruned.state_dict().items())


def test_models_that_a_linear_fit_does_not_repair_are_refused_in_words() -> None:
    for model_type, said in (("gemma2", "does not add its MLP's output to the stream as it is"),
                             ("gpt2", r"has no matrix of a known name that its MLP ends in \(mlp\.down_proj")):  # fmt: skip
        model = loud(model_type)
        with pytest.raises(UserError, match=said):
            prune_repair.check_repairable(model, make_probe(traces(3)))
    for model_type in ("llama", "bloom", "olmo", "phi"):
        model = loud(model_type)
        before = prune_repair.down_projection(decoder_layers(model)[0]).weight.clone()
        prune_repair.check_repairable(model, make_probe(traces(3)))
        assert torch.equal(prune_repair.down_projection(decoder_layers(model)[0]).weight, before)


@pytest.mark.slow
def test_a_narrow_shallow_model_gives_the_same_log_probabilities_in_vllm(
    smollm2_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """SmolLM2 with four layers, two of three head groups, a third of the neurons and half of the channels."""
    from distill import engines
    from distill.recipe import EngineConfig
    from distill.records import Request

    if engines.expected(EngineConfig()) != "vllm":
        pytest.skip("vLLM is not installed")
    model = models.load(smollm2_dir, dtype="float32").eval()
    models.prune_layers(model, [0, 1, 28, 29])
    new = prune_width.new_widths(model.config, 288, 512, 6)
    model = prune_width.cut_width(model, *prune_width.rank_channels(model, make_probe(traces(4)), new))
    models.save(model, tokenizer, tmp_path)
    assert models.prove_saved(model, tmp_path) == ""
    ids = np.random.default_rng(0).integers(100, 40_000, 24)
    engine = engines.open_engine(EngineConfig(fn="vllm", dtype="float32"), tmp_path, max_model_len=64, max_top_k=4)
    try:
        (scored,) = engine.score([Request("a", ids[:4], completion_ids=ids[4:])], top_k=4)
    finally:
        engine.close()
    wanted = logits(model, ids).log_softmax(-1)[3:-1].gather(1, torch.from_numpy(ids[4:, None]))[:, 0]
    np.testing.assert_allclose(scored.logprob_T, wanted.numpy(), atol=5e-3)
