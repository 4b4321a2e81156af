"""The verb `distill inspect`: a sample of stored traces as one HTML page, optionally with a student's probabilities.

Finds the traces at a path and the tokenizer that wrote them; for a student, scores the stored completions with an engine.
The page itself is made by `distill.inspector`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill import engines, models, run_folder
from distill.files import write_atomic
from distill.inspector import token_text, trace_page
from distill.progress import Screen
from distill.recipe import EngineConfig, ModelConfig, Recipe, served_models
from distill.records import Completion, Request, Traces, UserError, stable_hash
from distill.tools.trace_places import existing
from distill.traces.reader import TraceReader, open_traces
from distill.traces.schema import Metadata

STUDENT_TOP_K = 256
"""Entries of the student's distribution, to compare with the teacher's."""
ROOM = 8
"""Positions of the engine's context beyond the longest trace."""


@dataclass(frozen=True, slots=True)
class Found:
    """A folder of traces, and the run that contains it: the run's folder and recipe, None outside a run.

    others: other stages of the run that have traces.
    """

    traces: Path
    run: Path | None
    recipe: Recipe | None
    others: tuple[str, ...] = ()


def write(
    path: Path,
    out: Path | None = None,
    student: str | None = None,
    sample: int = 200,
    tokenizer: str | None = None,
    max_bytes: int = trace_page.MAX_BYTES,
    screen: Screen | None = None,
) -> tuple[Path, list[str]]:
    """Write the page; return its path and notes for the user.

    path: traces (a folder of shards, a selection, a shard), a stage's folder or a run's. out: the file, or a folder for
    `inspect.html`; default: beside the traces. student: a model's folder, a stage of the run or a hub id. sample: the
    maximum number of traces, chosen by a hash of their ids (a random sample, the same every time). tokenizer: a folder;
    None: the student's or the writer's. screen: progress display; None: one on stdout. Raises UserError if there are no
    traces, or no matching tokenizer or student.
    """
    found = find(path)
    reader = open_traces(found.traces)
    if not len(reader):
        raise UserError(f"{found.traces}: holds no traces.")
    blocks = list(_sampled(reader, sample).blocks(256))
    own = tokenizer_of(found, reader.metadata, tokenizer, student)
    scores: Mapping[str, Completion] = {}
    if student is not None:
        scores = score(blocks, _folder(found, student), reader.metadata, screen or Screen())
    rows = [row for block in blocks for row in trace_page.rows_of(block, scores)]
    notes = [f"other traces of this run: {', '.join(found.others)}"] if found.others else []
    page = trace_page.Page(
        title=_title(found),
        facts=_facts(reader, len(rows), student),
        student=student,
    )
    text = trace_page.render(rows, byte_reader(own), frozenset(own.all_special_ids), page, max_bytes=max_bytes)
    target = out or found.traces.parent / "inspect.html"
    target = target / "inspect.html" if target.is_dir() else target
    target.parent.mkdir(parents=True, exist_ok=True)
    return write_atomic(target, text), notes


# ---------------------------------------------------------------------------- finding traces and models


def find(path: Path) -> Found:
    """Find the traces at a path: the path itself, its `traces` folder, or the first stage of a run with distributions."""
    path = existing(path)
    if run_folder.is_run(path):
        return _of_run(path)
    traces = path / "traces" if (path / "traces").is_dir() else path
    for folder in traces.resolve().parents:
        if run_folder.is_run(folder):
            return Found(traces, folder, run_folder.recipe(folder))
    return Found(traces, None, None)


def _of_run(run: Path) -> Found:
    resolved = run_folder.recipe(run)
    with_top: list[str] = []
    without: list[str] = []
    for name, config in resolved.stages.items():
        if config.kind == "filter":
            continue  # a selection of another stage's traces
        children = [name, *(f"{name}.{arm}" for arm in getattr(config, "arms", ()))]
        for node in children:
            if not (run / node / "traces").is_dir():
                continue
            captured = open_traces(run / node / "traces").metadata.top_k > 0
            (with_top if captured else without).append(node)
    if not with_top and not without:
        raise UserError(f"{run}: no stage of this run has written traces yet.")
    first, *others = [*with_top, *without]
    return Found(run / first / "traces", run, resolved, tuple(f"{run}/{name}" for name in others))


def _folder(found: Found, reference: str) -> Path:
    """A model's folder: a path to a model or a stage, else a stage or model of the run, else a hub id or package://."""
    given = Path(reference).expanduser()
    for folder in (given, given / "model"):
        if (folder / "config.json").is_file():
            return folder
    if found.run is not None and found.recipe is not None:
        if (found.run / reference / "model" / "config.json").is_file():
            return found.run / reference / "model"
        if reference in found.recipe.models:
            model = run_folder.at_commit(found.run, found.recipe.models[reference])
            return models.resolve(model, weights=reference not in served_models(found.recipe))
    return models.resolve(ModelConfig(source=reference))


def tokenizer_of(found: Found, metadata: Metadata, given: str | None = None, student: str | None = None) -> Any:
    """The tokenizer of the traces' ids: the given one, else the student's or the writer's, whichever matches."""
    tried = []
    for reference in (given, student, metadata.model):
        if reference is None:
            continue
        try:
            tokenizer = models.load_tokenizer(_folder(found, reference))
        except (UserError, OSError, ValueError) as error:
            if reference == given:
                raise UserError(f"--tokenizer {given}: {error}") from None
            tried.append(reference)
            continue
        if models.tokenizer_fingerprint(tokenizer) == metadata.tokenizer:
            return tokenizer
        if reference == given:
            raise UserError(
                f"--tokenizer {given}: is not the tokenizer that wrote these traces "
                f"(theirs is {metadata.tokenizer}, of {metadata.model!r})."
            )
        tried.append(reference)
    raise UserError(
        f"{found.traces}: the tokenizer of {metadata.model!r}, which wrote these traces, was not found "
        f"(tried {', '.join(tried)}). Give a folder that has it: --tokenizer FOLDER."
    )


def _title(found: Found) -> str:
    stage = found.traces.parent.name if found.traces.name == "traces" else found.traces.name
    return f"{found.recipe.name} / {stage}" if found.recipe is not None else stage


def _facts(reader: TraceReader, shown: int, student: str | None) -> list[tuple[str, str]]:
    metadata = reader.metadata
    facts = [
        ("traces", f"{shown:,} of {len(reader):,}"),
        ("written by", metadata.model),
        ("task", metadata.task),
        ("temperature", f"{metadata.sampling.temperature:g}"),
    ]
    if metadata.top_k:
        facts.append(("kept", f"{metadata.mass:g} of the mass, ≤ {metadata.top_k} entries"))
    if student is not None:
        facts.append(("student", student))
    return facts


# ------------------------------------------------------------------------------------- traces and scores


def _sampled(reader: TraceReader, sample: int) -> TraceReader:
    """The `sample` rows with the lowest hashes of their ids."""
    if sample >= len(reader):
        return reader
    ids = [one for block in reader.blocks(4096, ["trace_id"]) for one in block.trace_id]
    chosen = set(sorted(ids, key=lambda one: stable_hash("inspect", one))[:sample])
    return reader.where([one in chosen for one in ids])  # type: ignore[arg-type]


def score(blocks: Sequence[Traces], folder: Path, metadata: Metadata, screen: Screen) -> dict[str, Completion]:
    """Score every stored completion with the student (teacher-forcing); returns scores by trace id.

    Raises UserError if the student's tokenizer is not that of the traces.
    """
    models.check_same_tokenizer(metadata.tokenizer, metadata.vocab_size, models.load_tokenizer(folder), "--student")
    requests = [
        Request(trace_id, block.prompt_ids[n], completion_ids=block.completion_ids[n])
        for block in blocks
        for n, trace_id in enumerate(block.trace_id)
        if len(block.completion_ids[n])
    ]
    longest = max(len(one.prompt_ids) + len(one.completion_ids) for one in requests)  # type: ignore[arg-type]
    config = EngineConfig(fn="transformers")
    os.environ.update(engines.environment(config))
    screen.phase("loading the student")
    engine = engines.open_engine(config, folder, max_model_len=longest + ROOM, max_top_k=STUDENT_TOP_K)
    live, scores = screen.live(len(requests), "traces"), {}
    try:
        for completion in engine.score(requests, top_k=STUDENT_TOP_K):
            scores[completion.request_id] = completion
            live.update(len(scores))
    finally:
        live.close()
        engine.close()
    return scores


def byte_reader(tokenizer: Any) -> Callable[[Sequence[int]], list[bytes]]:
    """Return a function from token ids to the bytes of each."""
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]
    byte_level = '"ByteLevel"' in json.dumps(decoder)
    added = set(tokenizer.get_added_vocab())

    def read(ids: Sequence[int]) -> list[bytes]:
        return token_text.piece_bytes(tokenizer.convert_ids_to_tokens(list(ids)), byte_level, added)

    return read
