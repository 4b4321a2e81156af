"""Upload traces to a data set on the hub: shards, manifests, certificate and a card.

The upload is a folder of traces: after a download it opens, verifies and trains as before. For a selection only the kept
rows are uploaded, as shards of their own.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from distill.models import hub
from distill.records import UserError
from distill.traces import provenance
from distill.traces.data_card import card
from distill.traces.export import merge
from distill.traces.reader import SELECTION_FILE, open_traces
from distill.traces.verify import verify

README = "README.md"


def push(path: Path, repo: str, *, licence: str, private: bool = True) -> str:
    """Upload to the data set `repo` (owner/name), created if missing; return its address.

    Raises UserError if the traces are incomplete, or the hub cannot be reached or refuses.
    """
    hub.check_repo(repo)
    if not hub.reachable():
        raise hub.unreachable(
            "With --folder OUT the data set is built on this machine; upload it from a machine with a network "
            "(`hf upload --repo-type dataset OWNER/NAME OUT`)."
        )
    path = Path(path)
    beside = (path if path.is_dir() else path.parent).resolve().parent
    with tempfile.TemporaryDirectory(prefix=".push-", dir=beside) as temporary:
        built = build(path, Path(temporary) / "dataset", name=repo, licence=licence)
        return hub.upload(built, repo, kind="dataset", private=private, message="Traces, written by distill")


def build(path: Path, out: Path, *, name: str, licence: str) -> Path:
    """Build the folder to upload: traces with their card. Raises UserError if `out` exists, or for no licence."""
    path, out = Path(path), Path(out)
    hub.check_licence(licence)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already and is not an empty folder; name a new one.")
    if not path.is_dir():
        raise UserError(f"{path}: push a folder of traces, or a selection.")
    report = verify(path)
    if not report.ok:
        raise UserError(f"{path}: has faults, so it is not published:\n{report}")
    text = card(path, name=name, licence=licence)
    out.mkdir(parents=True, exist_ok=True)
    if (path / SELECTION_FILE).is_file():
        merge([path], out)
    else:
        for file in _published(path):
            _link(file, out / file.name)
    _link_notes(path, out)
    (out / README).write_text(text, encoding="utf-8")
    return out


def _published(path: Path) -> list[Path]:
    listed = [path / shard.file for shard in open_traces(path).shards]
    return [*listed, *sorted(path.glob("manifest-*.json"))]


def _link_notes(path: Path, out: Path) -> None:
    for folder in (open_traces(path).base, path):
        if (folder / provenance.CERTIFICATE).is_file():
            (out / provenance.CERTIFICATE).unlink(missing_ok=True)
            _link(folder / provenance.CERTIFICATE, out / provenance.CERTIFICATE)


def _link(source: Path, target: Path) -> None:
    """Hard-link a file; copy it if the file system has no links between the two paths."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
