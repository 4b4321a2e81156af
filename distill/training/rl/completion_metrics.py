"""Metrics and costs of the policy's completions, the same for every algorithm."""

from __future__ import annotations

from collections.abc import Sequence

from distill.records import GradedGroup
from distill.training.step import WorkCounts


def completion_metrics(groups: Sequence[GradedGroup]) -> dict[str, float]:
    """Compute metrics of a rollout's completions.

    length: mean tokens. clipped_ratio: share cut at the token limit. entropy: mean of -log pi at the sampled tokens, which
    estimates the policy's entropy, nats a token. correct: share that was found correct, absent if none could be judged.
    """
    completions = [c for g in groups for c in g.completions]
    tokens = sum(len(c.ids_T) for c in completions)
    verdicts = [v.correct for g in groups for v in g.group.verdicts]
    metrics = {
        "length": tokens / len(completions),
        "clipped_ratio": sum(c.finish_reason == "length" for c in completions) / len(completions),
        "entropy": -float(sum(c.logprob_T.sum(dtype="float64") for c in completions)) / tokens,
    }
    is_judged = any(one is not None for one in verdicts)
    return metrics | ({"correct": sum(one is True for one in verdicts) / len(verdicts)} if is_judged else {})


def count_completions(counts: WorkCounts, groups: Sequence[GradedGroup]) -> None:
    """Add the work of sampling and judging the groups. A prompt counts once for every completion."""
    for group in groups:
        counts.completions += len(group.completions)
        counts.prompt_tokens += len(group.prompt.ids) * len(group.completions)
        counts.generated_tokens += sum(len(completion.ids_T) for completion in group.completions)
        counts.judge_seconds += group.judge_seconds
