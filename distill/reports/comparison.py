"""Comparisons of two arms: the difference in accuracy, its confidence interval and p-value, and the verdict.

There are two different questions. "Do these two checkpoints differ?" is answered by a paired comparison on the same
problems (`paired`). "Is one way of training better than the other?" needs several training seeds per arm and is answered
by resampling seeds and problems together (`difference_over_seeds`); only this can give the verdict "supported".

Shape suffixes: P problems, S training seeds, R resamples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import stats as distributions

from distill.records import UserError
from distill.reports.statistics import (
    BLOCK,
    LEVEL,
    RESAMPLES,
    Floats,
    Interval,
    bca,
    problem_means,
    seed_variance,
    z_value,
)

Verdict = Literal["supported", "inconclusive"]

MIN_SEEDS = 3
"""Training seeds per arm that the verdict "supported" requires."""


@dataclass(frozen=True, slots=True)
class Paired:
    """Arm a minus arm b on the same problems.

    p_holm: p-value after Holm's correction over all pairs; p_value before it. wins, losses: number of problems on which a,
    or b, did better. method: the test behind the p-value.
    """

    difference: Interval
    p_value: float
    p_holm: float
    wins: int
    losses: int
    method: str

    @property
    def differ(self) -> bool:
        """Whether the two checkpoints differ on problems like these; no statement about their ways of training."""
        outside = self.difference.low > 0 or self.difference.high < 0
        return outside and self.p_holm < 1 - LEVEL


@dataclass(frozen=True, slots=True)
class SeedsDifference:
    """Arm a minus arm b over training seeds and problems. seeds: number of seeds of a and of b."""

    difference: Interval
    p_value: float
    p_holm: float
    seeds: tuple[int, int]

    @property
    def verdict(self) -> Verdict:
        """ "supported" if both arms have MIN_SEEDS seeds, the interval excludes 0 and p_holm is below 1 - LEVEL."""
        outside = self.difference.low > 0 or self.difference.high < 0
        enough = min(self.seeds) >= MIN_SEEDS
        return "supported" if enough and outside and self.p_holm < 1 - LEVEL else "inconclusive"


# ----------------------------------------------------------------------------- two checkpoints, same problems


def paired(delta_P: Floats, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0) -> Paired:
    """Compare two arms by their differences in mean correctness [P]; nan for a problem that was not judged in both arms.

    If all differences are -1, 0 or 1 (one sample per problem): McNemar's exact test and the interval of Bonett and Price
    (2012), which keeps a width when few problems differ. Otherwise: a BCa bootstrap of the differences, which resamples
    both arms together, and a sign-flip permutation test. Raises ValueError if no problem was judged in both arms.
    """
    delta_P = delta_P[~np.isnan(delta_P)]
    if not len(delta_P):
        raise ValueError("no problem was judged in both arms")
    wins, losses = int((delta_P > 1e-12).sum()), int((delta_P < -1e-12).sum())
    if bool(np.isin(delta_P, (-1.0, 0.0, 1.0)).all()):
        p_value, method = mcnemar(wins, losses), "McNemar exact"
        interval = _bonett_price(wins, losses, len(delta_P), level)
    else:
        p_value, method = permutation_p(delta_P, resamples, seed), "sign-flip permutation"
        interval = replace(bca(delta_P, level, resamples, seed), method="paired bootstrap")
    return Paired(interval, p_value, p_value, wins, losses, method)


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided exact p-value of McNemar's test: if the arms are equal, each problem that differs is a fair coin toss."""
    if wins + losses == 0:
        return 1.0
    return float(distributions.binomtest(wins, wins + losses, 0.5).pvalue)


def permutation_p(delta_P: Floats, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p-value of the mean of paired differences under random sign flips.

    Enumerates all flips if there are at most `resamples`; else draws them and counts the observed one (so p is never 0).
    """
    delta_P = delta_P[np.abs(delta_P) > 1e-12]
    if not len(delta_P):
        return 1.0
    found = distributions.permutation_test(
        (delta_P,),
        lambda flipped, axis: np.abs(flipped.sum(axis=axis)),
        permutation_type="samples",
        alternative="greater",
        n_resamples=resamples,
        vectorized=True,
        batch=max(1, BLOCK // len(delta_P)),
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def _bonett_price(wins: int, losses: int, n: int, level: float) -> Interval:
    """Adjusted Wald interval for a paired difference of proportions: one win and one loss are added."""
    up, down = (wins + 1) / (n + 2), (losses + 1) / (n + 2)
    half = z_value(level) * math.sqrt(max(up + down - (up - down) ** 2, 0.0) / (n + 2))
    low, high = max(up - down - half, -1.0), min(up - down + half, 1.0)
    return Interval((wins - losses) / n, low, high, n, "Bonett-Price")


# ------------------------------------------------------------------------------------------- many pairs


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values, in the order given."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


def check_same_problems(problems: Mapping[str, Collection[str]]) -> None:
    """Raise UserError if two arms (or seeds of one) were evaluated on different problems."""
    first = next(iter(problems), None)
    for name, ids in problems.items():
        if first is not None and set(ids) != set(problems[first]):
            num = len(set(ids) ^ set(problems[first]))
            raise UserError(
                f"arms {first!r} and {name!r} were evaluated on different problems ({num} problems are in only one of "
                "them); a paired comparison needs the same task, split, seed and number of problems."
            )


def check_same_start(starts: Mapping[str, str]) -> None:
    """Raise UserError if trained arms do not start from one checkpoint.

    starts: for each arm, the model that its training in this comparison started from.
    """
    first = next(iter(starts), None)
    for name, start in starts.items():
        if first is not None and start != starts[first]:
            raise UserError(
                f"arms {first!r} and {name!r} start from different checkpoints ({starts[first]!r} and {start!r}), so "
                "training would not be their only difference. Train both from one model, or compare them in two "
                "compare stages."
            )


# -------------------------------------------------------------------------------------- seeds and problems


def compare_trained(
    arms: Mapping[str, Mapping[int, Mapping[str, Sequence[bool | float | None]]]],
    resamples: int = RESAMPLES,
    seed: int = 0,
    among: Callable[[str, str], bool] = lambda a, b: True,
) -> dict[tuple[str, str], Paired | SeedsDifference]:
    """Compare every pair of arms for which `among` is true; correctness is arms[name][training seed][problem_id][sample].

    Two arms with several training seeds each are compared over seeds and problems. A pair with a single-seed arm (a
    teacher, a start) is compared as checkpoints, on per-problem means over the seeds. Holm's correction covers the pairs
    of each of the two kinds. Problems without a judged sample in every arm and seed are excluded. Raises UserError if arms
    or seeds were evaluated on different problems.
    """
    check_same_problems({f"{a} (seed {s})": results for a, runs in arms.items() for s, results in runs.items()})
    values = {
        name: np.array([problem_means([results[i] for i in sorted(results)]) for results in runs.values()])
        for name, runs in arms.items()
    }
    judged_P = ~np.isnan(np.concatenate(list(values.values()))).any(0)
    if not judged_P.any():
        raise ValueError("no problem was judged in every arm and seed")
    values = {name: values_SP[:, judged_P] for name, values_SP in values.items()}
    found: dict[tuple[str, str], Paired | SeedsDifference] = {}
    for a, b in itertools.combinations(arms, 2):
        if not among(a, b):
            continue
        if min(len(values[a]), len(values[b])) > 1:
            found[a, b] = difference_over_seeds(list(values[a]), list(values[b]), resamples=resamples, seed=seed)
        else:
            delta_P = values[a].mean(0) - values[b].mean(0)
            found[a, b] = paired(delta_P, resamples=resamples, seed=seed)
    for kind in (Paired, SeedsDifference):
        names = [pair for pair, one in found.items() if isinstance(one, kind)]
        adjusted = holm([found[pair].p_value for pair in names])
        found |= {pair: replace(found[pair], p_holm=p) for pair, p in zip(names, adjusted, strict=True)}
    return found


def difference_over_seeds(
    a: Sequence[Sequence[float]],
    b: Sequence[Sequence[float]],
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
    *,
    bounded: bool = True,
) -> SeedsDifference:
    """Arm a minus arm b from per-problem mean correctness a[seed][problem] and b[seed][problem].

    Seeds (of each arm) and problems (of both arms together) are resampled at once. Resampling only three seeds
    underestimates their variance by a third and ignores that three give few degrees of freedom. Therefore the resampled
    deviations are rescaled to the unbiased variance of the two-way random-effects model (seeds, problems) and to Student's
    t with Satterthwaite's degrees of freedom, which also gives the p-value. Without this, equal arms would be called
    different far more often than α. With one seed in an arm the interval is [-1, 1]. bounded: the values are in [0, 1].
    """
    a_SP, b_SP = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a_SP.ndim != 2 or b_SP.ndim != 2 or a_SP.shape[1] != b_SP.shape[1]:
        raise ValueError("each seed of both arms needs a value for every problem")
    if bool(np.isnan(a_SP).any() or np.isnan(b_SP).any()):
        raise ValueError("a problem has no judged sample: leave it out of all seeds of both arms")
    seeds, num = (len(a_SP), len(b_SP)), a_SP.shape[1]
    value = float(a_SP.mean() - b_SP.mean())
    if min(seeds) < 2 or num < 2:
        return SeedsDifference(Interval(value, -1.0, 1.0, num, "one seed an arm"), 1.0, 1.0, seeds)
    variance, freedom = _variance(a_SP, b_SP)
    drawn_R = _resample_both(a_SP, b_SP, resamples, seed)
    spread = float(drawn_R.std())
    if variance <= 1e-24 or spread <= 1e-12:
        # Zero sample variance is not zero variance: use the interval of a single pair of checkpoints.
        pair = paired(a_SP.mean(0) - b_SP.mean(0), level, resamples, seed)
        p_value, low, high = pair.p_value, pair.difference.low, pair.difference.high
    else:
        t = float(distributions.t.ppf(0.5 + level / 2, freedom))
        stretch = t / z_value(level) * math.sqrt(variance) / spread
        ends = np.quantile(drawn_R - drawn_R.mean(), (0.5 - level / 2, 0.5 + level / 2))
        low, high = (float(value + stretch * end) for end in ends)
        p_value = float(2 * distributions.t.sf(abs(value) / math.sqrt(variance), freedom))
    low, high = (max(low, -1.0), min(high, 1.0)) if bounded else (low, high)
    interval = Interval(value, low, high, num, "seeds and problems resampled")
    return SeedsDifference(interval, p_value, p_value, seeds)


def _resample_both(a_SP: Floats, b_SP: Floats, resamples: int, seed: int) -> Floats:
    """[R] differences of means over resampled seeds (drawn for each arm) and problems (drawn for both arms)."""
    rng, num = np.random.default_rng(seed), a_SP.shape[1]
    rows, drawn = max(1, BLOCK // num), []
    for start in range(0, resamples, rows):
        r = min(rows, resamples - start)
        problems_RP = _draw_weights(rng, r, num)
        arm_means = []
        for arm_SP in (a_SP, b_SP):
            weights_RS = _draw_weights(rng, r, len(arm_SP))
            arm_means.append((weights_RS * (problems_RP @ arm_SP.T)).sum(1))
        drawn.append(arm_means[0] - arm_means[1])
    return np.concatenate(drawn)


def _draw_weights(rng: np.random.Generator, rows: int, num: int) -> Floats:
    """[rows, num] weights of a bootstrap resample: how often each of `num` items was drawn, divided by `num`."""
    drawn = rng.integers(0, num, (rows, num)) + num * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * num).reshape(rows, num) / num


def _variance(a_SP: Floats, b_SP: Floats) -> tuple[float, float]:
    """Variance of the difference of means, and its degrees of freedom (Satterthwaite).

    The sum of the arms' seed parts (see `seed_variance`) and the problem part of the differences, minus the noise that
    both contain; at least as large as either part.
    """
    seed_parts, noise, freedoms = [], 0.0, []
    for y_SP in (a_SP, b_SP):
        seed_part, _, own_noise = seed_variance(y_SP)
        seed_parts.append(seed_part)
        noise += own_noise
        freedoms.append(len(y_SP) - 1)
    num = a_SP.shape[1]
    problem_part = float((a_SP.mean(0) - b_SP.mean(0)).var(ddof=1)) / num
    variance = max(sum(seed_parts) + problem_part - noise, problem_part, sum(seed_parts))
    squares = sum(part**2 / df for part, df in zip(seed_parts, freedoms, strict=True))
    squares += problem_part**2 / (num - 1)
    return variance, variance**2 / squares if squares > 0 else float(num - 1)
