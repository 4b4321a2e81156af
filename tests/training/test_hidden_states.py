"""Matching hidden states: against the models' own layers, one document at a time, in float64."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill import models, recipe, run_folder
from distill.recipe import LoraConfig
from distill.records import UserError
from distill.stages.inputs.layer_pairs import KeptLayers, layers_kept
from distill.training.forward import ForwardPlan
from distill.training.loss import hidden_states
from distill.training.loss.divergences import forward_kl
from distill.training.loss.hidden_states import HiddenMatch, MatchedObjective
from distill.training.loss.objective import DenseObjective
from distill.training.loss.row_choice import RowChoice
from distill.training.packing import Example, pack
from distill.training.policy import StudentModule, Teacher

VOCAB = 61
RNG = np.random.default_rng(0)
EXAMPLES = [
    Example(str(n), np.array([7] * 20 + [n + 1], np.int32), RNG.integers(3, 50, 3 + 4 * n).astype(np.int32))
    for n in range(4)
]


@pytest.fixture(scope="module")
def pair():
    """A teacher with five layers, and the student with layers 0, 2 and 4 and other weights."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=5, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    teacher = LlamaForCausalLM(config).double().eval()
    student = copy.deepcopy(teacher)
    assert models.prune_layers(student, 3) == [0, 2, 4]
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return student, teacher


def match(**changes):
    return HiddenMatch(**{"pairs": ((0, 0), (1, 2), (2, 4)), "weight": 0.7, **changes})


def step(pair, objective, *, micro_tokens=10_000, layout="packed", examples=EXAMPLES, change=lambda model: model):
    """Loss, mean of `hidden`, and the gradient of the student's trained weights."""
    student, teacher = copy.deepcopy(pair[0]), copy.deepcopy(pair[1])
    student = change(student).train()
    plans = [dataclasses.replace(ForwardPlan.of(model, VOCAB), layout=layout) for model in (student, teacher)]
    module = StudentModule(student, objective, VOCAB, [Teacher(teacher, plan=plans[1])], plans[0])
    total, hidden = 0.0, 0.0
    for batch in pack(examples, micro_tokens=micro_tokens):
        rows = torch.from_numpy(batch.weight_T.nonzero()[0])
        out = module(batch.to_torch(), rows)
        out.loss.backward()
        total += out.loss.item()
        hidden += (out.measures["hidden"] * out.weight_T).sum().item() if "hidden" in out.measures else 0.0
    return total, hidden, {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def oracle(pair, fn):
    """The mean over tokens and pairs of layers, and its gradient, from each document alone."""
    student, teacher = (copy.deepcopy(model) for model in pair)
    found = {}

    def layer(model, index):
        def keep(module, args, out):
            found[model is student, index] = (out[0] if isinstance(out, tuple) else out)[0]

        model.model.layers[index].register_forward_hook(keep)

    for mine, theirs in match().pairs:
        layer(student, mine)
        layer(teacher, theirs)
    total, num = 0.0, sum(len(e.completion_ids) for e in EXAMPLES)
    for each in EXAMPLES:
        ids = torch.from_numpy(np.concatenate([each.prompt_ids, each.completion_ids]).astype(np.int64))[None]
        student(input_ids=ids)
        with torch.no_grad():
            teacher(input_ids=ids)
        at = slice(len(each.prompt_ids) - 1, -1)
        for mine, theirs in match().pairs:
            s, t = found[True, mine][at], found[False, theirs][at]
            if fn == "mse":
                spread = ((t - t.mean(1, keepdim=True)) ** 2).mean(1)
                loss = ((s - t) ** 2).mean(1) / spread
            else:
                loss = 1 - (s * t).sum(1) / (s.norm(dim=1) * t.norm(dim=1))
            total = total + loss.sum() / 3 / num
    total.backward()
    return total.item(), {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fn", ["mse", "cosine"])
def test_the_term_and_its_gradient_are_those_of_the_layers_alone(pair, fn):
    inner = DenseObjective(forward_kl)
    bare, _, plain = step(pair, inner)
    loss, hidden, gradient = step(pair, MatchedObjective(inner, match(fn=fn)))
    expected, theirs = oracle(pair, fn)
    assert hidden == pytest.approx(expected, rel=1e-6)
    assert expected > 0.01
    assert loss == pytest.approx(bare + 0.7 * expected, rel=1e-6)
    for name, grad in gradient.items():
        # The head's matrix is the embedding, the last norm comes after the last layer: only the loss reaches those.
        torch.testing.assert_close(
            grad - plain[name], 0.7 * theirs.get(name, torch.zeros_like(grad)), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize(
    "other",
    [
        {"micro_tokens": 40},
        {"layout": "rows"},
        {"layout": "single"},
        {"change": lambda model: model.gradient_checkpointing_enable() or model},
    ],
)
def test_packing_layout_and_recomputation_change_nothing(pair, other):
    objective = MatchedObjective(DenseObjective(forward_kl), match())
    one, two = step(pair, objective), step(pair, objective, **other)
    assert two[:2] == pytest.approx(one[:2], rel=1e-6)
    assert one[2].keys() == two[2].keys()
    for name, grad in one[2].items():
        torch.testing.assert_close(two[2][name], grad, rtol=1e-5, atol=1e-7)


def test_an_adapter_gets_the_gradient(pair):
    objective = MatchedObjective(DenseObjective(forward_kl), match(weight=1.0))
    adapted = {"change": lambda model: models.add_lora(model, LoraConfig(rank=2)).double()}
    torch.manual_seed(0)
    loss, hidden, gradient = step(pair, objective, **adapted)
    torch.manual_seed(0)
    bare, _, plain = step(pair, DenseObjective(forward_kl), **adapted)
    assert loss == pytest.approx(bare + hidden, rel=1e-9)
    assert all("lora_" in name for name in gradient)
    assert any(not torch.allclose(gradient[name], plain[name]) for name in gradient)


def test_tokens_chosen_in_the_step_are_those_that_are_matched(pair):
    """With the choice in the step, the term is over the kept tokens: as if only they had a weight."""
    choosing = MatchedObjective(DenseObjective(forward_kl, choice=RowChoice("entropy", 0.5)), match())
    chosen = [dataclasses.replace(e, num_weighted=-(-len(e.completion_ids) // 2)) for e in EXAMPLES]
    teacher, masked = pair[1], []
    for each in EXAMPLES:
        ids = torch.from_numpy(np.concatenate([each.prompt_ids, each.completion_ids]).astype(np.int64))[None]
        with torch.no_grad():
            logp = teacher(input_ids=ids).logits[0, len(each.prompt_ids) - 1 : -1].log_softmax(1)
        entropy = -(logp.exp() * logp).sum(1)
        kept = np.zeros(len(entropy), bool)
        kept[entropy.argsort(descending=True)[: -(-len(kept) // 2)].numpy()] = True
        masked.append(dataclasses.replace(each, weighted=kept))
    plain = MatchedObjective(DenseObjective(forward_kl), match())
    assert step(pair, choosing, examples=chosen)[:2] == pytest.approx(step(pair, plain, examples=masked)[:2], rel=1e-6)


def test_layers_are_followed_through_prunes_and_trainings(tmp_path):
    """base (9 layers) -> a keeps 5 -> trained -> b keeps 3 -> trained."""
    train = {"kind": "train", "data": "./x.jsonl", "steps": 1}
    stages = {
        "a": {"kind": "prune", "model": "base", "layers": 5},
        "once": {**train, "model": "a"},
        "b": {"kind": "prune", "model": "once", "layers": 3},
        "twice": {**train, "model": "b", "teacher": "base", "hidden": {"layers": "last"}},
    }
    tree = recipe.validate({"name": "n", "models": {"base": "m"}, "stages": stages})
    with pytest.raises(UserError, match="there is no record of the layers that a kept"):
        layers_kept(tree, tmp_path, "twice", 3)
    for name, kept, before in (("a", [0, 2, 4, 6, 8], 9), ("b", [0, 2, 4], 5)):
        metrics = {"layers_kept": kept, "layers_before": before}
        run_folder.write(tmp_path / name, run_folder.State("prune", {}, {}, metrics=metrics))
    assert layers_kept(tree, tmp_path, "twice", 3) == KeptLayers([0, 4, 8], 9)
    assert layers_kept(tree, tmp_path, "base", 9) == KeptLayers(range(9), 9)


def test_distances_by_hand():
    s, t = torch.tensor([[1.0, 3.0], [0.0, 2.0]]), torch.tensor([[0.0, 4.0], [0.0, 2.0]])
    assert hidden_states.mse(s, t).tolist() == pytest.approx([1 / 4, 0])
    assert hidden_states.cosine(s, t).tolist() == pytest.approx([1 - 12 / (10**0.5 * 4), 0], abs=1e-6)
