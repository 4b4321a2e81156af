"""Recipes on named GPUs: parts, verdicts, and remedies that hold when they are applied. No model is loaded."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from distill import cli, recipe
from distill.compute import cards
from distill.compute.shared_gpu import ASLEEP_BYTES
from distill.records import UserError
from distill.run import fit
from distill.tools.listing import RECIPES

GPU_RECIPES = sorted(path for path in RECIPES.glob("*.yaml") if path.stem.endswith("_qwen"))
SUMS = {"fn": "reasoning_gym", "dataset": "basic_arithmetic", "template": "think_answer"}


def make(model: Any = "Qwen/Qwen2.5-7B", **fields: Any) -> recipe.Recipe:
    """One train stage on worked sums."""
    stage = {
        **{"kind": "train", "model": "base", "task": "sums", "data": "data/cold_start/sums.jsonl"},
        **{"loss": {"fn": "cross_entropy"}, "steps": 10, "batch_traces": 2048, "micro_tokens": 4096},
    }
    tree = {"name": "fit", "models": {"base": model}, "tasks": {"sums": SUMS}, "stages": {"sft": stage | fields}}
    return recipe.validate(tree, "test")


def rl(**fields: Any) -> recipe.Recipe:
    stage = {"kind": "grpo", "model": "base", "task": "sums", "rewards": [{"fn": "accuracy"}], "steps": 4}
    stage |= {"objective": {"fn": "grpo", "beta": 0}}
    tree = {
        "name": "fit",
        "models": {"base": "Qwen/Qwen2.5-1.5B"},
        "tasks": {"sums": SUMS},
        "stages": {"rl": stage | fields},
    }
    return recipe.validate(tree, "test")


def verdict(resolved: recipe.Recipe, gpu: str) -> fit.Verdict:
    (found,) = fit.verdicts(resolved, cards.parse(gpu))
    return found


def test_a_7b_in_full_takes_what_the_count_of_its_bytes_says():
    """2 weight, 4 master, 8 moments, 4 and 2 gradient: 20 bytes of each of 7.6B parameters."""
    found = verdict(make(), "h100:8")
    held = found.row.memory
    state = held.weights + held.masters + held.moments + held.gradients + held.activations + held.head
    assert state >= 20 * 7.6156e9 * 0.999
    assert not found.fits
    (line,) = fit.lines([found])
    assert line.startswith("sft: does not fit: ")
    assert "80 GiB there" in line
    assert "lora (" in line
    assert "fsdp2 over 8 (" in line


def test_every_named_remedy_fits_when_it_is_applied():
    asked = [
        (make(), "h100:8"),
        (make("Qwen/Qwen2.5-72B"), "h100:8"),
        (make(lora={"rank": 8}, micro_tokens=65536), "4090"),
        (rl(), "a100-40"),
        (rl(model="base", micro_tokens=16384), "l40s:4"),
    ]
    for resolved, gpu in asked:
        found, card = verdict(resolved, gpu), cards.parse(gpu)
        assert not found.fits
        assert found.remedies, gpu
        for remedy in found.remedies:
            tree = resolved.model_dump(mode="json", exclude_unset=True)
            (name,) = tree["stages"]
            for key, value in remedy.changes.items():
                held = tree["stages"][name].get(key)
                tree["stages"][name][key] = (
                    {**held, **value} if isinstance(held, dict) and isinstance(value, dict) else value
                )
            most = remedy.changes.get("distributed", {}).get("processes", card.count)
            after = verdict(recipe.validate(tree, "test"), f"{card.key}:{max(most, card.count)}")
            assert after.fits, remedy.words
            assert after.need == pytest.approx(remedy.need, rel=1e-6), remedy.words


def test_what_no_change_can_help_says_so():
    found = verdict(make("meta-llama/Llama-3.1-405B", lora={"rank": 8, "quantised": "nf4"}), "l4")
    assert not found.remedies
    assert "a smaller model or a GPU with more memory would" in fit.lines([found])[0]


def test_a_stage_is_costed_as_it_is_written():
    alone = verdict(make(steps=1000), "h100:8")
    assert alone.row.processes == 1
    sharded = verdict(make(steps=1000, distributed={"processes": 8, "strategy": "fsdp2"}), "h100:8")
    assert sharded.row.processes == 8
    assert sharded.row.memory.moments == alone.row.memory.moments / 8
    assert sharded.row.amounts["seconds"] < alone.row.amounts["seconds"] / 3
    copied = verdict(make(distributed={"processes": 8}), "h100:8")
    assert copied.row.memory.moments == alone.row.memory.moments
    few = verdict(make(distributed={"processes": 8}), "h100:4")
    assert few.problem == "distributed.processes is 8, and there are 4 GPUs"


def test_an_engine_beside_the_trainer_takes_what_training_leaves():
    found = verdict(rl(), "h100")
    assert found.fits
    parts = found.row.memory
    assert parts.engine == parts.weights
    assert parts.reference == 0
    assert found.cache == parts.cache
    referred = verdict(rl(objective={"fn": "grpo", "beta": 0.01}), "h100")
    assert referred.row.memory.reference == parts.weights
    assert referred.need - found.need == pytest.approx(parts.weights)
    sized = verdict(rl(engine={"kv_cache_gib": 2}), "h100")
    assert sized.row.memory.cache == 2 * cards.GIB
    # A larger share is a larger cache, which training must leave.
    shared = verdict(rl(engine={"memory_share": 0.4}), "h100")
    assert shared.need == pytest.approx(
        found.need - parts.engine - parts.logits - parts.cache + 0.4 * cards.parse("h100").memory
    )
    large = verdict(rl(engine={"memory_share": 0.8}), "h100")
    assert "while the model trains beside its engine" in large.problem
    small = verdict(rl(engine={"memory_share": 0.03}), "h100")
    assert re.fullmatch(r"engine\.memory_share 0\.03 is [\d.]+ GiB too small for its engine", small.problem)


def test_sleep_is_a_remedy_where_the_engine_is_in_the_way():
    tight = {"lora": {"rank": 8}, "micro_tokens": 12288, "prompts": 512}
    found = verdict(rl(**tight, engine={"memory_share": 0.4}), "h100")
    assert not found.fits
    (asleep,) = [remedy for remedy in found.remedies if remedy.words == "engine.sleep"]
    after = verdict(rl(**tight, engine={"memory_share": 0.4, "sleep": True}), "h100")
    assert after.fits
    assert after.need == asleep.need < found.need
    # Without the engine, but for what a sleeping one keeps.
    parts = after.row.memory
    assert after.asleep == pytest.approx(parts.total - parts.engine - parts.logits - parts.cache + ASLEEP_BYTES)
    assert "while the model trains and its engine sleeps" in fit.lines([after])[0]


def test_a_split_engine_holds_its_part_on_each_gpu():
    """Weights and keys and values are divided; logits are not."""
    stage = {"kind": "generate", "model": "base", "task": "sums", "problems": 4}
    tree = {"name": "fit", "models": {"base": "Qwen/Qwen2.5-72B"}, "tasks": {"sums": SUMS}}

    def generate(**engine: Any) -> recipe.Recipe:
        return recipe.validate({**tree, "stages": {"traces": {**stage, "engine": engine}}}, "test")

    alone, split = (verdict(generate(tensor_parallel=n), "h100:8") for n in (1, 4))
    assert not alone.fits
    assert split.fits
    assert split.row.processes == 4
    one, four = alone.row.memory, split.row.memory
    assert four.engine == one.engine / 4
    assert four.cache == pytest.approx(one.cache / 4)
    assert four.logits == one.logits
    few = verdict(generate(tensor_parallel=4), "h100:2")
    assert few.problem == "engine.tensor_parallel is 4, and there are 2 GPUs"


def test_a_small_cache_decodes_fewer_at_a_time():
    small, large = (verdict(rl(prompts=64, engine={"batch_size": 512, "kv_cache_gib": n}), "h100") for n in (0.2, 30))
    assert small.row.amounts["seconds"] > large.row.amounts["seconds"]


def test_a_reward_model_is_counted():
    judged = [{"fn": "accuracy"}, {"fn": "model", "path": "Qwen/Qwen2.5-0.5B"}]
    more, less = (verdict(rl(rewards=each), "h100").row.memory for each in (judged, judged[:1]))
    assert more.rewards == pytest.approx(2 * 494e6, rel=1e-3)
    assert more.total - less.total == more.rewards


def test_an_adapter_is_counted_as_one_in_memory_and_flops():
    whole, lora = (verdict(make(**more), "h100").row for more in ({}, {"lora": {"rank": 16}}))
    narrow = verdict(make(lora={"rank": 16, "target_modules": ["q_proj", "v_proj"]}), "h100").row
    assert lora.memory.moments == pytest.approx(8 * 40.37e6, rel=1e-3)  # peft's count for Qwen2.5-7B at rank 16
    assert narrow.memory.moments == pytest.approx(8 * 5.05e6, rel=1e-2)
    assert narrow.amounts["flops"] < lora.amounts["flops"] < 0.7 * whole.amounts["flops"]


def test_a_model_of_unknown_size_is_refused_and_named_ones_are_taken():
    with pytest.raises(UserError, match=r"models\.base: the sizes of 'me/unheard-of'.*models\.base\.config"):
        verdict(make("me/unheard-of"), "h100")
    by_name = verdict(make({"source": "me/unheard-of", "config": "Qwen2.5-7B"}), "h100")
    assert by_name.need == verdict(make(), "h100").need
    sizes = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    sizes |= {"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False}
    assert verdict(make({"source": "me/unheard-of", "config": sizes}), "h100").need == by_name.need
    counted = verdict(make({"source": "me/unheard-of", "params": 7.6e9}), "h100")
    assert "without grouped heads" in counted.row.notes[0]
    with pytest.raises(UserError, match="neither a file nor a known model"):
        verdict(make({"source": "me/unheard-of", "config": "Qwen2.5-7"}), "h100")


def test_a_config_file_gives_the_sizes(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100, "num_attention_heads": 4}')
    assert verdict(make({"source": "me/own", "config": str(file)}), "l4").fits
    assert verdict(make({"source": "me/own", "config": str(tmp_path)}), "l4").fits
    file.write_text("[]")
    with pytest.raises(UserError, match=r"not a config\.json"):
        verdict(make({"source": "me/own", "config": str(file)}), "l4")


@pytest.mark.parametrize("path", GPU_RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("gpu", ["h100:8", "a100-40:2"])
def test_every_recipe_for_a_gpu_is_costed(path, gpu, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(cli.app, ["check", str(path), "--gpu", gpu])
    assert result.exit_code == 0, result.output
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name in tree["stages"]:
        assert name in result.output
    for column in ("weights", "optimiser", "gradients", "activations", "head", "engine", "cache", "total"):
        assert column in result.output
    assert "in total about" in result.output
    if gpu == "h100:8":
        assert "does not fit" not in result.output


def test_there_is_a_recipe_for_a_gpu():
    assert len(GPU_RECIPES) >= 3


def test_an_unknown_gpu_ends_the_command_with_the_names():
    result = CliRunner().invoke(cli.app, ["check", "quickstart", "--gpu", "h100:80gib"])
    assert result.exit_code != 0
    assert isinstance(result.exception, UserError)
    assert "h100:8" in str(result.exception)


def test_engines_apart_are_on_other_gpus_than_the_trainer():
    """Trainer and engine take their own GPUs, so the fuller counts; the rollouts are shared, and overlap with `ahead`."""
    apart = {"ray": "local", "replicas": 4, "kv_cache_gib": 8, "batch_size": 64}
    beside = verdict(rl(prompts=64, engine={"kv_cache_gib": 8, "batch_size": 64}), "h100:8")
    found = verdict(rl(prompts=64, engine=apart), "h100:8")
    one = verdict(rl(prompts=64, engine=apart | {"replicas": 1}), "h100:8")
    assert found.row.processes == 1 + 4
    assert found.row.memory.total < beside.row.memory.total
    assert found.row.memory.cache == 0  # the trainer's
    (_, writing), (_, alone) = found.row.parts, one.row.parts
    assert writing.seconds < 0.5 * alone.seconds
    ahead = verdict(rl(prompts=64, engine=apart, ahead=1), "h100:8").row
    assert ahead.amounts["seconds"] < found.row.amounts["seconds"]
    assert ahead.amounts["seconds"] >= max(part.seconds for part in ahead.parts)
    assert "need 5 GPUs, and there are 4" in verdict(rl(prompts=64, engine=apart), "h100:4").problem


def test_more_engines_generate_in_less_time():
    def seconds(replicas: int) -> float:
        stage = {
            "kind": "generate",
            "model": "base",
            "task": "sums",
            "problems": 20_000,
            "sampling": {"max_tokens": 512},
        }
        stage["engine"] = {"batch_size": 64, "ray": "auto", "replicas": replicas}
        tree = {"name": "fit", "models": {"base": "Qwen/Qwen2.5-1.5B"}, "tasks": {"sums": SUMS}, "stages": {"t": stage}}
        found = verdict(recipe.validate(tree, "test"), "h100:8")
        assert found.row.processes == replicas
        return found.row.parts[0].seconds

    assert seconds(8) == pytest.approx(seconds(1) / 8, rel=0.2)
