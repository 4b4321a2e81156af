"""An unknown key that is another framework's name gets an error with the right key."""

from __future__ import annotations

import inspect

import pytest

from distill import plug, recipe, synonyms
from distill.recipe import KINDS
from distill.recipe.fields import ModelConfig
from distill.recipe.load import _has
from distill.records import UserError

PLUGS = ("distill.training.rl.policy_objectives", "distill.training.loss.sparse", "distill.tasks")
BASE = {
    "train": {"model": "base", "data": "./rows.jsonl", "steps": 1},
    "grpo": {"model": "base", "task": "sums", "steps": 2, "rewards": [{"fn": "accuracy"}]},
    "generate": {"model": "base", "task": "sums", "problems": 2},
    "on_policy": {"model": "base", "teacher": "base", "task": "sums", "steps": 2},
    "eval": {"model": "base", "task": "sums"},
    "filter": {"data": "./traces", "keep": [{"fn": "correct"}]},
}
SUMS = {"fn": "reasoning_gym", "dataset": "chain_sum"}


def options():
    """Every option of every plug, with the section that has it."""
    return {
        name
        for home in PLUGS
        for function in plug.names(home).values()
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def said(kind, where, typed, overrides=()):
    """The error message for an unknown key at a place in a stage of a kind."""
    stage = {"kind": kind, **BASE[kind]}
    node = stage
    for key in filter(None, where.split(".")):
        node = node.setdefault(key, {"fn": "grpo"} if key == "objective" else {})
    node[typed] = 1
    tree = {"name": "x", "models": {"base": "some/model"}, "tasks": {"sums": SUMS}, "stages": {"it": stage}}
    with pytest.raises(UserError) as caught:
        recipe.validate(tree)
    return str(caught.value)


@pytest.mark.parametrize("name", synonyms.KEYS)
def test_every_key_of_the_table_is_one_of_ours(name):
    plugs = options()
    for key in synonyms.KEYS[name]:
        holders = [*KINDS.values(), ModelConfig]
        sections = [model.model_fields[f].annotation for model in KINDS.values() for f in model.model_fields]
        sections += [a for s in sections for a in getattr(s, "__args__", ())]
        holders += [s for s in sections if hasattr(s, "model_fields")]
        found = any(_has(model, key) for model in holders) or key in plugs
        if "." in key and key.split(".")[0] in ("objective", "loss"):
            found = found and key.split(".")[1] in plugs
        assert found, f"{name} -> {key}"
    assert name not in synonyms.ABSENT


@pytest.mark.parametrize(
    ("kind", "where", "typed", "ours"),
    [
        ("train", "", "learning_rate", "lr"),
        ("train", "", "num_train_epochs", "epochs"),
        ("train", "", "max_steps", "steps"),
        ("train", "", "per_device_train_batch_size", "batch_traces"),
        ("train", "", "max_seq_length", "max_tokens"),
        ("train", "", "logging_steps", "log_every"),
        ("train", "", "save_steps", "checkpoint_every"),
        ("train", "", "report_to", "trackers"),
        ("train", "", "bf16", "dtype"),
        ("train", "", "warmup_steps", "warmup_ratio"),
        ("train", "", "clip_norm", "max_grad_norm"),
        ("train", "", "lora_r", "lora.rank"),
        ("train", "lora", "lora_alpha", "alpha"),
        ("train", "lora", "r", "rank"),
        ("train", "", "kd_ratio", "loss.kl_weight"),
        ("train", "", "dataset_name", "data"),
        ("grpo", "", "num_generations", "group_size"),
        ("grpo", "", "max_completion_length", "sampling.max_tokens"),
        ("grpo", "sampling", "max_new_tokens", "max_tokens"),
        ("grpo", "", "temperature", "sampling.temperature"),
        ("grpo", "", "beta", "objective.beta"),
        ("grpo", "", "epsilon_high", "objective.eps_high"),
        ("grpo", "", "passes", "num_iterations"),
        ("grpo", "", "reward_funcs", "rewards"),
        ("grpo", "", "loss_type", "objective"),
        ("grpo", "engine", "max_num_seqs", "batch_size"),
        ("grpo", "engine", "enforce_eager", "eager"),
        ("grpo", "", "train_batch_size", "prompts"),
        ("generate", "", "logprobs", "top_logprobs"),
        ("generate", "", "top_k", "top_logprobs"),
        ("generate", "", "n", "samples"),
        ("generate", "", "dataset", "task"),
        ("on_policy", "", "lmbda", "offline_share"),
        ("on_policy", "", "mix", "offline_share"),
        ("eval", "", "points", "snapshot_problems"),
        ("filter", "", "filters", "keep"),
    ],
)
def test_a_name_typed_by_habit_is_answered_with_ours(kind, where, typed, ours):
    message = said(kind, where, typed)
    place = ".".join(filter(None, ("stages.it", where, typed)))
    assert message == f"recipe: {place}: unknown key. Here it is called {ours!r}."


@pytest.mark.parametrize(
    ("kind", "typed", "reason"),
    [
        ("train", "gradient_accumulation_steps", "micro_tokens"),
        ("train", "packing", "always packed"),
        ("train", "lr_scheduler_type", "min_lr_ratio"),
        ("train", "output_dir", "runs/<name>"),
        ("grpo", "scale_rewards", "dr_grpo"),
    ],
)
def test_a_name_without_a_key_here_is_answered_with_the_reason(kind, typed, reason):
    message = said(kind, "", typed)
    assert "There is no such key: " in message
    assert reason in message


@pytest.mark.parametrize(
    ("home", "fn", "typed", "ours"),
    [
        ("distill.training.rl.policy_objectives", "grpo", "epsilon", "eps_low"),
        ("distill.training.rl.policy_objectives", "grpo", "engine_cap", "importance_cap"),
        ("distill.training.rl.policy_objectives", "dapo", "mask_truncated_completions", "mask_truncated"),
        ("distill.training.rl.policy_objectives", "grpo", "truncated", "mask_truncated"),
    ],
)
def test_options_of_losses_and_objectives_too(home, fn, typed, ours):
    with pytest.raises(UserError, match=f"Here it is called '{ours}'"):
        plug.bind(fn, {typed: 1}, home, "stages.rl.objective")


def test_a_typo_still_gets_the_nearest_key():
    assert said("train", "", "gradient_checkpointin").endswith("Did you mean 'gradient_checkpointing'?")


def test_an_engine_given_by_name_takes_overrides(tmp_path):
    tree = "name: x\nmodels: {base: some/model}\ntasks: {sums: {fn: reasoning_gym, dataset: chain_sum}}\nstages:\n  it: {kind: eval, model: base, task: sums, engine: transformers}\n"
    (tmp_path / "x.yaml").write_text(tree)
    loaded = recipe.load(tmp_path / "x.yaml", ["stages.it.engine.batch_size=7"])
    assert (loaded.stages["it"].engine.fn, loaded.stages["it"].engine.batch_size) == ("transformers", 7)
