"""The Hugging Face hub: whether it can be reached, which commit of a data set it would give, and uploads."""

from __future__ import annotations

import functools
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from distill.errors import MachineError, UserError, in_a_line
from distill.recipe.paths import RULE

CONNECT_SECONDS = 5.0
UNVERIFIED = "unverified"
"""Stands for a commit that cannot be determined without the hub."""

_DATASET = re.compile(r"(?P<name>[\w-][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def dataset_id(text: str) -> tuple[str, str | None] | None:
    """Return (name, revision) if a text may name a data set on the hub: owner/name, or owner/name@revision."""
    match = _DATASET.fullmatch(text)
    return (match["name"], match["revision"]) if match else None


def commit_of(folder: Path) -> str | None:
    """Return the commit of a model's folder in the hub's cache; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name) else None


def cached_folder(name: str, revision: str | None) -> Path | None:
    """Return a model's folder in the hub's cache, whole or not; None if it is not there. Raises UserError for what is no hub id."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        raise UserError(f"model {name!r} is neither a folder nor a valid hub id (owner/name). {RULE}.") from None
    return Path(found).parent if isinstance(found, str) else None


@functools.lru_cache
def model_config(name: str, revision: str | None) -> tuple[dict[str, Any] | None, str]:
    """Fetch the config.json of a model on the hub, some kilobytes, into the cache; else return (None, what the hub says).

    "" if it cannot be reached: then nothing is known of the model.
    """
    if not reachable():
        return None, ""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        path = huggingface_hub.hf_hub_download(name, "config.json", revision=revision, etag_timeout=CONNECT_SECONDS)
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except GatedRepoError:
        return None, "the hub gives it only to those who have accepted its terms (on its page), with `hf auth login`"
    except RepositoryNotFoundError:
        return None, "the hub has no model of this name, or it is private: `hf auth login`"
    except RevisionNotFoundError:
        return None, f"the hub has no revision {revision!r} of it"
    except HfHubHTTPError as error:
        return None, f"the hub refuses its config.json ({in_a_line(error)})"
    except (OSError, ValueError):
        return None, ""
    return (found, "") if isinstance(found, dict) else (None, "")


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


def endpoint() -> str:
    """Return the address of the hub, or of the mirror that HF_ENDPOINT names."""
    import huggingface_hub.constants as constants

    return str(constants.ENDPOINT)


def upload(folder: Path, repo: str, *, kind: Literal["model", "dataset"], private: bool, message: str) -> str:
    """Upload a folder's files in one commit to the repository `repo`, created if missing; return its address.

    private: refuse a repository that exists and is public. Raises UserError for a name, token or permission that the hub
    refuses, MachineError if it cannot be reached or fails.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

    check_repo(repo)
    if not huggingface_hub.get_token():
        raise UserError(
            f"push: there is no token for the hub ({endpoint()}). Log in with `hf auth login`, or set HF_TOKEN to a token that "
            f"may write to {repo.partition('/')[0]}."
        )
    api = huggingface_hub.HfApi()
    try:
        address = str(api.create_repo(repo, repo_type=kind, private=private, exist_ok=True))
        if private and api.repo_info(repo, repo_type=kind).private is False:
            raise UserError(
                f"push: {repo} exists on the hub and is public, so nothing was uploaded. Say --public to upload there, or choose "
                "another name."
            )
        api.upload_folder(repo_id=repo, repo_type=kind, folder_path=folder, commit_message=message)
    except HfHubHTTPError as error:
        kind_of_error = UserError if error.response.status_code in _REFUSALS and not _may_pass(error) else MachineError
        raise kind_of_error(f"push: {_refusal(error, repo)}") from None
    except ValueError as error:  # a name that is none, or front matter of the card that the hub does not take
        raise UserError(f"push: {' '.join(str(error).split())[:500]}") from None
    except (HTTPError, OSError, RuntimeError) as error:
        raise MachineError(
            f"push: the hub ({endpoint()}) stopped answering: {_first_line(error)}. Run the same command again; files that are "
            "there already are not sent again."
        ) from None
    return address


def check_repo(repo: str) -> None:
    """Raise UserError unless `repo` is owner/name."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"push: {repo!r} is not the name of a repository: write owner/name.")


def check_licence(licence: str) -> None:
    """Raise UserError unless a text has the form of the hub's identifiers of licences."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence):
        raise UserError(
            f"--license: {licence!r} is not an identifier of the hub, such as apache-2.0, mit, llama3.2 or other."
        )


def unreachable(instead: str) -> MachineError:
    """Return the error for a hub that does not answer. instead: what can be done without it."""
    import huggingface_hub.constants as constants

    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "it does not answer"
    return MachineError(f"push: the hub ({endpoint()}) cannot be reached ({why}), so nothing was uploaded. {instead}")


_REFUSALS = {
    401: "the hub does not accept the token. Log in again with `hf auth login`, or set HF_TOKEN to a valid token",
    402: "the hub wants a payment for this account before it takes more",
    403: "the token may not write to {repo}. Use an account, or a token with the permission to write, that may",
    404: "the hub has no user or organisation {owner}, or this token may not see {repo}. Check the name, and log in with `hf auth login`",
    409: "{repo} was changed by somebody else at the same time. Run the same command again",
    413: "a file is larger than the hub takes",
}
"""What an answer of the hub means, by its HTTP status."""


def _may_pass(error: Any) -> bool:
    """Return whether the same command may work later: nothing is wrong with it."""
    return int(error.response.status_code) in (402, 409)


def _refusal(error: Any, repo: str) -> str:
    """Return what the hub's refusal means, and its own words."""
    status = error.response.status_code
    known = _REFUSALS.get(status, "the hub ({endpoint}) failed. Run the same command again later")
    said = str(getattr(error, "server_message", "") or "").strip()
    words = known.format(repo=repo, owner=repo.partition("/")[0], endpoint=endpoint())
    return f"{words} (status {status}{': ' + ' '.join(said.split())[:200] if said else ''})."


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


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
