"""Scores of one arm, against values by hand, enumeration and simulation."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as distributions

from distill.reports import statistics


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (16, 2, 8, 1 - 3003 / 12870),  # C(14, 8) / C(16, 8): .7667
        (4, 1, 1, 0.25),
        (4, 0, 4, 0.0),
        (4, 4, 1, 1.0),
        (5, 3, 3, 1.0),  # two wrong ones cannot fill three places
        (10, 3, 2, 1 - 21 / 45),
    ],
)
def test_pass_at_k_by_hand(n: int, c: int, k: int, expected: float) -> None:
    assert float(statistics.pass_at_k(n, c, k)) == pytest.approx(expected, abs=1e-14)


@given(st.integers(1, 300), st.data())
@settings(max_examples=200, deadline=None)
def test_pass_at_k_is_the_exact_ratio_of_binomials(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    exact = 1 - math.comb(n - c, k) / math.comb(n, k)
    assert float(statistics.pass_at_k(n, c, k)) == pytest.approx(exact, rel=1e-10, abs=1e-13)


def test_pass_at_k_is_precise_for_tiny_probabilities() -> None:
    assert float(statistics.pass_at_k(10**12, 1, 1)) == pytest.approx(1e-12, rel=1e-12)


def test_pass_at_k_refuses_k_above_n() -> None:
    with pytest.raises(ValueError, match="pass@8"):
        statistics.pass_at_k(np.array([16, 4]), np.array([2, 1]), 8)


@pytest.mark.parametrize(("right", "n"), [(0, 10), (3, 10), (10, 10), (81, 263), (1, 1)])
def test_wilson_is_scipys(right: int, n: int) -> None:
    ours = statistics.wilson(right, n)
    theirs = distributions.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    assert ours.low <= ours.value <= ours.high


def test_wilson_by_hand() -> None:
    # z = 1.96: (81 + 1.92) / (263 + 3.84) -+ 1.96 / 266.84 * sqrt(81 * 182 / 263 + .96), Wilson's own formula.
    centre, half = 82.92073 / 266.84146, 1.959964 / 266.84146 * math.sqrt(81 * 182 / 263 + 0.960365)
    ours = statistics.wilson(81, 263)
    assert (ours.low, ours.high) == pytest.approx((centre - half, centre + half), abs=1e-5)


def test_bca_is_scipys() -> None:
    values = np.random.default_rng(3).beta(0.6, 1.4, 60)
    ours = statistics.bca(values, resamples=40_000, seed=1)
    theirs = distributions.bootstrap(
        (values,), np.mean, n_resamples=40_000, method="BCa", rng=np.random.default_rng(2)
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=3e-3)


def test_one_sample_a_problem_is_wilson_and_several_are_resampled() -> None:
    assert statistics.accuracy([[1], [0], [1], [1]]).method == "wilson"
    assert statistics.accuracy([[1, 0], [0, 0], [1, 1]]).method == "bootstrap"
    never = statistics.accuracy([[0] * 16] * 30)
    assert never.value == never.low == 0
    assert never.high == pytest.approx(statistics.wilson(0, 30).high)


def test_accuracy_weighs_problems_equally_and_leaves_out_what_was_not_judged() -> None:
    ragged = statistics.accuracy([[1, 1, 1, 1], [0], [None, 1, 0], [None]])
    assert ragged.value == pytest.approx((1 + 0 + 0.5) / 3)
    assert ragged.n == 3
    with pytest.raises(ValueError, match="no problem was judged"):
        statistics.accuracy([[None], []])


def test_the_problem_is_the_unit() -> None:
    """30 problems x 64 samples: the interval of pooled samples would be a fifth as wide."""
    rng = np.random.default_rng(5)
    chance = rng.beta(0.7, 0.6, 30)
    correct = rng.random((30, 64)) < chance[:, None]
    by_problem = statistics.accuracy(correct.tolist())
    pooled = statistics.wilson(int(correct.sum()), correct.size)
    assert by_problem.value == pytest.approx(pooled.value)
    assert 0.044 < pooled.high - pooled.low < 0.046
    assert by_problem.high - by_problem.low > 4 * (pooled.high - pooled.low)


def test_intervals_cover() -> None:
    """95% intervals over 40 problems x 4 samples contain the true mean about 95 times in 100."""
    rng, hits, trials = np.random.default_rng(11), 0, 400
    for trial in range(trials):
        chance = rng.beta(1.0, 1.5, 40)
        correct = rng.random((40, 4)) < chance[:, None]
        interval = statistics.mean_interval(correct.mean(1), resamples=1000, seed=trial)
        hits += interval.low <= 0.4 <= interval.high
    assert 0.91 < hits / trials < 0.985


def test_the_same_seed_gives_the_same_interval() -> None:
    correct = [[1, 0, 1], [0, 0, 1], [1, 1, 1], [0, 1, 0]]
    assert statistics.accuracy(correct, seed=4) == statistics.accuracy(correct, seed=4)


def test_resampling_in_blocks_keeps_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.linspace(0, 1, 50)
    whole = statistics.bca(values, resamples=3000)
    monkeypatch.setattr(statistics, "BLOCK", 1000)
    assert statistics.bca(values, resamples=3000) == whole


# ------------------------------------------------------------------------------------------ training seeds


def test_the_parts_of_the_variance_by_hand() -> None:
    # Seed means .25, .5; problem means .5, .25; interaction -+.125 in all four cells.
    values = np.array([[0.5, 0.0], [0.5, 0.5]])
    seed_part, problem_part, noise = statistics.seed_variance(values)
    assert seed_part == pytest.approx(2 * 0.125**2 / 2)
    assert problem_part == pytest.approx(2 * 0.125**2 / 2)
    assert noise == pytest.approx(4 * 0.125**2 / 4)


def test_one_seed_is_the_interval_over_problems() -> None:
    values = np.random.default_rng(0).beta(1, 1, 50)
    assert statistics.over_seeds(values[None]) == statistics.mean_interval(values)
    with pytest.raises(ValueError, match="every seed"):
        statistics.over_seeds([[0.5, float("nan")]])


def test_intervals_over_seeds_cover_and_those_over_problems_do_not() -> None:
    """Three seeds with 3 points of spread between them, on the same 256 problems."""
    rng, trials, hits, alone = np.random.default_rng(4), 300, 0, 0
    for _ in range(trials):
        chance = rng.beta(1.0, 1.5, 256)
        moved = np.clip(chance + rng.normal(0, 0.03, (3, 1)), 0, 1)
        values = rng.binomial(4, moved) / 4
        together = statistics.over_seeds(values)
        hits += together.low <= 0.4 <= together.high
        pooled = statistics.wilson(round(values.sum() * 4), values.size * 4)
        alone += pooled.low <= 0.4 <= pooled.high
    assert hits / trials > 0.92
    assert alone / trials < 0.75


# ---------------------------------------------------------------------------------------------- maj@k


def by_enumeration(answers: list[str | None], gold: str, k: int) -> float:
    """By definition: over all subsets of size k, the share of correct answers among the most frequent valid ones."""
    results = []
    for chosen in itertools.combinations(answers, k):
        valid = [a for a in chosen if a is not None]
        votes = {a: valid.count(a) for a in valid}
        leaders = [a for a, v in votes.items() if v == max(votes.values())]
        results.append(leaders.count(gold) / len(leaders) if leaders else 0.0)
    return sum(results) / len(results)


@given(st.lists(st.sampled_from(["7", "8", "9", "10", None]), min_size=1, max_size=9), st.data())
@settings(max_examples=150, deadline=None)
def test_majority_is_the_mean_over_all_subsets(answers: list[str | None], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(answers)))
    groups = statistics.clusters(answers, [a == "7" for a in answers], str.__eq__)
    expected = by_enumeration(answers, "7", k)
    assert statistics.majority(groups, len(answers), k) == pytest.approx(expected, abs=1e-12)


def test_majority_by_hand() -> None:
    def vote(answers: list[str | None]) -> float:
        groups = statistics.clusters(answers, [a == "7" for a in answers], str.__eq__)
        return statistics.majority(groups, len(answers), len(answers))

    assert vote(["7", "7", "8"]) == 1
    assert vote(["7", "8"]) == 0.5
    assert vote(["7", "8", "9"]) == pytest.approx(1 / 3)
    assert vote(["7", None, None, None]) == 1
    assert vote([None, None]) == 0


def test_equivalent_answers_vote_together() -> None:
    same = lambda a, b: float(a) == float(b)  # noqa: E731
    answers, correct = (
        [["1/2".replace("1/2", "0.5"), "0.50", "3", "3"]],
        [[True, True, False, False]],
    )
    assert statistics.maj_at(answers, correct, 4, same).value == 0.5
    assert statistics.maj_at([["0.5", "0.50", "3", "3.1"]], correct, 4, same).value == 1.0
    assert statistics.maj_at([["0.5", "0.50", "3", "3.1"]], correct, 4).value == 0.5


def test_majority_of_64_is_quick_and_bounded() -> None:
    rng = np.random.default_rng(0)
    answers = [[str(a) for a in rng.geometric(0.2, 64)] for _ in range(5)]
    correct = [[a == "1" for a in row] for row in answers]
    for k in (1, 8, 32, 64):
        assert 0 <= statistics.maj_at(answers, correct, k).value <= 1
    assert statistics.maj_at(answers, correct, 1).value == pytest.approx(statistics.accuracy(correct).value, abs=1e-9)


@pytest.mark.parametrize(("shape", "spread"), [((3, 7), 0.1), ((2, 2), 0.3), ((5, 40), 0.0), ((4, 3), 0.5)])
def test_the_interval_over_seeds_is_satterthwaites(shape: tuple[int, int], spread: float) -> None:
    """Against the two-way table of an analysis of variance, computed with loops."""
    rng = np.random.default_rng(sum(shape))
    values = 0.4 + 0.1 * rng.random(shape) + spread * rng.random((shape[0], 1)) * 0.5
    s, p = shape
    grand = sum(values[a, b] for a in range(s) for b in range(p)) / (s * p)
    rows = [sum(values[a, b] for b in range(p)) / p for a in range(s)]
    columns = [sum(values[a, b] for a in range(s)) / s for b in range(p)]
    seeds = sum((row - grand) ** 2 for row in rows) / (s - 1) / s
    problems = sum((column - grand) ** 2 for column in columns) / (p - 1) / p
    rest = sum((values[a, b] - rows[a] - columns[b] + grand) ** 2 for a in range(s) for b in range(p))
    noise = rest / ((s - 1) * (p - 1)) / (s * p)
    assert statistics.seed_variance(values) == pytest.approx((seeds, problems, noise))
    variance = max(seeds + problems - noise, seeds, problems)
    freedom = variance**2 / (seeds**2 / (s - 1) + problems**2 / (p - 1))
    for level in (0.95, 0.5):
        half = distributions.t.ppf(0.5 + level / 2, freedom) * math.sqrt(variance)
        found = statistics.over_seeds(values, level)
        assert (found.value, found.low, found.high) == pytest.approx(
            (grand, max(grand - half, 0), min(grand + half, 1))
        )
        assert (found.n, found.method) == (p, "seeds and problems")
    wide = statistics.over_seeds(40 * values, bounded=False)
    half = 40 * distributions.t.ppf(0.975, freedom) * math.sqrt(variance)
    assert (wide.low, wide.high) == pytest.approx((40 * grand - half, 40 * grand + half))


def test_the_part_of_noise_is_taken_off_once_and_never_below_a_part() -> None:
    seeds_alone = np.array([[0.2] * 6, [0.4] * 6, [0.9] * 6])
    found = statistics.over_seeds(seeds_alone)
    assert found.high - found.low == pytest.approx(1.0 - max(0.5 - 4.3027 * 0.2082, 0.0), abs=1e-3)
    rng = np.random.default_rng(5)
    noise_alone = rng.normal(0.0, 1.0, (6, 6))
    seed_part, problem_part, noise = statistics.seed_variance(noise_alone)
    assert seed_part + problem_part - noise < seed_part + problem_part
    both = statistics.over_seeds(noise_alone, bounded=False)
    assert ((both.high - both.low) / 2) ** 2 > max(seed_part, problem_part)


def test_intervals_of_one_problem_one_seed_and_no_spread() -> None:
    one = statistics.mean_interval([0.25])
    assert dataclasses.astuple(one) == (0.25, 0.0, 1.0, 1, "one problem")
    assert statistics.mean_interval([1.0]).method == "wilson"
    two = statistics.mean_interval([0.25, 0.75])
    assert (two.method, two.n, two.value) == ("bootstrap", 2, 0.5)
    values = np.random.default_rng(3).random(9).tolist()
    assert statistics.mean_interval(values, 0.8, 500, 7) == statistics.bca(np.array(values), 0.8, 500, 7)
    assert statistics.mean_interval(values, seed=1) != statistics.mean_interval(values, seed=2)
    assert statistics.mean_interval(values) == statistics.mean_interval(values, seed=0)
    assert statistics.mean_interval([0.0, 1.0, 1.0], 0.8) == statistics.wilson(2, 3, 0.8)
    same = np.array([[0.2, 0.4, 0.9], [0.2, 0.4, 0.9]]) * 0 + 0.5
    assert statistics.over_seeds(same, 0.8) == statistics.mean_interval(same.mean(0), 0.8)
    assert statistics.over_seeds(2 * same, 0.8, bounded=False) == statistics.bca(2 * same.mean(0), 0.8)
    assert dataclasses.astuple(statistics.bca(np.full(4, 0.3))) == (0.3, 0.3, 0.3, 4, "bootstrap")
    assert statistics.over_seeds([[0.1], [0.7], [0.4]], 0.8).method == "one problem"
    assert statistics.wilson(2, 3).n == 3
    for wrong in ([0.1, 0.2], [], [[]], [[[0.1]]]):
        with pytest.raises(ValueError, match=r"^every seed needs a value for every problem$"):
            statistics.over_seeds(wrong)
    with pytest.raises(ValueError, match=r"^no problem was judged$"):
        statistics.mean_interval([])
    with pytest.raises(ValueError, match=r"^a proportion needs at least one observation$"):
        statistics.wilson(0, 0)


def test_votes_leave_out_what_they_cannot_count() -> None:
    answers = [["1", "1", "2"], ["3", None, "3"], ["4"]]
    correct = [[True, True, False], [False, False, False], [True]]
    assert statistics.maj_at_k(answers, correct, 3).tolist()[:2] == [1.0, 0.0]
    assert np.isnan(statistics.maj_at_k(answers, correct, 3)[2])
    found = statistics.maj_at(answers, correct, 3, level=0.8)
    assert found == statistics.wilson(1, 2, 0.8)
    with pytest.raises(ValueError, match="maj@4: no problem has 4 samples"):
        statistics.maj_at(answers, correct, 4)
    assert statistics.clusters(["a", None, "b", "a"], [True, True, None, False], str.__eq__) == [(2, 0.5), (1, 0.0)]
    num, right = statistics.counts([[True, None, False], []])
    assert (num.tolist(), right.tolist()) == ([2, 0], [1, 0])
    assert (num.dtype, right.dtype) == (np.int64, np.int64)


def test_pass_at_k_of_several_problems_leaves_out_those_with_too_few_samples() -> None:
    assert statistics.pass_at_k([4, 4], [1, 4], 2).tolist() == pytest.approx([0.5, 1.0])
    correct = [[True, False, False, False], [True] * 4, [None, True, True, None], [False]]
    found = statistics.pass_at(correct, 2, 0.8, 400, 3)
    assert found == statistics.mean_interval(np.array([0.5, 1.0, 1.0]), 0.8, 400, 3)
    assert statistics.pass_at(correct, 2).value == pytest.approx(2.5 / 3)
    with pytest.raises(ValueError, match="pass@5: no problem has 5 judged samples"):
        statistics.pass_at(correct, 5)
    for n, c in ((4, -1), (4, 5), ([4, 4], [1, 5])):
        with pytest.raises(ValueError, match="needs 1 <= k <= n and 0 <= c <= n"):
            statistics.pass_at_k(n, c, 1)
    with pytest.raises(ValueError, match="zip"):
        statistics.clusters(["a", "b"], [True], str.__eq__)
    with pytest.raises(ValueError, match="maj@3 needs 1 <= k <= n, not n=2"):
        statistics.majority([(2, 1.0)], 2, 3)
