"""The data of a report, as `distill.run.collect` builds it and report.json stores it.

Plain dictionaries, so that a report read from its JSON equals one just collected. All numbers are raw: shares in [0, 1],
tokens, bytes, FLOPs, seconds.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

from distill.records import Cost
from distill.reports.comparison import Paired, SeedsDifference
from distill.reports.context_rows import AboutRow, EvaluationRow, LedgerRow, ProgressRow
from distill.reports.statistics import Interval


class IntervalRow(TypedDict):
    """An `Interval`; n is the number of problems."""

    value: float
    low: float
    high: float
    n: int
    method: NotRequired[str]


class Amounts(TypedDict):
    """The predicted or measured amounts of a stage. bytes: of traces. memory: peak bytes; absent if not measured. written: measured
    bytes of traces and of a model. dollars: what endpoints
    charge; absent if none is asked."""

    tokens: float
    bytes: float
    flops: float
    seconds: float
    memory: NotRequired[float]
    written: NotRequired[float]
    dollars: NotRequired[float]


class StageRow(TypedDict):
    """One stage. cost: the fields of `Cost`, and `model_bytes`. curves: for each metric a list with one number for each of `curve_steps`, null
    where it was not logged. progress: of a running or failed stage. error: the message of a failed one. divergence: of a
    stage that measures it for one model by itself."""

    name: str
    kind: str
    status: Literal["done", "skipped", "running", "failed", "pending"]
    seconds: float
    cost: dict[str, float]
    dtype: NotRequired[str]
    predicted: NotRequired[Amounts]
    metrics: NotRequired[dict[str, float | str]]
    curves: NotRequired[dict[str, list[float | None]]]
    curve_steps: NotRequired[list[float]]
    progress: NotRequired[ProgressRow]
    error: NotRequired[str]
    divergence: NotRequired[DivergenceRow]


class View(TypedDict):
    """One of the three views of an arm's cost. dollars: what endpoints charged; absent in reports of earlier versions."""

    tokens: float
    flops: float
    seconds: float
    dollars: NotRequired[float]


class StageSnapshotRow(TypedDict):
    """An evaluated snapshot of a training stage: the stage's FLOPs up to its step, and its accuracy."""

    step: float
    flops: float
    accuracy: IntervalRow


class SnapshotRow(TypedDict):
    """An evaluated snapshot of an arm: the student's own FLOPs up to then, its accuracy and interval."""

    flops: float
    accuracy: float
    low: float
    high: float


class SeedRow(TypedDict):
    """One training seed of an arm: the stage that was evaluated, and its accuracy."""

    seed: int
    stage: str
    accuracy: IntervalRow


class DivergenceRow(TypedDict):
    """How far a model is from the teacher on the teacher's held-out traces, with intervals over traces (and seeds).

    kl: over the whole vocabulary, estimated without bias. bound: over the stored entries and the rest as one outcome, never
    above the KL. label_nll: -log q of the traces' tokens. All in nats a token. overconfidence: the probability of the model's
    likeliest token minus the share of traces' tokens that it is. n of an interval is the number of traces.
    """

    kl: IntervalRow
    bound: IntervalRow
    label_nll: IntervalRow
    overconfidence: IntervalRow
    traces: int
    tokens: int


class DivergencePairRow(TypedDict):
    """The KL to the teacher of arm a minus that of arm b, nats a token, on the same traces."""

    a: str
    b: str
    difference: IntervalRow


class TracesRow(TypedDict):
    """How many traces an arm learned from (its training's max_traces), and the curve that it is a point of.

    comparison: the stage that compares. way: the arm's name without the number.
    """

    comparison: str
    way: str
    number: int


class TraceRatioRow(TypedDict):
    """Traces of text for one trace of a way of training, with a 95% interval (see reports.trace_curves).

    comparison: added by the stage that compares. measure: accuracy or kl. low_at_end, high_at_end, at_end: the curves are too short for
    this end, or for the ratio itself.
    """

    comparison: NotRequired[str]
    way: str
    measure: str
    ratio: float
    low: float
    high: float
    low_at_end: bool
    high_at_end: bool
    at_end: bool
    seeds: int


class ArmRow(TypedDict):
    """The results of one arm. tokens, flops and seconds are those of cost["student"].

    stage: the stage or model that was evaluated. role: the verdict compares students; a teacher and the common start are
    shown beside them. pass_at, maj_at: by k as text (JSON keys are text). snapshots: without the final model. by_seed: for
    an arm trained with several seeds; its accuracy, tokens, FLOPs and seconds are means over them, and its intervals are
    over seeds and problems. divergence: where the comparison has `targets`. traces: where its training has max_traces.
    evaluation: the key of `RunReport.evaluations` that says how it was evaluated.
    """

    stage: str
    role: Literal["student", "teacher", "start"]
    accuracy: IntervalRow
    pass_at: dict[str, IntervalRow]
    maj_at: dict[str, IntervalRow]
    clipped_ratio: float
    mean_length: float
    problems: int
    samples: int
    unjudged: int
    seeds: int
    tokens: float
    flops: float
    seconds: float
    cost: dict[Literal["student", "with_inference", "with_teacher"], View]
    cost_stages: NotRequired[dict[str, list[str]]]
    snapshots: NotRequired[list[SnapshotRow]]
    by_seed: NotRequired[list[SeedRow]]
    divergence: NotRequired[DivergenceRow]
    traces: NotRequired[TracesRow]
    evaluation: NotRequired[str]
    about: NotRequired[AboutRow]


class ComparisonRow(TypedDict):
    """Arm a minus arm b. unit: what was resampled and what the verdict therefore applies to."""

    a: str
    b: str
    unit: Literal["checkpoints", "training seeds"]
    difference: IntervalRow
    p_value: float
    p_holm: float
    method: str
    verdict: Literal["differ", "not shown", "supported", "inconclusive"]
    seeds: NotRequired[list[int]]
    wins: NotRequired[int]
    losses: NotRequired[int]


class ExampleAnswer(TypedDict):
    arm: str
    completion: str
    answer: str | None
    correct: bool | None
    finish_reason: str


class ExampleRow(TypedDict):
    """A problem on which arm `won_by` did better than arm `lost_by`, with a completion of each arm."""

    problem_id: str
    question: str
    gold: str | None
    won_by: str
    lost_by: str
    answers: list[ExampleAnswer]


class RunReport(TypedDict):
    """The report of a run. environment: versions and machine, nested. recipe: the resolved recipe as YAML.

    reproduce: shell commands. notes: limits and warnings for the reader. verdict: added when the report is written.
    evaluations: by the name of their first stage. measurements: what was evaluated beside the arms, under other conditions.
    ledger: what the run spent, each stage once.
    """

    name: str
    description: str
    created: str
    seed: int
    task: str
    environment: dict[str, Any]
    stages: list[StageRow]
    arms: dict[str, ArmRow]
    comparisons: list[ComparisonRow]
    divergence_pairs: NotRequired[list[DivergencePairRow]]
    trace_ratios: NotRequired[list[TraceRatioRow]]
    evaluations: NotRequired[dict[str, EvaluationRow]]
    measurements: NotRequired[dict[str, ArmRow]]
    ledger: NotRequired[list[LedgerRow]]
    examples: list[ExampleRow]
    recipe: str
    reproduce: list[str]
    notes: list[str]
    verdict: NotRequired[str]


def interval_row(interval: Interval) -> IntervalRow:
    return {
        "value": interval.value,
        "low": interval.low,
        "high": interval.high,
        "n": interval.n,
        "method": interval.method,
    }


def comparison_row(a: str, b: str, result: Paired | SeedsDifference) -> ComparisonRow:
    """The result of a comparison as a row of the report."""
    row: ComparisonRow = {
        "a": a,
        "b": b,
        "unit": "checkpoints",
        "difference": interval_row(result.difference),
        "p_value": result.p_value,
        "p_holm": result.p_holm,
        "method": result.difference.method,
        "verdict": "not shown",
    }
    if isinstance(result, Paired):
        row["verdict"] = "differ" if result.differ else "not shown"
        row["method"] = f"{result.difference.method}, {result.method}"
        row["wins"], row["losses"] = result.wins, result.losses
    else:
        row["unit"], row["verdict"] = "training seeds", result.verdict
        row["seeds"] = list(result.seeds)
    return row


def view(cost: Cost) -> View:
    """A cost as a view of an arm; tokens: all tokens trained on, scored, generated or read as prompts."""
    tokens = cost.tokens_trained + cost.tokens_scored + cost.tokens_generated + cost.tokens_prompt
    return {"tokens": tokens, "flops": cost.flops, "seconds": cost.wall_seconds, "dollars": cost.dollars}


def measured(stage: StageRow) -> Amounts:
    """The measured amounts of a stage, in the units of its prediction."""
    cost = stage["cost"]
    kinds = ("tokens_trained", "tokens_scored", "tokens_generated", "tokens_prompt")
    found: Amounts = {
        "tokens": sum(cost.get(kind, 0) for kind in kinds),
        "bytes": cost.get("bytes_written", 0),
        "written": cost.get("bytes_written", 0) + cost.get("model_bytes", 0),
        "flops": cost.get("flops", 0),
        "seconds": stage["seconds"],
    }
    if peak := stage.get("metrics", {}).get("peak_memory"):
        found["memory"] = float(peak)
    if paid := cost.get("dollars"):
        found["dollars"] = paid
    return found
