"""The text of a model card: README.md in a model's folder, in the hub's format.

Input: a `Card`, which `distill.run.model_card` collects from a run. Output: front matter, written by huggingface_hub, and
Markdown, escaped like the report's. The card names no licence, because only the author can choose one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.files import write_atomic
from distill.printable import printable
from distill.reports.block_kinds import Block, Code, Heading, Table, Text
from distill.reports.pages import markdown
from distill.reports.report_blocks import VIEWS
from distill.reports.run_report import ArmRow, View
from distill.reports.wording import duration, interval_text, percent, scaled

FILE = "README.md"


@dataclass(frozen=True, slots=True)
class Ancestor:
    """A stage that the model depends on. made_from: its inputs by field. facts: (name, value) pairs about its data."""

    name: str
    kind: str
    made_from: Mapping[str, str]
    cost: Mapping[str, float]
    seconds: float
    facts: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True, slots=True)
class Card:
    """The content of a model card.

    base: hub id or other source of the model that training started from. base_on_hub: whether it is a hub id. settings:
    the stage's config as YAML. scores: of this model, by arm name; empty before its evaluation. cost: by view; empty until
    known. readings: comparisons with other arms, in words.
    """

    name: str
    kind: str
    run: str
    base: str | None
    base_on_hub: bool
    lineage: Sequence[Ancestor]
    settings: str
    seed: int
    versions: Mapping[str, str]
    reproduce: Sequence[str]
    task: str = ""
    scores: Mapping[str, ArmRow] = field(default_factory=dict)
    cost: Mapping[str, View] = field(default_factory=dict)
    readings: Sequence[str] = ()


def write_card(folder: Path, card: Card) -> Path:
    """Write the card into a model's folder (atomically)."""
    return write_atomic(Path(folder) / FILE, render(card))


def render(card: Card) -> str:
    """The card as text: front matter and Markdown."""
    return f"---\n{front_matter(card)}\n---\n\n{markdown(f'{card.run}/{card.name}', body(card))}"


def front_matter(card: Card) -> str:
    """The YAML front matter, by huggingface_hub's ModelCardData; scores as a model-index."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=printable(card.task) or "unnamed",
            dataset_name=f"{printable(card.task) or 'unnamed'}, {arm['accuracy']['n']} held-out problems",
            metric_type="accuracy",
            metric_name=f"pass@1 {interval_text(arm['accuracy'])}",
            metric_value=round(arm["accuracy"]["value"], 4),
        )
        for arm in card.scores.values()
    ]
    options: dict[str, Any] = {}
    if results:
        options = {"model_name": f"{card.run}/{card.name}", "eval_results": results}
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=card.base if card.base_on_hub else None,
        tags=["distill", card.kind, *sorted({one.kind for one in card.lineage} - {card.kind})],
        **options,
    )
    return str(data.to_yaml()).strip()


def body(card: Card) -> list[Block]:
    """The blocks of the card below its front matter."""
    start = f" It starts from {card.base}." if card.base else ""
    found: list[Block] = [
        Text(f"The model of stage {card.name} ({card.kind}) of the run {card.run}.{start}"),
        Heading("Scores"),
        *_scores(card),
        Heading("Training"),
        _lineage(card.lineage),
    ]
    facts = [[one.name, key, value] for one in card.lineage for key, value in one.facts]
    if facts:
        found += [
            Heading("Data, teacher and dtype"),
            Table(["stage", "property", "value"], facts, "lll"),
        ]
    found += [Heading("Settings"), Code(card.settings, "yaml"), Text(f"Seed {card.seed}.")]
    if card.cost:
        rows = [
            [
                VIEWS[view],
                scaled(one["flops"], "FLOP"),
                scaled(one["tokens"]),
                duration(one["seconds"]),
            ]
            for view, one in card.cost.items()
        ]
        found += [
            Heading("Compute"),
            Table(["view", "FLOPs", "tokens", "time"], rows, "lrrr"),
            Text("Each row includes the one before it."),
        ]
    versions = [[name, version] for name, version in card.versions.items()]
    found += [Heading("Versions"), Table(["package", "version"], versions, "ll")]
    return [*found, Heading("How to reproduce it"), Code("\n".join(card.reproduce), "sh")]


def _scores(card: Card) -> list[Block]:
    if not card.scores:
        return [Text("This model has not been evaluated yet.")]
    rows = []
    for name, arm in card.scores.items():
        ks = sorted((int(k) for k in arm["pass_at"]), reverse=True)[:1]
        more = f"pass@{ks[0]} {interval_text(arm['pass_at'][str(ks[0])])}" if ks and ks[0] > 1 else "–"
        rows.append(
            [
                name,
                interval_text(arm["accuracy"]),
                more,
                percent(arm["clipped_ratio"]),
                str(arm["accuracy"]["n"]),
                str(arm["samples"]),
                str(arm["seeds"]),
            ]
        )
    header = [
        "arm",
        "accuracy (pass@1)",
        "pass@k",
        "truncated",
        "problems",
        "samples",
        "seeds",
    ]
    return [
        Table(header, rows, "lrrrrrr"),
        Text(f"On held-out problems of {card.task}; brackets are 95% intervals."),
        *(Text(reading) for reading in card.readings),
    ]


def _lineage(lineage: Sequence[Ancestor]) -> Table:
    rows = []
    for one in lineage:
        tokens = sum(one.cost.get(f"tokens_{kind}", 0) for kind in ("trained", "scored", "generated"))
        rows.append(
            [
                one.name,
                one.kind,
                ", ".join(f"{key} {value}" for key, value in one.made_from.items()),
                scaled(tokens) if tokens else "–",
                scaled(one.cost.get("flops", 0), "FLOP"),
                duration(one.seconds),
            ]
        )
    return Table(["stage", "kind", "from", "tokens", "FLOPs", "time"], rows, "lllrrr")
