"""Decide what to do with a node whose inputs are finished: skip it, run it, resume it, add to it, or do it again.

A finished stage with the same config and inputs is skipped. An unfinished stage resumes where it was interrupted. If
something changed, the decision depends on what it is:
    an identity field     an error that names the keys; `--redo STAGE` does the stage again
    a growth field        the stage continues and adds the difference
    an execution field    no effect on a finished stage; an unfinished one continues with the new value
    an input's content    the stage is done again and its former output is moved to RUN/.old; if the kind names the
                          input in `adds_to`, the stage adds the difference instead
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distill import run_folder
from distill.models import PACKAGE, hub, package_file
from distill.recipe import Config, Recipe
from distill.records import UserError, stable_hash
from distill.run.nodes import Node
from distill.stages.context import find_data, fingerprint_of


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with a node, and the reason, as shown to the user."""

    action: Literal["skip", "run", "resume", "grow", "redo"]
    why: str = ""


def input_fingerprint(recipe: Recipe, run: Path, reference: str) -> str:
    """Fingerprint of an input's content: of a stage's output, model, task or file, or a hub dataset's commit."""
    if reference in recipe.stages or ("." in reference and reference.split(".")[0] in recipe.stages):
        standing = run_folder.read(run / reference)
        return standing.fingerprint if standing and standing.status == "done" else ""
    if reference in recipe.models:
        model = recipe.models[reference]
        if model.source.startswith(PACKAGE):
            distribution, path = package_file(model.source)
            return stable_hash(distribution, path.name, path.stat().st_size)
        folder = Path(model.source).expanduser()
        return fingerprint_of(folder) if folder.is_dir() else stable_hash(model.source, model.revision)
    if reference in recipe.tasks:
        task = recipe.tasks[reference]
        files = [Path(str(value)) for value in task.options.values() if isinstance(value, str)]
        contents = [fingerprint_of(file) for file in files if file.is_file()]
        return stable_hash(task.model_dump_json(), *contents)
    if (data := find_data(reference)) is not None:
        return fingerprint_of(data)
    on_hub = hub.dataset_id(reference)
    return hub.dataset_commit(*on_hub) if on_hub is not None else ""


def input_fingerprints(node: Node, recipe: Recipe, run: Path) -> dict[str, str]:
    """The fingerprint of each input of a node, by field; a field with several names has one for all of them."""
    found: dict[str, list[str]] = {}
    for each in node.inputs:
        found.setdefault(each.field, []).append(input_fingerprint(recipe, run, each.name))
    return {field: several[0] if len(several) == 1 else stable_hash(*several) for field, several in found.items()}


def decide(node: Node, recipe: Recipe, run: Path, redo: Iterable[str] = ()) -> Decision:
    """Decide what to do with a node whose inputs are finished. Raises UserError when an identity field changed.

    redo: names of nodes or stages; a stage's name without a seed means all its copies.
    """
    standing = run_folder.read(run / node.name)
    if standing is None or (standing.status != "done" and not _has_output(run / node.name)):
        return Decision("run")
    if {node.name, *node.stages} & {*redo}:
        return Decision("redo", "as asked")
    changed = _changed(node, standing)
    if identity := [text for role, text in changed if role == "identity"]:
        raise UserError(
            f"stage {node.stage!r} was made with other settings:\n  "
            + "\n  ".join(identity)
            + f"\nThese keys decide the result. Undo the change, give the run another name, or do this stage and all "
            f"stages that depend on it again with --redo {node.stage}."
        )
    inputs = input_fingerprints(node, recipe, run)
    # An input that cannot be checked now (on the hub, without a network) counts as unchanged.
    if moved := [k for k in inputs if inputs[k] not in (standing.inputs.get(k), hub.UNVERIFIED)]:
        named = {key: " or ".join(each.name for each in node.inputs if each.field == key) for key in moved}
        why = ", ".join(f"{key} ({named[key]}) changed" for key in moved)
        return Decision("grow" if node.config.adds_to.issuperset(moved) else "redo", why)
    grown = [text for role, text in changed if role == "growth"]
    if grown:
        return Decision("grow", ", ".join(grown))
    if standing.status == "done":
        return Decision("skip")
    return Decision("resume", "it was interrupted" if standing.attempts else "")


def _has_output(folder: Path) -> bool:
    """Whether an unfinished stage left output to resume from."""
    kept = ("model", "checkpoints/step-*", "traces/*.parquet", "traces/selection.json", "answers/answers-*.jsonl")
    return any(True for pattern in kept for _ in folder.glob(pattern))


def _changed(node: Node, standing: run_folder.State) -> list[tuple[str, str]]:
    """(role, description) of every field whose value differs from the one that the stage was made with."""
    if standing.kind != node.kind:
        return [("identity", f"kind: {standing.kind} -> {node.kind}")]
    before, now = standing.config, node.config.model_dump(mode="json")
    for key, decided in standing.decided.items():
        if key.partition(".")[0] not in before:
            continue  # no field: how a model is computed, for example
        before, now = _as_decided(before, now, key.split("."), decided["value"])
    return list(_differences(type(node.config), before, now, ""))


def _as_decided(
    before: dict[str, Any], now: dict[str, Any], key: list[str], value: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both configs with the decided value in place of "auto": a resumed stage keeps it even on another machine."""
    first, *rest = key
    if rest:
        inner = _as_decided(before.get(first) or {}, now.get(first) or {}, rest, value)
        return {**before, first: inner[0]}, {**now, first: inner[1]}
    before = {**before, first: value}
    return before, {**now, first: value} if now.get(first) == "auto" else now


def _default(info: Any) -> Any:
    """The default of a field as JSON: what a stage was made with that is older than the field; None without one."""
    default = None if info is None or info.is_required() else info.get_default(call_default_factory=True)
    return default.model_dump(mode="json") if isinstance(default, Config) else default


def _differences(model: Any, before: dict[str, Any], now: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for field in sorted({*before, *now}):
        info = model.model_fields.get(field)
        old, new = before[field] if field in before else _default(info), now.get(field)
        if old == new:
            continue
        role = model.role(field) if issubclass(model, Config) else "identity"
        nested = info.annotation if info is not None else None
        if isinstance(old, dict) and isinstance(new, dict) and hasattr(nested, "model_fields"):
            yield from _differences(nested, old, new, f"{prefix}{field}.")
            continue
        text = f"{prefix}{field}: {json.dumps(old)} -> {json.dumps(new)}"
        shrinks = isinstance(old, int) and isinstance(new, int) and new < old
        if role == "growth" and (old is None or new is None or shrinks):
            role, text = "identity", f"{text} (it can grow, not shrink)" if shrinks else text
        yield role, text
