"""The faults that a system of this kind meets, by number, and a test of the answer to each: `pytest -k fault_07`.

Most tests stand where the part they test is tested, marked with the fault's number; those of faults that belong to no one part are here.
"""

from __future__ import annotations

import ast
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from distill import recipe
from distill.records import Group, Problem, UserError, Verdict
from distill.tasks import rewards, templates
from distill.traces.summary import Stats
from distill.training.loss.head import Targets, head_loss
from distill.training.loss.sparse import cross_entropy

FAULTS = {
    1: "a shard is cut or empty",
    2: "bits of a shard are flipped",
    3: "killed at any instant of writing",
    4: "the disk is full",
    5: "rows are there twice, or missing, after a resume",
    6: "two writers in one folder",
    7: "an unknown version of the schema",
    8: "the teacher's tokenizer is not the student's",
    9: "a padded vocabulary",
    10: "a chat template drops or opens the thinking",
    11: "the padding token is the EOS",
    12: "several stop ids, or none",
    13: "-inf in a distribution",
    14: "the stored entries hold little of the probability",
    15: "a loss or gradient that is not finite",
    16: "all rewards of a group are equal",
    17: "a reward is None or NaN",
    18: "a reward raises",
    19: "an empty completion",
    20: "a completion that was cut",
    21: "a batch with every token masked",
    22: "thinking that is never closed",
    23: "a prompt as long as the context",
    24: "a group of one; a batch that cannot be divided",
    25: "stale weights in the engine",
    26: "a gold answer that cannot be read",
    27: "text in a data file that is no text",
    28: "problems of the evaluation in the training set",
    29: "a checkpoint that is half written",
    30: "mistakes in a recipe",
    31: "a model that nobody can reach",
    32: "memory runs out",
}
TESTS = Path(__file__).parent


def test_every_fault_has_a_test():
    marked: dict[int, list[str]] = {number: [] for number in FAULTS}
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                for mark in node.decorator_list:
                    if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault":
                        for number in mark.args:
                            marked[ast.literal_eval(number)].append(f"{path.name}::{node.name}")
    assert not [f"{number}: {FAULTS[number]}" for number, tests in marked.items() if not tests]


def stats(tail_mass: float) -> Stats:
    return Stats(10, 5, 100, 200, 4.0, tail_mass, math.nan, 30.0, 0.5, 0.5, 0.0, {64: 10})


@pytest.mark.fault(14)
def test_traces_whose_entries_hold_little_are_warned_of():
    assert "hold 72% of the probability" in stats(0.28).warning
    assert not stats(0.02).warning
    assert not stats(math.nan).warning


@pytest.mark.fault(19)
@pytest.mark.parametrize("template", [templates.think_answer, templates.boxed, templates.r1_zero])
def test_an_empty_completion_scores_nothing_and_divides_by_nothing(template):
    problem = Problem("1", "sums", "1 + 1?", ({"role": "user", "content": "1 + 1?"},), "2")
    group = Group(problem, template, ("",), (0,), (True,), (Verdict(False, 0.0, None, "no answer"),), 16)
    assert template.extract("") is None
    for reward in (rewards.accuracy, rewards.think_format, rewards.language):
        assert reward(group) == [0.0]
    assert rewards.length(group, cache=4) == [0.0]


@pytest.mark.fault(21)
def test_a_batch_without_a_learned_token_has_a_loss_of_zero_and_a_gradient_of_zeros():
    torch.manual_seed(0)
    hidden, head = nn.Parameter(torch.randn(6, 8)), nn.Linear(8, 20, bias=False)
    targets = Targets(torch.zeros(6, dtype=torch.long), torch.zeros(6))
    out = head_loss(hidden, head.weight, cross_entropy, targets)
    out.loss.backward()
    assert out.loss.item() == 0.0
    for gradient in (hidden.grad, head.weight.grad):
        assert gradient is not None
        assert np.all(gradient.numpy() == 0)


@pytest.mark.fault(24)
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"group_size": 1}, "greater than or equal to 2"),
        ({"steps": 3, "mini_batches": 2}, "steps 3 is not a multiple of mini_batches"),
    ],
)
def test_groups_of_one_and_batches_that_cannot_be_divided_are_refused(changes, said):
    stage = {
        "kind": "grpo",
        "model": "base",
        "task": "sums",
        "rewards": [{"fn": "accuracy"}],
        "steps": 2,
        "prompts": 2,
        "group_size": 2,
    }
    tree = {
        "name": "t",
        "models": {"base": "some/model"},
        "tasks": {"sums": {"fn": "reasoning_gym", "dataset": "basic_arithmetic"}},
        "stages": {"rl": {**stage, **changes}},
    }
    with pytest.raises(UserError, match=said):
        recipe.validate(tree)
