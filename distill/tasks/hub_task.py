"""Problems from a dataset of the Hugging Face hub, or from a local copy of one.

Official splits are kept: the official test set is held out, the official train set is for training, and a
question that is in both is held out. A hub that cannot be reached is found out in seconds; what is in the
cache is still used then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from distill.conversations.tables import of_dataset
from distill.errors import DataError, MachineError
from distill.models import file_hash
from distill.models.hub import offline_unless_reachable
from distill.plug import nearest
from distill.records import Split, UserError, stable_hash
from distill.tasks import templates
from distill.tasks.jsonl_task import problems_of
from distill.tasks.problem_list import FiniteTask, Judge, Loaded, Rejected, Row, assemble

_READERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}


@dataclass(frozen=True)
class Source:
    """Where the problems of a dataset are. A split of None: there is none of that sort."""

    dataset: str
    subset: str | None = None
    train_split: str | None = "train"
    held_out_split: str | None = "test"


KNOWN = {
    "gsm8k": Source("openai/gsm8k", "main"),
    # All of MATH but MATH-500 to train on; MATH-500 is held out.
    "math": Source("nlile/hendrycks-MATH-benchmark"),
    "math500": Source("HuggingFaceH4/MATH-500", train_split=None),
    # Its only split is called train; it is thirty competition problems to evaluate on.
    "aime2024": Source(
        "HuggingFaceH4/aime_2024",
        train_split=None,
        held_out_split="train",
    ),
}


def hub(
    name: str,
    *,
    dataset: Literal["gsm8k", "math", "math500", "aime2024"] | str,
    folder: str | None = None,
    subset: str | None = None,
    fields: dict[str, str] | None = None,
    train_split: str | None = None,
    held_out_split: str | None = None,
    judge: Judge = "math",
    template: templates.Given = "boxed",
) -> FiniteTask:
    """Problems of a known dataset, of any hub id, or of a local folder (saved to disk, or of data files).

    folder: a local copy of `dataset`. fields: columns of a layout that `distill ls layouts` does not list, by part, such as
    {question: a.b, answer: c}. Splits are named as in the data set, or "none"; those of known data sets are known.
    held_out_split: "hash" holds out one in ten problems of the train split, by content. judge: "none" needs no answers.
    """
    where = f"tasks.{name}"
    said = {
        "subset": subset,
        "train_split": train_split,
        "held_out_split": held_out_split,
    }
    source = KNOWN.get(dataset, Source(dataset))
    source = replace(source, **{key: value for key, value in said.items() if value is not None})
    local = Path(folder) if folder is not None else Path(dataset) if Path(dataset).is_dir() else None
    if local is not None and not local.is_dir():
        raise UserError(f"{where}.folder: {folder!r}: no such folder.")
    if local is None and dataset not in KNOWN and "/" not in dataset:
        raise UserError(
            f"{where}.dataset: {dataset!r} is no known dataset, hub id (owner/name) or folder.{nearest(dataset, KNOWN)}"
        )
    found = templates.find(template, f"{where}.template")
    content = source.dataset if local is None else _folder_hash(local)
    fingerprint = stable_hash(
        "hub", content, *([repr(sorted(fields.items()))] if fields else []), *(f"{key}={value}" for key, value in vars(source).items() if key != "dataset"),
        judge, *templates.fingerprint(found),
    )  # fmt: skip
    origin = str(local) if local is not None else source.dataset
    return FiniteTask(name, found, fingerprint, judge, lambda: _load(name, source, local, judge, fields or {}), origin)


def _load(name: str, source: Source, local: Path | None, judge: Judge, fields: Mapping[str, str]) -> Loaded:
    where = f"tasks.{name}"
    tables = _read_folder(local, where) if local is not None else read_hub(source, where)
    by_content = source.held_out_split == "hash"
    official: tuple[tuple[Split | None, str | None], ...] = (
        (None if by_content else "train", source.train_split),
        ("held_out", None if by_content else source.held_out_split),
    )
    chosen = [(split, tables[key]) for split, key in official if key is not None and key in tables]
    if not chosen:
        raise UserError(
            f"{where}: {source.dataset} has the splits {', '.join(sorted(tables))}; say which is which "
            f"with train_split and held_out_split."
        )
    rows: list[Row] = []
    rejected: Rejected = []
    for split, table in chosen:
        rows += problems_of(of_dataset(source.dataset, table), fields, split, rejected, judged=judge != "none")
    return assemble(name, source.dataset, rows, judge, rejected)


# -------------------------------------------------------------------------------------------------- reading


def read_hub(source: Source, where: str) -> Mapping[str, Any]:
    """The splits of a data set, from the hub or its cache. Raises MachineError if it is in neither."""
    import datasets

    with offline_unless_reachable():
        try:
            return dict(datasets.load_dataset(source.dataset, source.subset))
        except (OSError, ValueError) as error:
            raise MachineError(
                f"{where}.dataset: {source.dataset!r} cannot be loaded: {_first_line(error)}. Without a "
                f"network, give `folder:` a local copy (written by datasets' save_to_disk, or of parquet or "
                f"JSON files), fill the Hugging Face cache beforehand, or use a JSONL file with fn: jsonl."
            ) from error


def _read_folder(folder: Path, where: str) -> Mapping[str, Any]:
    import datasets

    try:
        if (folder / "dataset_dict.json").is_file():
            return dict(datasets.load_from_disk(str(folder)))
        if (folder / "state.json").is_file():
            return {"test": datasets.load_from_disk(str(folder))}
        files = _data_files(folder)
        if not files:
            raise DataError(f"{where}: {folder}: holds neither a saved dataset nor parquet, JSON or CSV files.")
        suffix = files[0].suffix
        by_split: dict[str, list[str]] = {}
        for file in files:
            if file.suffix == suffix:
                by_split.setdefault(_split_name(file.stem), []).append(str(file))
        return dict(datasets.load_dataset(_READERS[suffix], data_files=by_split))
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: {folder}: cannot be read: {_first_line(error)}.") from error


def _data_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in _READERS)


def _split_name(stem: str) -> str:
    """`test` of test.parquet or test-00000-of-00001.parquet."""
    return stem.partition("-")[0]


def _folder_hash(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return stable_hash(*(f"{path.relative_to(folder)}={file_hash(path)}" for path in files))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
