"""The Hugging Face hub: find out in seconds whether it can be reached and which commit of a data set it would give."""

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
"""Stands for a commit that cannot be determined without the hub."""

_DATASET = re.compile(r"(?P<name>[\w-][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def dataset_id(text: str) -> tuple[str, str | None] | None:
    """Return (name, revision) if a text may name a data set on the hub: owner/name, or owner/name@revision."""
    match = _DATASET.fullmatch(text)
    return (match["name"], match["revision"]) if match else None


@functools.lru_cache
def dataset_commit(name: str, revision: str | None) -> str:
    """Return the commit that loading a data set would read now; UNVERIFIED if it cannot be determined.

    A revision that is a commit is returned. Otherwise the hub is asked or, without a hub, the newest copy in the cache of
    `datasets`, which is what it loads then. Nothing is downloaded.
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
    """Return the commit of a `datasets.Dataset`: its files lie in a folder of that name."""
    folders = {Path(file["filename"]).parent.name for file in table.cache_files}
    found = folders.pop() if len(folders) == 1 else ""
    return found if _COMMIT.fullmatch(found) else UNVERIFIED


def reachable() -> bool:
    """Return whether the hub (or the mirror that HF_ENDPOINT names) answers."""
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
    """Set `datasets` offline inside the context if the hub does not answer: otherwise it retries for half a minute."""
    import datasets.config
    import huggingface_hub.constants as constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if not reachable():
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
