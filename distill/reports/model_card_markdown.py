"""The text of a model card: README.md in a model's folder, in the hub's format.

Input: a `Card`, which `distill.run.model_card` collects from a run. Output: front matter, written by huggingface_hub, and
Markdown, escaped like the report's. The licence is the base model's, or the one that the author has set; where neither is known
the card says so, because only the author can choose one.
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
from distill.reports.usage_snippets import Usage, transformers_code, vllm_code
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

    base: hub id or other source of the model that training started from. base_on_hub: whether it is a hub id. base_commit: the one
    that was loaded, "" if it is not on the hub. settings: the stage's config as YAML. scores: of this model, by arm name; empty before its evaluation. cost: by view; empty until
    known. readings: comparisons with other arms, in words. licence: the hub's keys license, license_name and license_link;
    empty if it is not known. usage: how to prompt it; None if it has no tokenizer. size: (property, value) pairs. trained: rows of
    (stage, loss, data). datasets: the hub's data sets that it learned from. language: of the base model's card. limits: one
    sentence each.
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
    licence: Mapping[str, str] = field(default_factory=dict)
    usage: Usage | None = None
    size: Sequence[tuple[str, str]] = ()
    trained: Sequence[tuple[str, str, str]] = ()
    datasets: Sequence[str] = ()
    language: str | Sequence[str] = ()
    limits: Sequence[str] = ()
    base_commit: str = ""


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
    options: dict[str, Any] = dict(card.licence)
    if results:
        options |= {"metrics": ["accuracy"], "model_name": f"{card.run}/{card.name}", "eval_results": results}
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        language=card.language if isinstance(card.language, str) else list(card.language) or None,
        base_model=card.base if card.base_on_hub else None,
        base_model_relation="finetune" if card.base_on_hub else None,
        datasets=list(card.datasets) or None,
        tags=["distill", card.kind, *sorted({one.kind for one in card.lineage} - {card.kind})],
        **options,
    )
    return str(data.to_yaml()).strip()


def body(card: Card) -> list[Block]:
    """The blocks of the card below its front matter."""
    start = (
        f" It starts from {card.base}{f', commit {card.base_commit}' if card.base_commit else ''}." if card.base else ""
    )
    found: list[Block] = [
        Text(f"The model of stage {card.name} ({card.kind}) of the run {card.run}.{start}"),
        *([Table(["property", "value"], [list(pair) for pair in card.size], "ll")] if card.size else []),
        *_use(card.usage),
        Heading("Scores"),
        *_scores(card),
        Heading("Training"),
        *([Table(["stage", "learns by", "from"], [list(row) for row in card.trained], "lll")] if card.trained else []),
        _lineage(card.lineage),
        Heading("Limits"),
        *[Text(limit) for limit in card.limits],
        Heading("Licence"),
        Text(_licence(card)),
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


def _use(usage: Usage | None) -> list[Block]:
    """The prompt, and scripts that run the model with it."""
    if usage is None:
        return []
    form = "plain text, without a chat template" if usage.plain else "rendered by its chat template"
    found: list[Block] = [
        Heading("Prompt"),
        Text(f"The prompt that it was trained under, {form}. {{question}} is the question:"),
    ]
    found += [Code(usage.rendered)]
    if any(turn["role"] == "system" for turn in usage.messages):
        found += [Text("It was trained with this system message; how it answers without it was not measured.")]
    sampled = f"temperature {usage.temperature:g}, top_p {usage.top_p:g}" if usage.temperature else "greedily"
    return [
        *found,
        Heading("How to use it"),
        Text(f"With transformers, sampled {sampled}, as it was evaluated or its traces were:"),
        Code(transformers_code(usage), "python"),
        Text("With vLLM:"),
        Code(vllm_code(usage), "python"),
        Text("In a terminal: distill chat FOLDER"),
    ]


def _licence(card: Card) -> str:
    """What is known of the licence, and how to set it."""
    if card.licence:
        name = card.licence.get("license_name") or card.licence["license"]
        link = f" ({card.licence['license_link']})" if "license_link" in card.licence else ""
        return f"{name}{link}. The licences of the teacher and of the data may say more about what it may be used for."
    base = f"of the base model {card.base}" if card.base else "of the model"
    return (
        f"The licence {base} is not known here, so none is stated. Read it where the model comes from, and set it with "
        "distill push MODEL OWNER/NAME --license ID (an identifier of the hub, such as apache-2.0), or as license in the header "
        "of this file; later reports keep it. The licences of the teacher and of the data may say more about what it may be "
        "used for."
    )


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
