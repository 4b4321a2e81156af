"""Options of a training stage for its model, and the errors where an option is not possible."""

from __future__ import annotations

import importlib.util
import io

import pytest
import torch

from distill import models, recipe
from distill.progress import Screen
from distill.records import UserError
from distill.stages.context import Context
from distill.stages.inputs.student import load_student, save_student

LIGER = importlib.util.find_spec("liger_kernel") is not None and torch.cuda.is_available()


def context_of(tiny_dir, run, **changes):
    stage = {"kind": "train", "model": "base", "data": "./none", "steps": 1, "dtype": "float32", **changes}  # fmt: skip
    tree = {"name": "t", "models": {"base": str(tiny_dir)}, "stages": {"kl": stage}}
    context = Context(recipe=recipe.validate(tree), run=run, name="kl", screen=Screen(io.StringIO()))
    context.folder.mkdir(parents=True)
    return context, context.recipe.stages["kl"]


def test_an_adapter_on_chosen_modules_is_merged_into_plain_weights(tiny_dir, tokenizer, tmp_path):
    lora = {"rank": 2, "target_modules": ["q_proj", "down_proj"], "modules_to_save": ["norm"]}
    context, config = context_of(tiny_dir, tmp_path, lora=lora)
    model = load_student(config, context)
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "norm.modules_to_save" in name for name in learned)
    again = dict(load_student(config, context).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again[name]), f"{name}: the recipe's seed decides an adapter's start"
    assert {name.split(".")[-4] for name in learned if "lora_" in name} == {"q_proj", "down_proj"}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in learned:
                parameter.add_(0.1)
    inputs = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = model(inputs).logits
    fingerprint, _ = save_student(model, tokenizer, config, context)
    kept = models.load(context.folder / "model", dtype="float32")
    with torch.no_grad():
        torch.testing.assert_close(kept(inputs).logits, expected, rtol=1e-4, atol=1e-4)
    assert fingerprint == models.weights_fingerprint(context.folder / "model")


def test_a_quantised_base_without_bitsandbytes_is_refused(tiny_dir, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    context, config = context_of(tiny_dir, tmp_path, lora={"quantised": "nf4"})
    with pytest.raises(UserError, match=r"stages\.kl\.lora\.quantised: nf4 needs bitsandbytes"):
        load_student(config, context)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_a_quantised_base_learned_is_put_on_the_whole_one(tiny_dir, tokenizer, tmp_path, kind):
    context, config = context_of(tiny_dir, tmp_path, lora={"rank": 2, "quantised": kind})
    model = load_student(config, context)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.01)
    save_student(model, tokenizer, config, context)
    kept = dict(models.load(context.folder / "model", dtype="float32").named_parameters())
    for name, before in models.load(tiny_dir, dtype="float32").named_parameters():
        changed = (kept[name] - before).abs().max() > 0
        assert changed == name.endswith("proj.weight")


@pytest.mark.skipif(LIGER, reason="liger-kernel and a GPU are there")
def test_liger_kernels_that_cannot_run_are_refused(tiny_dir, tmp_path):
    context, config = context_of(tiny_dir, tmp_path, liger=True)
    with pytest.raises(UserError, match=r"stages\.kl\.liger: .*remove the key"):
        load_student(config, context)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"snapshot_every": 5, "lora": {"quantised": "nf4"}}, "snapshot_every"),
        ({"lora": {"quantised": "int4"}}, "stages.kl.lora.quantised"),
        ({"lora": {"quantized": "nf4"}}, "Did you mean 'quantised'"),
    ],
)
def test_mistakes_are_one_message(tiny_dir, tmp_path, changes, message):
    with pytest.raises(UserError) as caught:
        context_of(tiny_dir, tmp_path, **changes)
    assert message in str(caught.value)


def test_stages_that_write_for_themselves_take_no_quantised_base(tiny_dir):
    stage = {
        "kind": "grpo", "model": "base", "task": "sums", "rewards": [{"fn": "accuracy"}], "steps": 1,
        "lora": {"quantised": "nf4"},
    }  # fmt: skip
    tree = {"name": "t", "models": {"base": str(tiny_dir)}, "tasks": {"sums": {"fn": "jsonl", "path": "x"}}, "stages": {"rl": stage}}  # fmt: skip
    with pytest.raises(UserError, match="after every step the engine receives the policy"):
        recipe.validate(tree)
