"""Comparisons of arms, against scipy, values by hand and simulated equal arms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as distributions

from distill.records import UserError
from distill.reports import comparison
from distill.reports.statistics import problem_means


def test_mcnemar_by_hand() -> None:
    # 9 wins, 1 loss: P(X <= 1 or X >= 9) = 22 / 1024.
    assert comparison.mcnemar(9, 1) == pytest.approx(22 / 1024)
    assert comparison.mcnemar(0, 0) == 1.0
    assert comparison.mcnemar(5, 5) == 1.0


def paired(a, b, **options):
    """Two arms by correct[problem][sample]."""
    return comparison.paired(problem_means(a) - problem_means(b), **options)


def test_one_sample_a_problem_is_mcnemar() -> None:
    a = [[1]] * 9 + [[0]] + [[1]] * 20
    b = [[0]] * 9 + [[1]] + [[1]] * 20
    pair = paired(a, b)
    assert (pair.wins, pair.losses, pair.method) == (9, 1, "McNemar exact")
    assert pair.p_value == pytest.approx(22 / 1024)
    assert pair.difference.value == pytest.approx(8 / 30)
    # Bonett and Price: (10 - 2) / 32 -+ 1.96 sqrt((12/32 - (8/32)^2) / 32)
    half = 1.959964 * np.sqrt((12 / 32 - (8 / 32) ** 2) / 32)
    assert pair.difference.low == pytest.approx(0.25 - half, abs=1e-6)
    assert pair.difference.high == pytest.approx(0.25 + half, abs=1e-6)


def test_sign_flips_exact_and_drawn_agree_with_scipy() -> None:
    rng = np.random.default_rng(2)
    for num in (8, 40):
        delta = np.round(rng.normal(0.1, 0.3, num), 2)
        theirs = distributions.permutation_test(
            (delta, np.zeros(num)),
            lambda x, y: np.mean(x - y),
            permutation_type="samples",
            n_resamples=20_000,
            rng=np.random.default_rng(0),
        ).pvalue
        ours = comparison.permutation_p(delta, 20_000)
        assert ours == pytest.approx(theirs, abs=1e-9 if num == 8 else 0.012)


def test_pairing_finds_a_difference_that_separate_intervals_hide() -> None:
    """Problems of very different difficulty; one arm is slightly better on each."""
    rng = np.random.default_rng(4)
    base = rng.integers(0, 13, 60)
    a = [[1] * int(n + 3) + [0] * int(13 - n) for n in base]
    b = [[1] * int(n + 1) + [0] * int(15 - n) for n in base]
    pair = paired(a, b)
    assert pair.difference.value == pytest.approx(2 / 16)
    assert pair.differ
    assert pair.p_value < 1e-3


def test_equal_arms_do_not_differ() -> None:
    same = [[1, 0], [0, 0], [1, 1]]
    pair = paired(same, same)
    assert (pair.p_value, pair.wins, pair.losses, pair.differ) == (1.0, 0, 0, False)
    assert pair.difference.low < 0 < pair.difference.high


def test_swapping_the_arms_changes_the_sign_only() -> None:
    rng = np.random.default_rng(9)
    a, b = (rng.random((2, 50, 4)) < np.array([0.5, 0.35])[:, None, None]).tolist()
    one, other = paired(a, b), paired(b, a)
    assert one.difference.value == -other.difference.value
    assert one.difference.low == pytest.approx(-other.difference.high, abs=0.01)
    assert (one.wins, one.losses) == (other.losses, other.wins)


def test_paired_false_positives_are_alpha() -> None:
    rng, wrong, trials = np.random.default_rng(1), 0, 400
    for trial in range(trials):
        chance = rng.beta(0.8, 1.0, 50)
        a, b = (rng.random((2, 50, 4)) < chance[:, None]).tolist()
        wrong += paired(a, b, resamples=1000, seed=trial).differ
    assert wrong / trials < 0.05 + 3 * np.sqrt(0.05 * 0.95 / trials)


def test_holm_by_hand() -> None:
    assert comparison.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert comparison.holm([0.5, 0.9]) == [1.0, 1.0]
    assert comparison.holm([]) == []


def test_every_pair_is_compared_by_problem_id_and_corrected() -> None:
    rng = np.random.default_rng(6)
    ids = [f"p{i}" for i in range(40)]
    low, high = {i: [0] for i in ids}, {i: [1] for i in reversed(ids)}
    coin = {i: [int(rng.random() < 0.5)] for i in ids}
    pairs = comparison.compare_trained({"low": {0: low}, "high": {0: high}, "coin": {0: coin}})
    assert list(pairs) == [("low", "high"), ("low", "coin"), ("high", "coin")]
    assert pairs["low", "high"].difference.value == -1
    assert all(pair.p_holm >= pair.p_value for pair in pairs.values())


def test_arms_on_other_problems_are_refused() -> None:
    with pytest.raises(UserError, match="different problems"):
        comparison.compare_trained({"a": {0: {"p1": [1]}}, "b": {0: {"p2": [1]}}})


# -------------------------------------------------------------------------------------- seeds and problems


def simulated(rng: np.random.Generator, seeds: int, spread: float, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Two arms on 256 problems of different difficulty, 4 samples each; a training seed shifts all problems."""
    chance = 1 / (1 + np.exp(-rng.normal(-0.5, 1.5, 256)))
    arms = []
    for move in (shift, 0.0):
        moved = chance + rng.normal(move, spread, (seeds, 1))
        arms.append(rng.binomial(4, np.clip(moved, 0, 1)) / 4)
    return arms[0], arms[1]


def test_false_positives_with_a_spread_between_seeds() -> None:
    """Equal arms, 3 seeds, 3 points of spread: a test over problems alone would call nearly half different."""
    rng, trials = np.random.default_rng(8), 500
    together = alone = 0
    for trial in range(trials):
        a, b = simulated(rng, 3, 0.03)
        found = comparison.difference_over_seeds(a.tolist(), b.tolist(), resamples=400, seed=trial)
        together += found.verdict == "supported"
        delta = a.mean(0) - b.mean(0)
        alone += abs(delta.mean()) > 1.96 * delta.std(ddof=1) / np.sqrt(len(delta))
    assert together / trials < 0.05 + 2 * np.sqrt(0.05 * 0.95 / trials)
    assert alone / trials > 0.3


def test_a_real_difference_is_supported() -> None:
    rng, trials = np.random.default_rng(10), 60
    found = [comparison.difference_over_seeds(*simulated(rng, 3, 0.02, 0.15), resamples=400) for _ in range(trials)]
    assert sum(one.verdict == "supported" for one in found) / trials > 0.9
    assert np.mean([one.difference.value for one in found]) == pytest.approx(0.14, abs=0.02)
    assert np.mean([one.difference.low < 0.135 < one.difference.high for one in found]) > 0.9


def test_few_seeds_support_nothing() -> None:
    rng = np.random.default_rng(0)
    a, b = simulated(rng, 1, 0.0, 0.5)
    one = comparison.difference_over_seeds(a.tolist(), b.tolist())
    assert one.verdict == "inconclusive"
    assert (one.difference.low, one.difference.high, one.p_value) == (-1, 1, 1)
    a, b = simulated(rng, 2, 0.001, 0.5)
    two = comparison.difference_over_seeds(a.tolist(), b.tolist())
    assert two.difference.low > 0
    assert two.verdict == "inconclusive"


def test_interval_and_p_value_agree() -> None:
    rng = np.random.default_rng(12)
    disagree = 0
    for _ in range(40):
        a, b = simulated(rng, 3, 0.03, 0.1)
        one = comparison.difference_over_seeds(a.tolist(), b.tolist(), resamples=1000)
        outside = one.difference.low > 0 or one.difference.high < 0
        disagree += outside != (one.p_value < 0.05)
    assert disagree <= 2


def runs(values_SP: np.ndarray, samples: int = 4) -> dict[int, dict[str, list[bool]]]:
    """value[seed][problem] (quarters) as judged samples by training seed and problem id; ids are reversed in odd seeds."""
    found = {}
    for seed, row in enumerate(values_SP, 1):
        right = [round(value * samples) for value in row]
        items = [(f"p{i:03d}", [n < c for n in range(samples)]) for i, c in enumerate(right)]
        found[seed] = dict(items[::-1] if seed % 2 else items)
    return found


def test_trained_arms_over_seeds_and_checkpoints_as_checkpoints() -> None:
    rng = np.random.default_rng(13)
    a, b = simulated(rng, 3, 0.01, 0.2)
    arms = {"start": runs(b[:1] * 0), "a": runs(a), "b": runs(b), "again": runs(b)}
    pairs = comparison.compare_trained(arms)
    assert list(pairs)[:2] == [("start", "a"), ("start", "b")]
    assert isinstance(pairs["start", "a"], comparison.Paired)
    assert pairs["start", "a"].difference.value == pytest.approx(-a.mean())
    both = pairs["a", "b"]
    assert isinstance(both, comparison.SeedsDifference)
    alone = comparison.difference_over_seeds(a.tolist(), b.tolist())
    assert both.difference.value == pytest.approx(alone.difference.value)
    assert both.p_value == pytest.approx(alone.p_value)
    assert (both.verdict, pairs["b", "again"].verdict) == ("supported", "inconclusive")  # type: ignore[union-attr]
    assert both.p_holm == pytest.approx(comparison.holm([pairs[k].p_value for k in
        (("a", "b"), ("a", "again"), ("b", "again"))])[0])  # fmt: skip


def test_a_problem_that_was_not_judged_is_left_out_of_every_arm() -> None:
    rng = np.random.default_rng(14)
    a, b = simulated(rng, 2, 0.01, 0.1)
    arms = {"a": runs(a), "b": runs(b)}
    arms["a"][2]["p007"] = [None, None, None, None]  # type: ignore[list-item]
    keep = np.arange(a.shape[1]) != 7
    expected = a[:, keep].mean() - b[:, keep].mean()
    assert comparison.compare_trained(arms)["a", "b"].difference.value == pytest.approx(expected)


def test_false_positives_of_trained_arms_through_samples() -> None:
    """Equal arms, 3 training seeds with a 3-point spread, three pairs, Holm: some pair supported in at most 5%."""
    rng, trials, wrong = np.random.default_rng(21), 100, 0
    for trial in range(trials):
        chance = 1 / (1 + np.exp(-rng.normal(-0.5, 1.5, 128)))
        arms = {}
        for name in "abc":
            moved = np.clip(chance + rng.normal(0, 0.03, (3, 1)), 0, 1)
            arms[name] = runs(rng.binomial(4, moved) / 4)
        pairs = comparison.compare_trained(arms, resamples=300, seed=trial)
        wrong += any(one.verdict == "supported" for one in pairs.values())  # type: ignore[union-attr]
    assert wrong / trials < 0.05 + 2 * np.sqrt(0.05 * 0.95 / trials)


def test_seeds_on_other_problems_and_other_starts_are_refused() -> None:
    one = {1: {"p1": [True]}, 2: {"p2": [True]}}
    with pytest.raises(UserError, match=r"'a \(seed 1\)' and 'a \(seed 2\)' were evaluated on different problems"):
        comparison.compare_trained({"a": one})
    with pytest.raises(UserError, match="'kl' and 'rl' start from different checkpoints \\('small' and 'base'\\)"):
        comparison.check_same_start({"kl": "small", "sft": "small", "rl": "base"})
    comparison.check_same_start({"kl": "small", "sft": "small"})
    comparison.check_same_start({})


def test_ragged_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="every problem"):
        comparison.difference_over_seeds([[0.1, 0.2]], [[0.1]])
    with pytest.raises(ValueError, match="no judged sample"):
        comparison.difference_over_seeds([[0.1, float("nan")]], [[0.1, 0.2]])


def test_seeds_without_any_variation_are_not_certainty() -> None:
    """All wrong in every seed of both arms: the interval is that of one pair of checkpoints that are all wrong."""
    nothing = [[0.0] * 5] * 3
    none = comparison.difference_over_seeds(nothing, nothing)
    pair = paired([[False]] * 5, [[False]] * 5)
    assert none.difference.low == pytest.approx(pair.difference.low)
    assert none.difference.high == pytest.approx(pair.difference.high)
    assert none.p_value == 1.0
