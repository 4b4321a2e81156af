"""eval: held-out accuracy of one model on one task. Every completion is kept, as traces without distributions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distill.recipe import EvalStage
from distill.reports.arms import ArmResults, score
from distill.stages.context import Context, Result
from distill.stages.sampling import sample
from distill.traces.reader import content_fingerprint, open_traces

COLUMNS = (
    "trace_id",
    "problem_id",
    "sample",
    "messages",
    "completion",
    "answer",
    "gold",
    "completion_ids",
    "correct",
    "finish_reason",
)


def run(config: EvalStage, context: Context) -> Result:
    folder = context.folder / "traces"
    counts, cost, _ = sample(config, context, folder, "held_out")
    metrics = score(read_results(folder), config.pass_at, seed=context.seed)
    metrics["prompts_too_long"] = counts.prompts_too_long
    accuracy = metrics["accuracy"]
    context.say(
        f"accuracy {accuracy['value']:.1%} [{accuracy['low']:.1%}, {accuracy['high']:.1%}] "
        f"on {accuracy['n']} held-out problems"
    )
    return Result(cost, metrics, content_fingerprint(folder))


def read_results(folder: Path, columns: Sequence[str] = COLUMNS) -> ArmResults:
    """An evaluation's completions by problem, problems by id: the order they were written in is the engine's."""
    results = ArmResults.collect(open_traces(folder).blocks(1024, columns))
    return ArmResults(dict(sorted(results.samples.items())), results.gold, results.messages)
