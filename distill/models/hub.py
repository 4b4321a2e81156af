"""The Hugging Face hub: is it there at all, and what would it hand out? Found out in seconds, not after the
libraries' own retries."""

from __future__ import annotations

import functools
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CONNECT_SECONDS = 5.0
UNVERIFIED = "unverified"
"""In place of a commit: which one it is cannot be told from here."""

_DATASET = re.compile(r"(?P<name>[\w-][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def dataset_id(text: str) -> tuple[str, str | None] | None:
    """(name, revision) where a text could name a dataset on the hub: owner/name, or owner/name@revision."""
    match = _DATASET.fullmatch(text)
    return (match["name"], match["revision"]) if match else None


@functools.lru_cache
def dataset_commit(name: str, revision: str | None) -> str:
    """The commit of a dataset that loading it would read now; UNVERIFIED where that cannot be known.

    A commit is itself; otherwise the hub says, or, without a hub, the newest copy in the cache of `datasets`, which is
    what it loads then. Nothing is downloaded.
    """
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    if reachable():
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            api = huggingface_hub.HfApi()
            found = api.dataset_info(name, revision=revision, timeout=CONNECT_SECONDS)
        except (HfHubHTTPError, HFValidationError, OSError):
            return UNVERIFIED
        return found.sha or UNVERIFIED
    return UNVERIFIED if revision is not None else _cached_commit(name)


def _cached_commit(name: str) -> str:
    import datasets.config
    from datasets.naming import camelcase_to_snakecase

    owner, own = name.split("/")
    cache = Path(datasets.config.HF_DATASETS_CACHE).expanduser()
    copies = (cache / f"{owner}___{camelcase_to_snakecase(own)}").glob("*/*/*/dataset_info.json")
    newest = max((path.parent for path in copies), key=lambda p: p.stat().st_mtime, default=None)
    return newest.name if newest is not None and _COMMIT.fullmatch(newest.name) else UNVERIFIED


def loaded_commit(table: Any) -> str:
    """The commit that a `datasets.Dataset` was made from: its files lie in a folder of that name."""
    folders = {Path(file["filename"]).parent.name for file in table.cache_files}
    found = folders.pop() if len(folders) == 1 else ""
    return found if _COMMIT.fullmatch(found) else UNVERIFIED


def reachable() -> bool:
    """Whether the hub (or the mirror that HF_ENDPOINT names) answers."""
    import huggingface_hub.constants as constants

    if constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=CONNECT_SECONDS).close()
    except urllib.error.HTTPError:
        return True  # it answered
    except OSError:
        return False
    return True


@contextmanager
def offline_unless_reachable() -> Iterator[None]:
    """Without a hub, datasets tries for half a minute; told to be offline, it looks in the cache at once."""
    import datasets.config
    import huggingface_hub.constants as constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if not reachable():
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
