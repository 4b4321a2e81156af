"""What the policy's own completions show and cost, whatever is learned from them."""

from __future__ import annotations

from collections.abc import Sequence

from distill.records import GradedGroup
from distill.training.loop import WorkCounts


def completion_metrics(groups: Sequence[GradedGroup]) -> dict[str, float]:
    """Metrics of the completions of a rollout.

    length: mean tokens. clipped_ratio: share cut at the token limit. entropy: mean of -log pi at the sampled tokens, which is
    the policy's entropy in expectation, nats a token. correct: share of those that could be judged.
    """
    completions = [c for g in groups for c in g.completions]
    tokens = sum(len(c.ids_T) for c in completions)
    verdicts = [v.correct for g in groups for v in g.group.verdicts if v.correct is not None]
    metrics = {
        "length": tokens / len(completions),
        "clipped_ratio": sum(c.finish_reason == "length" for c in completions) / len(completions),
        "entropy": -float(sum(c.logprob_T.sum(dtype="float64") for c in completions)) / tokens,
    }
    return metrics | ({"correct": sum(verdicts) / len(verdicts)} if verdicts else {})


def count_completions(counts: WorkCounts, groups: Sequence[GradedGroup]) -> None:
    """Add what sampling and judging the groups took. Prompts count for every completion."""
    for group in groups:
        counts.completions += len(group.completions)
        counts.prompt_tokens += len(group.prompt.ids) * len(group.completions)
        counts.generated_tokens += sum(len(completion.ids_T) for completion in group.completions)
        counts.judge_seconds += group.judge_seconds
