"""Model cards, written beside a stage's weights from the run's records; and the upload to the hub.

`write` is called when a stage ends, `write_all` with the report, because scores are known later than models.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from distill import run_folder
from distill.files import write_atomic
from distill.models import hub
from distill.models.integrity import verify_but_weights
from distill.recipe import Recipe
from distill.recipe.lineage import NOT_UPSTREAM, origin, upstream_stages
from distill.records import UserError
from distill.reports.model_card_markdown import FILE, Ancestor, Card, write_card
from distill.reports.report_blocks import VIEWS
from distill.reports.run_report import RunReport
from distill.reports.usage_snippets import named
from distill.reports.wording import interval_text, reading
from distill.run import card_facts
from distill.traces.reader import open_traces

LICENCE_HEADING = "## Licence"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def write(resolved: Recipe, run: Path, name: str, report: RunReport | None = None) -> Path | None:
    """Write the card of one stage's model, with the report's scores if there are any; None for stages without a model."""
    folder = run / name / "model"
    if not (folder / "config.json").is_file():
        return None
    return write_card(folder, describe(resolved, run, name, report))


def write_all(resolved: Recipe, run: Path, report: RunReport) -> list[Path]:
    """Write the cards of all models of the run."""
    written = [write(resolved, run, name, report) for name in resolved.stages]
    return [path for path in written if path is not None]


def describe(resolved: Recipe, run: Path, name: str, report: RunReport | None = None) -> Card:
    """Collect the facts about a stage's model from the run's folders. Raises DataError if the model is damaged, but for its weights."""
    above = set(upstream_stages(resolved, name))
    lineage = [_ancestor(resolved, run, one) for one in resolved.stages if one in above]
    base = _base(resolved, name)
    scores = {
        arm: row
        for arm, row in (report["arms"] if report else {}).items()
        if name in (row["stage"], *(one["stage"] for one in row.get("by_seed", [])))
    }
    readings = [
        f"{row['a']} − {row['b']}: {interval_text(row['difference'], signed=True)} points ({reading(row)})."
        for row in (report["comparisons"] if report else [])
        if {row["a"], row["b"]} & scores.keys()
    ]
    first = next(iter(scores.values()), None)
    settings = resolved.stages[name].model_dump(mode="json")
    folder = run / name / "model"
    verify_but_weights(folder, f"Make the model again with --redo {name}.")
    model = resolved.models.get(origin(resolved, name))
    commit = run_folder.commit_of(run, model) or "" if model else ""
    base_facts = card_facts.base_card(model.source, commit or model.revision) if model else {}
    size = card_facts.Size.of(folder) if any(folder.glob("*.safetensors")) else None
    language = base_facts.get("language")
    versions = run_folder.environment(run)
    return Card(
        name=name,
        kind=resolved.stages[name].kind,
        run=resolved.name,
        base=base,
        base_on_hub=bool(base and _HUB_ID.fullmatch(base)),
        base_commit=commit,
        lineage=lineage,
        settings=yaml.safe_dump(settings, sort_keys=False, allow_unicode=True),
        seed=resolved.seed,
        versions={"distill": versions.get("distill", ""), **versions.get("packages", {})},
        reproduce=report["reproduce"] if report else [f"distill run {run / 'recipe.yaml'}"],
        task=report["task"] if report else "",
        scores=scores,
        cost={view: first["cost"][view] for view in VIEWS} if first else {},  # type: ignore[index]
        readings=readings,
        licence=card_facts.licence_of(folder, base_facts),
        usage=card_facts.usage_of(resolved, name, folder),
        size=_size(size) if size is not None else (),
        trained=list(card_facts.trained_on(resolved, name)),
        datasets=card_facts.hub_datasets(resolved, name),
        language=language if isinstance(language, str | list) else (),
        limits=card_facts.limits(resolved, name, scores, size),
    )


def _size(size: card_facts.Size) -> list[tuple[str, str]]:
    """The table of a model's size."""
    rows = [("parameters", f"{size.parameters:,}"), ("weights", f"{size.stored / 1e6:,.1f} MB, safetensors")]
    rows += [("dtype", size.dtype)] if size.dtype else []
    return rows + ([("context", f"{size.context:,} tokens")] if size.context else [])


def _base(resolved: Recipe, name: str) -> str | None:
    """Return the origin of the model from which a stage's model was made, through all stages; None if a stage created it
    from nothing."""
    name = origin(resolved, name)
    if name in resolved.stages:
        return None
    source = resolved.models[name].source if name in resolved.models else name
    # The path of a local folder is of no use on another machine, so only its name is shown.
    return Path(source).expanduser().name if Path(source).expanduser().is_dir() else source


def _ancestor(resolved: Recipe, run: Path, name: str) -> Ancestor:
    config, standing = resolved.stages[name], run_folder.read(run / name)
    decided = standing.decided if standing else {}
    return Ancestor(
        name=name,
        kind=config.kind,
        made_from={each.field: each.name for each in config.inputs() if each.sort not in NOT_UPSTREAM},
        cost=standing.cost if standing else {},
        seconds=standing.seconds if standing else 0.0,
        facts=[
            *((key, f"{one['value']}: {one['why']}") for key, one in decided.items()),
            *_pruned(standing.metrics if standing else {}),
            *_facts(run / name / "traces"),
        ],
    )


def _pruned(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a prune stage has left of its model, by the stage's results; nothing for a stage of another kind."""
    if "layers_kept" not in found:
        return
    kept = found["layers_kept"]
    yield "layers kept", f"{len(kept)} of {found['layers_before']}: {ranges(kept)}"
    for key, size in found.get("widths", {}).items():
        yield f"width ({key})", str(size)
    if repaired := found.get("repair"):
        fitted = len(repaired["fitted"])
        yield "repair", f"{fitted} layers fit, ridge strength {repaired['strength']}" if fitted else "none was better"


def ranges(numbers: Sequence[int]) -> str:
    """Ascending whole numbers in words, runs of them together: "0–3, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _facts(traces: Path) -> Iterator[tuple[str, str]]:
    """Key facts about a folder of traces; nothing if there is none."""
    if not traces.is_dir():
        return
    try:
        reader = open_traces(traces)
    except UserError:  # moved or changed since; the trained model's card is still written
        yield "traces", "changed since, or not whole"
        return
    metadata = reader.metadata
    yield "traces", f"{len(reader):,}"
    yield "written by", f"{metadata.model}, weights {metadata.weights}"
    yield "tokenizer", metadata.tokenizer
    if metadata.dtype:
        yield "dtype", metadata.dtype
    if metadata.top_k:
        yield "distribution", f"at most {metadata.top_k} entries, {metadata.mass:g} of the mass"


# ------------------------------------------------------------------------------------------------- the hub


def push(reference: Path, repo: str, *, private: bool = True, licence: str | None = None) -> str:
    """Upload a model and its card to the hub repository `repo` (owner/name), created if missing; return its address.

    reference: the model's folder, or the folder of its stage. licence: the hub's identifier, written into the card; None: what the
    card says. The card's scripts name the repository. Raises UserError if there is no model, or if the hub cannot be reached
    or refuses the upload.
    """
    folder = model_folder(reference)
    hub.check_repo(repo)
    if not (folder / FILE).is_file():
        raise UserError(
            f"push: {folder} has no {FILE}. `distill run` writes one for every model; for a model from elsewhere, write "
            "the file yourself."
        )
    if licence is not None:
        set_licence(folder / FILE, licence)
    if not hub.reachable():
        raise hub.unreachable(
            f"{folder} is complete: copy it to a machine with a network and run `hf upload {repo} {folder}` there."
        )
    with tempfile.TemporaryDirectory() as temporary:
        for file in folder.iterdir():
            if file.name != FILE:
                Path(temporary, file.name).symlink_to(file.resolve())
        Path(temporary, FILE).write_text(named((folder / FILE).read_text(encoding="utf-8"), repo), encoding="utf-8")
        return hub.upload(
            Path(temporary), repo, kind="model", private=private, message="Checkpoint, written by distill"
        )


def set_licence(path: Path, licence: str) -> None:
    """Write a licence into a card: its header and its section. Raises UserError for a text that is no identifier."""
    from huggingface_hub import ModelCard

    hub.check_licence(licence)
    card = ModelCard.load(path)
    card.data.license = licence
    head, found, rest = str(card).partition(LICENCE_HEADING)
    if found:
        _, more, after = rest.partition("\n## ")
        rest = f"\n\n{licence}, as stated by whoever published this.\n{more}{after}"
    write_atomic(path, head + found + rest)


def model_folder(reference: Path) -> Path:
    """Return the folder with config.json and weights: the path, or its folder `model`. Raises UserError if neither is."""
    for base in (reference, Path("runs") / reference):
        for folder in (base, base / "model"):
            if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
                return folder
    made = ""
    for run in (reference, Path("runs") / reference):
        if run_folder.is_run(run):
            stages = run_folder.recipe(run).stages
            names = [f"{run}/{n}" for n in stages if (run / n / "model" / "config.json").is_file()]
            made = f" Its models are: {', '.join(names)}." if names else ""
    raise UserError(f"push: {reference} is not a model (a folder with config.json and safetensors).{made}")
