"""The sizes of common models by their hub ids, for models that are not on this machine.

`known_architectures.toml` holds the parts of their config.json that decide sizes. A name matches if it is an entry's, or an
entry's followed by words that do not change the size (Instruct, Base, a date, a version). Any other name is unknown, never
guessed: a recipe names the entry then (`config: Qwen2.5-7B`).
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Mapping
from importlib import resources
from typing import Any

SAME_SIZE = re.compile(
    r"(instruct|it|pt|base|chat|hf|thinking|reasoning|preview|sft|dpo|rlvr\d?|1m|bf16|v\d+(\.\d+)*|\d{4}|\d{6})"
)
"""Words after a model's name that do not change its sizes. Quantised weights are not among them: they take other bytes."""


@functools.cache
def entries() -> list[dict[str, Any]]:
    """Return the table's entries: names, params (the published number of parameters), and the config's keys."""
    text = resources.files("distill.models").joinpath("known_architectures.toml").read_text(encoding="utf-8")
    found: list[dict[str, Any]] = tomllib.loads(text)["model"]
    return found


@functools.cache
def table() -> dict[str, tuple[str, dict[str, Any]]]:
    """Return (name, config) of the known models by name in lower case."""
    return {
        name.lower(): (name, {key: value for key, value in entry.items() if key not in ("names", "params")})
        for entry in entries()
        for name in entry["names"]
    }


def known_config(source: str) -> tuple[str, Mapping[str, Any]] | None:
    """Return (the entry's name, its config) of a hub id or a name; None if it is unknown."""
    name = source.rpartition("/")[2].lower()
    for entry in sorted(table(), key=len, reverse=True):
        rest = name.removeprefix(entry)
        if rest == name or (rest and rest[0] not in "-_"):
            continue
        words = [word for word in re.split("[-_]", rest) if word]
        return table()[entry] if all(SAME_SIZE.fullmatch(word) for word in words) else None
    return None


def names() -> list[str]:
    """Return the names of all entries, as the table writes them."""
    return [name for entry in entries() for name in entry["names"]]
