"""The scores of an arm from its evaluation traces, and examples of problems on which two arms differ.

Input: `Traces` of one model on held-out problems, with their verdicts. Output: the scores of an arm in the report, and
example rows. Costs come from `distill.compute.ledger`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill.records import Messages, Traces
from distill.reports import statistics
from distill.reports.comparison import check_same_problems
from distill.reports.run_report import ExampleRow, IntervalRow, interval_row


@dataclass(frozen=True, slots=True)
class Sample:
    """One judged completion. length: completion tokens."""

    sample: int
    correct: bool | None
    answer: str | None
    finish_reason: str
    length: int
    completion: str


@dataclass(frozen=True, slots=True)
class ArmResults:
    """The samples of an arm by problem id, in the order of first appearance, each problem's by sample number."""

    samples: dict[str, list[Sample]]
    gold: dict[str, str | None]
    messages: dict[str, Messages]

    @staticmethod
    def collect(blocks: Iterable[Traces]) -> ArmResults:
        """Group blocks of traces by problem."""
        results = ArmResults({}, {}, {})
        for block in blocks:
            lengths = block.completion_ids.lengths
            for n, problem_id in enumerate(block.problem_id):
                results.samples.setdefault(problem_id, []).append(
                    Sample(
                        int(block.sample[n]),
                        block.correct[n],
                        block.answer[n],
                        block.finish_reason[n],
                        int(lengths[n]),
                        block.completion[n],
                    )
                )
                results.gold[problem_id] = block.gold[n]
                results.messages[problem_id] = block.messages[n]
        for samples in results.samples.values():
            samples.sort(key=lambda one: one.sample)
        return results

    @staticmethod
    def merge(several: Iterable[ArmResults]) -> ArmResults:
        """Merge several results: each problem gets the samples of all, in the order given."""
        merged = ArmResults({}, {}, {})
        for results in several:
            for key, samples in results.samples.items():
                merged.samples.setdefault(key, []).extend(samples)
            merged.gold.update(results.gold)
            merged.messages.update(results.messages)
        return merged

    @property
    def correct(self) -> dict[str, list[bool]]:
        """correct[problem_id][sample]. What could not be judged counts as wrong: an answer must not gain by being unreadable."""
        return {key: [one.correct is True for one in samples] for key, samples in self.samples.items()}


def score(
    results: ArmResults,
    pass_at: Sequence[int] = (1,),
    equivalent: Callable[[str, str], bool] = str.__eq__,
    seed: int = 0,
) -> dict[str, Any]:
    """Compute the scores of an arm in the report: accuracy, pass_at, maj_at, clipped_ratio, mean_length and counts.

    maj@k is computed for every k of `pass_at` above 1; an invalid answer never wins the vote. unjudged: completions that could
    not be judged, which count as wrong, so the accuracy is at most their share too low. Raises ValueError if no completion was
    judged.
    """
    correct = list(results.correct.values())
    answers = [[one.answer for one in samples] for samples in results.samples.values()]
    everything = [one for samples in results.samples.values() for one in samples]
    if all(one.correct is None for one in everything):
        raise ValueError("no problem was judged")
    return {
        "accuracy": interval_row(statistics.accuracy(correct, seed=seed)),
        "pass_at": {str(k): interval_row(statistics.pass_at(correct, k, seed=seed)) for k in pass_at},
        "maj_at": {
            str(k): interval_row(statistics.maj_at(answers, correct, k, equivalent, seed=seed))
            for k in pass_at
            if k > 1
        },
        "clipped_ratio": sum(one.finish_reason == "length" for one in everything) / len(everything),
        "mean_length": sum(one.length for one in everything) / len(everything),
        "problems": len(correct),
        "samples": max(len(samples) for samples in correct),
        "unjudged": sum(one.correct is None for one in everything),
    }


def score_seeds(
    runs: Mapping[int, ArmResults],
    pass_at: Sequence[int] = (1,),
    equivalent: Callable[[str, str], bool] = str.__eq__,
) -> dict[str, Any]:
    """The scores of an arm trained with several seeds, as `score` returns them: runs[training seed] on the same problems.

    Intervals are over both seeds and problems, and use problems of which every seed has enough samples. by_seed:
    the accuracy of each seed. samples: per problem and seed.
    """
    check_same_problems({f"seed {seed}": results.samples for seed, results in runs.items()})
    alone = {seed: score(results, (1,), equivalent) for seed, results in runs.items()}
    everything = [one for r in runs.values() for samples in r.samples.values() for one in samples]

    def over(values_of: Callable[[ArmResults], Any]) -> IntervalRow:
        values_SP = np.array([values_of(results) for results in runs.values()])
        return interval_row(statistics.over_seeds(values_SP[:, ~np.isnan(values_SP).any(0)]))

    return {
        "accuracy": over(lambda r: statistics.problem_means(_correct(r))),
        "pass_at": {str(k): over(lambda r, k=k: _pass_at(r, k)) for k in pass_at},  # type: ignore[misc]
        "maj_at": {
            str(k): over(
                lambda r, k=k: statistics.maj_at_k(_answers(r), _correct(r), k, equivalent)  # type: ignore[misc]
            )
            for k in pass_at
            if k > 1
        },
        "clipped_ratio": sum(one.finish_reason == "length" for one in everything) / len(everything),
        "mean_length": sum(one.length for one in everything) / len(everything),
        "problems": max(one["problems"] for one in alone.values()),
        "samples": max(one["samples"] for one in alone.values()),
        "unjudged": sum(one["unjudged"] for one in alone.values()),
        "seeds": len(runs),
        "by_seed": [{"seed": seed, "accuracy": one["accuracy"]} for seed, one in alone.items()],
    }


def _correct(results: ArmResults) -> list[list[bool]]:
    """correct[problem][sample], problems by id."""
    correct = results.correct
    return [correct[key] for key in sorted(correct)]


def _answers(results: ArmResults) -> list[list[str | None]]:
    return [[one.answer for one in results.samples[key]] for key in sorted(results.samples)]


def _pass_at(results: ArmResults, k: int) -> statistics.Floats:
    """[P] pass@k; nan for problems with fewer than k samples."""
    num_P, right_P = statistics.counts(_correct(results))
    found_P = statistics.pass_at_k(np.maximum(num_P, k), np.minimum(right_P, num_P), k)
    return np.where(num_P >= k, found_P, np.nan)


def examples(
    arms: Mapping[str, ArmResults],
    a: str,
    b: str,
    questions: Mapping[str, str],
    num: int = 3,
    max_chars: int = 40_000,
) -> list[ExampleRow]:
    """Up to `num` problems on which a did better than b, and up to `num` the other way, with a sample of every arm.

    The winner is shown with its first correct sample, the loser with its first wrong one, other arms with their first
    sample. Problems are taken in the order of their ids, which are hashes: a random sample, the same every time.
    questions: text by problem id; for a missing one the stored messages are used. Long completions are cut in the middle,
    with a note.
    """
    means = {
        arm: dict(
            zip(
                results.samples,
                statistics.problem_means(list(results.correct.values())),
                strict=True,
            )
        )
        for arm, results in arms.items()
    }
    picked: list[ExampleRow] = []
    shared = sorted(means[a].keys() & means[b].keys())
    for won_by, lost_by in ((a, b), (b, a)):
        won = [key for key in shared if means[won_by][key] > means[lost_by][key]][:num]
        for key in won:
            preferred = {won_by: True, lost_by: False}
            shown = {
                arm: _first(results.samples[key], preferred.get(arm))
                for arm, results in arms.items()
                if key in results.samples
            }
            picked.append(
                {
                    "problem_id": key,
                    "question": questions.get(key) or arms[a].messages[key][-1]["content"],
                    "gold": arms[a].gold[key],
                    "won_by": won_by,
                    "lost_by": lost_by,
                    "answers": [
                        {
                            "arm": arm,
                            "completion": _cut(one.completion, max_chars),
                            "answer": one.answer,
                            "correct": one.correct,
                            "finish_reason": one.finish_reason,
                        }
                        for arm, one in shown.items()
                    ],
                }
            )
    return picked


def _first(samples: Sequence[Sample], correct: bool | None) -> Sample:
    """The first sample with this verdict, or else the first sample."""
    return next((one for one in samples if one.correct is correct), samples[0])


def _cut(text: str, max_chars: int) -> str:
    if len(text) <= max_chars:
        return text
    half = max_chars // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"
