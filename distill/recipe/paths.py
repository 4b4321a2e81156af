"""Relative paths of a recipe: those of its own folder, then of the working directory.

A recipe that lies in another folder than the working directory gets its paths rewritten as it is loaded, so that everything
after it reads paths from the working directory alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RULE = "A relative path is looked for in the recipe's folder, then in the working directory"
"""The rule, for messages about a path at which nothing is."""
_BARE = frozenset({"path", "folder", "source", "config"})
"""Keys whose value is a path also where it is a single word without a dot."""


def from_working_directory(tree: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a recipe's tree with the paths that exist in its folder relative to the working directory.

    tree: as read from the file. folder: the one that the file is in. Names of models, tasks and stages stay names.
    """
    if folder.resolve() == Path.cwd():
        return dict(tree)
    names = {
        str(name)
        for part in ("models", "tasks", "stages")
        if isinstance(tree.get(part), Mapping)
        for name in tree[part]
    }
    parts = {part: _moved(tree[part], folder, names, "") for part in ("models", "tasks", "stages") if part in tree}
    if isinstance(tree.get("models"), Mapping):
        parts["models"] = {
            name: _path(value, folder, set(), "source") if isinstance(value, str) else parts["models"][name]
            for name, value in tree["models"].items()
        }
    return {**tree, **parts}


def _moved(value: Any, folder: Path, names: set[str], key: str) -> Any:
    if isinstance(value, Mapping):
        # Several sets of traces are {path: share}.
        return {
            (_path(one, folder, names, key) if key == "data" and isinstance(one, str) else one): _moved(
                item, folder, names, str(one)
            )
            for one, item in value.items()
        }
    if isinstance(value, list):
        return [_moved(item, folder, names, key) for item in value]
    return _path(value, folder, names, key) if isinstance(value, str) else value


def _path(text: str, folder: Path, names: set[str], key: str) -> str:
    """Return the path of a text from the working directory, if it is a relative path that exists in the recipe's folder."""
    like_a_path = "/" in text or "." in text or key in _BARE
    if not text or "\n" in text or "://" in text or text in names or not like_a_path or Path(text).is_absolute():
        return text
    try:
        there = (folder / text).exists()
    except (OSError, ValueError):
        return text  # no file can have this name
    if not there or text.strip("./") == "":
        return text
    moved = os.path.relpath(folder / text)
    return moved if "/" in moved or "/" not in text else f"./{moved}"
