"""Every objective's value and gradient against plain fp64 loops over the published formulas, and hand-made values."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from rollout_samples import MAX_TOKENS, Numbers, by_row, key_of, rollout_of, rollouts

from distill.recipe import GrpoStage
from distill.training.loss.head import Student, Targets
from distill.training.rl import policy_objectives as objectives
from distill.training.rl.advantages import advantages, policy_kl

# ------------------------------------------------------------------------------------------------ the oracle


def group_advantages(rewards, counted, scale):
    known = [r for r, c in zip(rewards, counted, strict=True) if c and r is not None]
    if len(known) < 2 or all(r == known[0] for r in known):
        return [0.0] * len(rewards)
    mean = math.fsum(known) / len(known)
    std = math.sqrt(math.fsum((r - mean) ** 2 for r in known) / (len(known) - 1))
    return [
        0.0 if r is None or not c else (r - mean) / (std + 1e-4 if scale else 1.0)
        for r, c in zip(rewards, counted, strict=True)
    ]


def kl_and_slope(kind, new, old, ref):
    """(value, derivative by log pi) of an estimate of the KL at one token."""
    d = ref - new
    if kind == "k2":
        return d * d / 2, -d
    k3 = math.exp(d) - d - 1
    slope = 1 - math.exp(d)
    if kind == "k3":
        return k3, slope
    rho = math.exp(new - old)
    return rho * k3, rho * k3 + rho * slope


def oracle(
    numbers,
    name,
    *,
    on_policy=False,
    beta=0.0,
    kl="k3",
    cap=2.0,
    low=None,
    high=None,
    ratio_max=5.0,
    mask,
):
    """(loss, {(problem, sample): d loss / d log pi at each token}), by the formulas, token after token.

    mask: completions that were cut take no part. The defaults of low and high are each method's own.
    """
    low = {"gspo": 3e-4}.get(name, 0.2) if low is None else low
    high = {"gspo": 4e-4, "dapo": 0.28}.get(name, low) if high is None else high
    everyone, tokens, completions = [], 0, 0
    for g, rewards in enumerate(numbers.rewards):
        counted = [not (mask and (g, i) in numbers.truncated) for i in range(len(rewards))]
        adv = group_advantages(rewards, counted, name != "dr_grpo")
        for i, c in enumerate(counted):
            if c:
                everyone.append(((f"p{g}", i), adv[i]))
                tokens += len(numbers.old[f"p{g}", i])
            completions += 1
    loss, slopes = 0.0, {}
    for key, a in everyone:
        new = [float(x) for x in numbers.new[key]]
        old = new if on_policy else [float(x) for x in numbers.old[key]]
        n = len(new)
        share = {
            "grpo": 1 / n / len(everyone),
            "gspo": 1 / n / len(everyone),
            "dapo": 1 / tokens,
            "cispo": 1 / tokens,
            "dr_grpo": 1 / (completions * MAX_TOKENS),
        }[name]
        sequence = math.exp(sum(x - y for x, y in zip(new, old, strict=True)) / n)
        slope = []
        for t in range(n):
            rho = sequence if name == "gspo" else math.exp(new[t] - old[t])
            w = 1.0
            if cap is not None:
                engine = [float(x) for x in numbers.engine[key]]
                every = sum(x - y for x, y in zip(old, engine, strict=True))
                w = min(math.exp(every if name == "gspo" else old[t] - engine[t]), cap)
            if name == "cispo":
                value, s = -min(rho, ratio_max) * a * new[t], -min(rho, ratio_max) * a
            else:
                clipped = min(max(rho, 1 - low), 1 + high)
                value = -min(rho * a, clipped * a)
                s = -rho * a if rho * a <= clipped * a else 0.0
            value, s = w * value, w * s
            if beta:
                k, ks = kl_and_slope(kl, new[t], old[t], float(numbers.ref[key][t]))
                value, s = value + beta * k, s + beta * ks
            loss += share * value
            slope.append(share * s)
        slopes[key] = slope
    return loss, slopes


# ---------------------------------------------------------------------------------------------- the real path


def stage(**changes):
    defaults = {
        "kind": "grpo",
        "model": "m",
        "task": "t",
        "rewards": [{"fn": "accuracy"}],
        "steps": 2,
        "prompts": 4,
        "group_size": 4,
        "mini_batches": 1,
        "num_iterations": 2,
        "sampling": {"max_tokens": MAX_TOKENS},
        "micro_tokens": 30,
    }
    return GrpoStage(**{**defaults, **changes})


def student(logp_T):
    """Return a Student with only the label's log-probability."""
    rest = {f.name: None for f in fields(Student)}
    return Student(**{**rest, "label_T": logp_T})


def computed(numbers, objective, config):
    """(loss, {(problem, sample): gradient}, policy stub) of the first mini-batch, through packing and the loss."""
    source = rollouts(objective, config)
    stub = numbers.stub()
    (*parts,) = source.mini_batches(rollout_of(numbers, source), 0, stub)
    loss, slopes = 0.0, {}
    for batch in (b for part in parts for b in part):
        rows = torch.from_numpy(batch.weight_T.nonzero()[0])
        logp_T = torch.from_numpy(by_row(batch, numbers.new))[rows].double().requires_grad_()
        targets = Targets.of(batch.to_torch(), rows)
        if objective.couples(targets):
            trace_T = torch.searchsorted(torch.from_numpy(batch.doc_offsets), rows, right=True) - 1
            from dataclasses import replace

            targets = replace(targets, coupled_T=objective.couple(logp_T.detach(), targets, trace_T))
        loss_T = objective.loss(student(logp_T), targets)
        assert loss_T.shape == logp_T.shape
        total = (loss_T * targets.weight_T).sum()
        (grad_T,) = torch.autograd.grad(total, logp_T)
        loss += total.item()
        full = np.zeros(len(batch.ids_T))
        full[rows.numpy()] = grad_T.numpy()
        for n, trace_id in enumerate(batch.trace_ids):
            key, stop = key_of(trace_id), batch.doc_offsets[n + 1] - 1
            slopes[key] = full[stop - len(numbers.old[key]) : stop]
    return loss, slopes, stub


REWARDS = [
    [1.0, 0.0, 0.0, 1.0],
    [0.2] * 4,
    [1.0, None, 0.3, 0.0],
    [None, None, 1.0, None],
    [0.5, -1.0, 2.0, 0.5],
]
CUT = [(0, 1), (2, 0), (4, 2)]
METHODS = ["grpo", "dapo", "dr_grpo", "gspo", "cispo"]


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("kl", ["k3", "k2", "k3_ratio", None])
@pytest.mark.parametrize("name", METHODS)
def test_value_and_gradient_off_policy(name, kl, mask):
    numbers = Numbers(REWARDS, seed=METHODS.index(name), truncated=CUT)
    beta = 0.0 if kl is None else 0.3
    objective = getattr(objectives, name)(beta=beta, kl=kl or "k3", mask_truncated=mask)
    loss, slopes, stub = computed(numbers, objective, stage())
    want, want_slopes = oracle(numbers, name, beta=beta, kl=kl, mask=mask)
    # The streams are float32, so exact sums differ in the seventh digit.
    assert loss == pytest.approx(want, rel=2e-6, abs=2e-7)
    for key, slope in want_slopes.items():
        got = slopes.get(key, np.zeros(len(slope)))
        np.testing.assert_allclose(got, slope, rtol=1e-5, atol=1e-9, err_msg=str(key))
    assert set(slopes) <= set(want_slopes)
    if beta == 0:
        assert stub.asked["ref"] == 0


@pytest.mark.parametrize("name", METHODS)
def test_on_policy_the_gradient_is_reinforce_and_costs_no_extra_forward(name):
    """rho = 1: d loss / d log pi is -A w times the token's share, whatever the clip."""
    numbers = Numbers(REWARDS, seed=7, truncated=CUT)
    objective = getattr(objectives, name)(beta=0.0, importance_cap=None)
    _, slopes, stub = computed(numbers, objective, stage(num_iterations=1))
    mask = objective.mask_truncated
    _, want = oracle(numbers, name, on_policy=True, cap=None, mask=mask)
    assert stub.asked == {"old": 0, "ref": 0}
    for key, slope in slopes.items():
        np.testing.assert_allclose(slope, want[key], rtol=1e-6)
        group = int(key[0][1:])
        counted = [not (mask and (group, i) in numbers.truncated) for i in range(4)]
        a = group_advantages(REWARDS[group], counted, name != "dr_grpo")[key[1]]
        assert len(set(np.round(slope, 12))) == 1
        assert np.sign(slope[0]) == -np.sign(a)


def test_no_kl_means_no_forward_for_groups_without_an_advantage():
    numbers = Numbers(REWARDS, seed=3)
    _, slopes, _ = computed(numbers, objectives.grpo(beta=0.0), stage())
    assert {key[0] for key in slopes} == {"p0", "p2", "p4"}
    assert ("p2", 1) not in slopes  # could not be judged
    _, slopes, stub = computed(numbers, objectives.grpo(beta=0.1), stage())
    assert len(slopes) == 20
    assert stub.asked["ref"] > 0


@pytest.mark.parametrize("name", METHODS)
def test_a_permutation_inside_a_group_changes_nothing(name):
    order = [2, 0, 3, 1]
    one = Numbers(REWARDS[:1], seed=5)
    two = Numbers([[REWARDS[0][i] for i in order]], seed=5)
    for table in ("old", "new", "ref", "engine"):
        before = dict(getattr(one, table))
        getattr(two, table).update({("p0", j): before["p0", i] for j, i in enumerate(order)})
    make = getattr(objectives, name)
    a, slopes_a, _ = computed(one, make(beta=0.2), stage(prompts=1))
    b, slopes_b, _ = computed(two, make(beta=0.2), stage(prompts=1))
    assert a == pytest.approx(b, rel=1e-9)
    for j, i in enumerate(order):
        np.testing.assert_allclose(slopes_b["p0", j], slopes_a["p0", i], rtol=1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_any_split_into_micro_batches_is_the_whole(name):
    numbers = Numbers(REWARDS, seed=2, truncated=CUT)
    make = getattr(objectives, name)
    whole, slopes, _ = computed(numbers, make(beta=0.1), stage(micro_tokens=10_000))
    for micro_tokens in (1, 17, 40):
        split, parts, _ = computed(numbers, make(beta=0.1), stage(micro_tokens=micro_tokens))
        assert split == pytest.approx(whole, rel=1e-6)
        for key, slope in slopes.items():
            np.testing.assert_allclose(parts[key], slope, rtol=1e-5, atol=1e-10)


def test_mini_batches_hold_every_problem_once_and_divide_by_their_own_counts():
    numbers = Numbers([[1.0, 0.0, 0.0, 1.0]] * 6, seed=4)
    objective = objectives.grpo(beta=0.0)
    source = rollouts(objective, stage(steps=6, prompts=2, mini_batches=3, num_iterations=2))
    parts = source.mini_batches(rollout_of(numbers, source), 0, numbers.stub())
    seen = [[key_of(i)[0] for b in part for i in b.trace_ids] for part in parts]
    assert [len(set(part)) for part in seen] == [2, 2, 2]
    assert {p for part in seen for p in part} == {f"p{n}" for n in range(6)}
    assert [b.denominator for part in parts for b in part] == [8.0] * sum(map(len, parts))


def test_clip_fraction_marks_the_clipped_tokens():
    """rho = 1.5 and 0.5 with eps = .2: clipped for A = +1 above, for A = -1 below, and nowhere else."""
    logp = torch.tensor([1.5, 1.5, 0.5, 0.5]).log().requires_grad_()
    targets = Targets(
        torch.zeros(4, dtype=torch.long),
        torch.ones(4),
        advantage_T=torch.tensor([1.0, -1.0, 1.0, -1.0]),
        old_logp_T=torch.zeros(4),
    )
    objective = objectives.grpo(beta=0.0)
    loss = objective.loss(student(logp), targets)
    assert loss.tolist() == pytest.approx([-1.2, 1.5, -0.5, 0.8])
    (grad,) = torch.autograd.grad(loss.sum(), logp)
    assert grad.tolist() == pytest.approx([0.0, 1.5, -0.5, 0.0])
    assert objective.measure(student(logp.detach()), targets)["clip_fraction"].tolist() == [
        1,
        0,
        0,
        1,
    ]


@pytest.mark.fault(16, 17)
def test_hand_made_advantages():
    adv = advantages([1, 0, 0, 1, 1, 0, 0, 0])
    assert adv[[0, 1]] == pytest.approx([1.20738, -0.72443], abs=1e-5)
    assert (advantages([0.2] * 7) == 0).all()
    assert (advantages([1.0, None, None]) == 0).all()
    assert (advantages([None, None]) == 0).all()
    with_none = advantages([1.0, None, 0.0])
    assert with_none[1] == 0
    assert with_none[0] == pytest.approx(0.5 / (math.sqrt(0.5) + 1e-4))
    assert advantages([3.0, 1.0], scale=False).tolist() == [1.0, -1.0]


def test_hand_made_kl():
    at = Targets(torch.zeros(1), torch.ones(1), ref_logp_T=torch.tensor([-1.5]).double())
    assert policy_kl(torch.tensor([-1.0]).double(), at, "k3").item() == pytest.approx(0.1065307, abs=1e-7)
    assert policy_kl(torch.tensor([-1.0]).double(), at, "k2").item() == pytest.approx(0.125)


def test_the_engine_weight_is_truncated_and_carries_no_gradient():
    logp = torch.tensor([-1.0, -1.0], dtype=torch.float64, requires_grad=True)
    targets = Targets(
        torch.zeros(2, dtype=torch.long),
        torch.ones(2),
        advantage_T=torch.ones(2),
        engine_logp_T=torch.tensor([-1.1, -3.0], dtype=torch.float64),
    )
    objective = objectives.grpo(beta=0.0, importance_cap=2.0)
    loss = objective.loss(student(logp), targets)
    assert loss.tolist() == pytest.approx([-math.exp(0.1), -2.0])
    (grad,) = torch.autograd.grad(loss.sum(), logp)
    assert grad.tolist() == pytest.approx([-math.exp(0.1), -2.0])
    found = objective.measure(student(logp.detach()), targets)["kl_engine"]
    assert found.tolist() == pytest.approx([math.exp(0.1) - 1.1, math.exp(2.0) - 3.0])
