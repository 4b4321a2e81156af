"""The accuracy of one arm: pass@1, pass@k and maj@k, each with a confidence interval over problems.

Input: `correct[problem][sample]`, ragged, None for completions that could not be judged (excluded from means). Output: an
`Interval`. Samples of one problem are correlated, so the problem is the unit of resampling: 30 problems with 64 samples
each are 30 observations, not 1,920. Differences between arms are computed in `comparison`.

Shape suffixes: P problems, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special, stats

Floats = npt.NDArray[np.float64]
Correct = Sequence[Sequence[bool | float | None]]

LEVEL = 0.95
RESAMPLES = 10_000
BLOCK = 4_000_000
"""Maximum numbers in memory at once while resampling."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its confidence interval. n: number of problems. method: how the interval was computed."""

    value: float
    low: float
    high: float
    n: int
    method: str


def z_value(level: float) -> float:
    """Return the normal quantile with (1 - level) / 2 above it."""
    return float(special.ndtri(0.5 + level / 2))


# --------------------------------------------------------------------------------------------- intervals


def wilson(successes: int, n: int, level: float = LEVEL) -> Interval:
    """Wilson's score interval for a proportion (Wilson 1927)."""
    if n < 1:
        raise ValueError("a proportion needs at least one observation")
    ends = stats.binomtest(successes, n).proportion_ci(level, "wilson")
    return Interval(successes / n, float(ends.low), float(ends.high), n, "wilson")


def bca(values_P: Floats, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Bias-corrected and accelerated bootstrap interval for a mean (Efron 1987).

    If all values are equal the interval is the value itself.
    """
    num, value = len(values_P), float(values_P.mean())
    if float(((values_P - value) ** 2).sum()) <= 1e-24 * num:
        return Interval(value, value, value, num, "bootstrap")
    ends = stats.bootstrap(
        (values_P,),
        np.mean,
        method="BCa",
        confidence_level=level,
        n_resamples=resamples,
        batch=max(1, BLOCK // num),
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(value, float(ends.low), float(ends.high), num, "bootstrap")


def mean_interval(
    values: Sequence[float] | Floats,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean of one value in [0, 1] per problem: Wilson's interval if every value is 0 or 1, else BCa over problems.

    Wilson's interval also holds with several samples per problem if each problem is always or never solved; a bootstrap
    of only zeros would have no width.
    """
    values_P = np.asarray(values, np.float64)
    if not len(values_P):
        raise ValueError("no problem was judged")
    if bool(np.isin(values_P, (0.0, 1.0)).all()):
        return wilson(int(values_P.sum()), len(values_P), level)
    if len(values_P) == 1:
        return Interval(float(values_P[0]), 0.0, 1.0, 1, "one problem")
    return bca(values_P, level, resamples, seed)


def seed_variance(values_SP: Floats) -> tuple[float, float, float]:
    """(part of seeds, part of problems, noise in both parts) of the variance of the mean of value[seed][problem].

    For value = mean + seed + problem + noise, var(seed means) / S contains the variances of seed and noise, and
    var(problem means) / P those of problem and noise. The noise contained in both is the interaction's mean square / (S P).
    Needs at least two seeds and two problems.
    """
    s, p = values_SP.shape
    seed_part = float(values_SP.mean(1).var(ddof=1)) / s
    problem_part = float(values_SP.mean(0).var(ddof=1)) / p
    rest_SP = values_SP - values_SP.mean(0) - values_SP.mean(1, keepdims=True) + values_SP.mean()
    return seed_part, problem_part, float((rest_SP**2).sum()) / ((s - 1) * (p - 1)) / (s * p)


def over_seeds(values: Sequence[Sequence[float]] | Floats, level: float = LEVEL, *, bounded: bool = True) -> Interval:
    """Mean of value[training seed][problem], with an interval over both seeds and problems.

    Student's t interval with the variance of the two-way random-effects model and Satterthwaite's (1946) degrees of
    freedom. With one seed, the interval over problems. n is the number of problems. bounded: the values are in [0, 1].
    """
    values_SP = np.asarray(values, np.float64)
    if values_SP.ndim != 2 or not values_SP.size or bool(np.isnan(values_SP).any()):
        raise ValueError("every seed needs a value for every problem")
    s, num = values_SP.shape
    over_problems = mean_interval if bounded else bca
    if s < 2 or num < 2:
        return over_problems(values_SP.mean(0), level)
    seed_part, problem_part, noise = seed_variance(values_SP)
    variance = max(seed_part + problem_part - noise, seed_part, problem_part)
    value = float(values_SP.mean())
    if variance <= 1e-24:
        return over_problems(values_SP.mean(0), level)
    squares = seed_part**2 / (s - 1) + problem_part**2 / (num - 1)
    half = float(special.stdtrit(variance**2 / squares, 0.5 + level / 2)) * math.sqrt(variance)
    low, high = (max(value - half, 0.0), min(value + half, 1.0)) if bounded else (value - half, value + half)
    return Interval(value, low, high, num, "seeds and problems")


# ---------------------------------------------------------------------------------------------- pass@k


def counts(correct: Correct) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Number of judged samples [P] and of correct samples [P] of each problem."""
    judged = [[bool(one) for one in samples if one is not None] for samples in correct]
    return (
        np.array([len(samples) for samples in judged], np.int64),
        np.array([sum(samples) for samples in judged], np.int64),
    )


def problem_means(correct: Correct) -> Floats:
    """[P] share of correct samples of each problem; nan if none was judged."""
    num_P, right_P = counts(correct)
    return np.where(num_P > 0, right_P / np.maximum(num_P, 1), np.nan)


def accuracy(correct: Correct, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """pass@1: the mean over problems of the share of correct samples, with an interval over problems."""
    means_P = problem_means(correct)
    return mean_interval(means_P[~np.isnan(means_P)], level, resamples, seed)


def pass_at_k(n: npt.ArrayLike, c: npt.ArrayLike, k: int) -> Floats:
    """Probability that k of n samples, c of them correct, include a correct one: 1 - C(n-c, k) / C(n, k).

    Unbiased (Chen et al. 2021). The ratio is the product of (n-c-j) / (n-j) over j < k, computed as a sum of logarithms
    for precision with large n and small probabilities. Raises ValueError if n < k.
    """
    n_P, c_P = np.asarray(n, np.float64), np.asarray(c, np.float64)
    if k < 1 or bool((n_P < k).any()) or bool(((c_P < 0) | (c_P > n_P)).any()):
        raise ValueError(f"pass@{k} needs 1 <= k <= n and 0 <= c <= n, not n={n!r}, c={c!r}")
    j = np.arange(k)
    with np.errstate(divide="ignore"):
        logs = np.log1p(-np.minimum(c_P[..., None] / (n_P[..., None] - j), 1.0))
    return np.asarray(-np.expm1(logs.sum(-1)))


def pass_at(correct: Correct, k: int, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Mean pass@k over the problems with at least k judged samples, with an interval over problems."""
    num_P, right_P = counts(correct)
    enough_P = num_P >= k
    if not enough_P.any():
        raise ValueError(f"pass@{k}: no problem has {k} judged samples")
    return mean_interval(pass_at_k(num_P[enough_P], right_P[enough_P], k), level, resamples, seed)


# ---------------------------------------------------------------------------------------------- maj@k


def clusters(
    answers: Sequence[str | None],
    correct: Sequence[bool | float | None],
    equivalent: Callable[[str, str], bool],
) -> list[tuple[int, float]]:
    """(size, share of members judged correct) of each group of equivalent answers; None belongs to no group."""
    groups: list[tuple[str, list[float]]] = []
    home: dict[str, int] = {}
    for answer, right in zip(answers, correct, strict=True):
        if answer is None:
            continue
        if answer not in home:
            found = (i for i, (first, _) in enumerate(groups) if equivalent(first, answer))
            home[answer] = next(found, len(groups))
            if home[answer] == len(groups):
                groups.append((answer, []))
        groups[home[answer]][1].append(float(bool(right)))
    return [(len(members), sum(members) / len(members)) for _, members in groups]


def majority(groups: Sequence[tuple[int, float]], n: int, k: int) -> float:
    """Expected correctness of the most frequent answer among k of n samples: the exact mean over all subsets of size k.

    Ties are split evenly among the tied answers. Samples in no group are invalid: they count as drawn but never win; a
    subset of only invalid samples is wrong. For each group and each number m of its samples in the subset, the function
    counts the subsets in which no other group has more than m samples, by the number of groups with exactly m.
    """
    if not 1 <= k <= n:
        raise ValueError(f"maj@{k} needs 1 <= k <= n, not n={n}")
    invalid = n - sum(size for size, _ in groups)
    expected = 0.0
    for g, (size, right) in enumerate(groups):
        if right == 0.0:
            continue
        others = [other for i, (other, _) in enumerate(groups) if i != g]
        for m in range(1, min(size, k) + 1):
            ways = _ways_behind(others, invalid, k - m, m)
            won = sum(count / (tied + 1) for tied, count in enumerate(ways))
            expected += right * math.comb(size, m) * won
    return float(expected / math.comb(n, k))


def _ways_behind(sizes: Sequence[int], invalid: int, places: int, m: int) -> Floats:
    """[ties] number of ways to draw `places` samples: at most m of each group, and any of the invalid samples.

    ties: number of groups of which exactly m are drawn.
    """
    most_tied = places // m
    ways = np.zeros((most_tied + 1, places + 1))
    ways[0] = [float(math.comb(invalid, j)) for j in range(places + 1)]
    for size in sizes:
        grown = ways.copy()
        for j in range(1, min(size, m, places) + 1):
            tie = 1 if j == m else 0
            grown[tie:, j:] += math.comb(size, j) * ways[: most_tied + 1 - tie, : places + 1 - j]
        ways = grown
    return ways[:, places]


def maj_at(
    answers: Sequence[Sequence[str | None]],
    correct: Correct,
    k: int,
    equivalent: Callable[[str, str], bool] = str.__eq__,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean maj@k over the problems with at least k samples, with an interval over problems.

    equivalent: whether two answers are the same; assumed to be transitive.
    """
    values = maj_at_k(answers, correct, k, equivalent)
    values = values[~np.isnan(values)]
    if not len(values):
        raise ValueError(f"maj@{k}: no problem has {k} samples")
    return mean_interval(values, level, resamples, seed)


def maj_at_k(
    answers: Sequence[Sequence[str | None]],
    correct: Correct,
    k: int,
    equivalent: Callable[[str, str], bool] = str.__eq__,
) -> Floats:
    """[P] maj@k of each problem; nan if it has fewer than k samples."""
    return np.array(
        [
            majority(clusters(ours, right, equivalent), len(ours), k) if len(ours) >= k else np.nan
            for ours, right in zip(answers, correct, strict=True)
        ]
    )
