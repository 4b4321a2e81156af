"""eval: held-out accuracy of one model on one task, and of the snapshots of its training.

Every completion is stored as a trace without distribution: the model's in `traces`, a snapshot's in `snapshots/<step>`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distill.recipe import EvalStage
from distill.records import stable_hash
from distill.reports.arms import ArmResults, score, score_seeds
from distill.reports.run_report import StageSnapshotRow
from distill.stages.context import Context, Result
from distill.stages.snapshots import FOLDER, Snapshot, snapshots_of
from distill.stages.trace_sampling import sample_traces
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
    snapshots = snapshots_of(context.run / config.model) if config.snapshot_problems else []
    fewer = config.model_copy(update={"problems": min(config.snapshot_problems, config.problems)})
    counts, cost = sample_traces(config, context, folder, "held_out")
    for snapshot in snapshots:
        beside = context.folder / FOLDER / snapshot.name
        cost += sample_traces(fewer, context, beside, "held_out", snapshot)[1]
    same = context.task(config.task).same_answer
    metrics = score(read_results(folder), config.pass_at, same, seed=context.recipe.seed)
    metrics["snapshots"] = snapshot_rows([context.folder], [snapshots])
    metrics["prompts_too_long"] = counts.prompts_too_long
    accuracy = metrics["accuracy"]
    context.say(
        f"accuracy {accuracy['value']:.1%} [{accuracy['low']:.1%}, {accuracy['high']:.1%}] "
        f"on {accuracy['n']} held-out problems"
        + (f"; {metrics['unjudged']} completions could not be judged and count as wrong" if metrics["unjudged"] else "")
    )
    made = [content_fingerprint(context.folder / FOLDER / snapshot.name) for snapshot in snapshots]
    return Result(cost, metrics, stable_hash(content_fingerprint(folder), *made))


def snapshot_rows(evaluations: Sequence[Path], snapshots: Sequence[Sequence[Snapshot]]) -> list[StageSnapshotRow]:
    """Return the accuracy of each snapshot, of one training seed or over several seeds with equally many snapshots.

    evaluations: the folder of each seed's eval stage; snapshots: those of its training stage.
    """
    rows = []
    for together in zip(*snapshots, strict=False):
        results = {
            seed: read_results(folder / FOLDER / snapshot.name)
            for seed, (folder, snapshot) in enumerate(zip(evaluations, together, strict=True))
        }
        scores = score(results[0]) if len(results) == 1 else score_seeds(results)
        rows.append(
            StageSnapshotRow(
                step=sum(snapshot.step for snapshot in together) / len(together),
                flops=sum(snapshot.cost.flops for snapshot in together) / len(together),
                accuracy=scores["accuracy"],
            )
        )
    return rows


def read_results(folder: Path, columns: Sequence[str] = COLUMNS) -> ArmResults:
    """Return an evaluation's completions by problem, sorted by problem id: the file's order depends on the engine."""
    results = ArmResults.collect(open_traces(folder).blocks(1024, columns))
    return ArmResults(dict(sorted(results.samples.items())), results.gold, results.messages)
