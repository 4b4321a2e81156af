"""The rules for the fields of a served engine (`engine: {fn: openai, ...}`), without the config classes.

An API key is named by its environment variable and never written into a recipe, so no file of a run can hold it. Messages
about a wrong key do not repeat what was given.
"""

from __future__ import annotations

import os
import re
from collections.abc import Set
from urllib.parse import urlsplit

from distill.errors import MachineError, UserError

FN = "openai"
"""The name of the engine that sends its requests to an endpoint."""
TIMEOUT = 600.0
MAX_RETRIES = 8

REQUIRED = ("base_url", "model")
OWN = (*REQUIRED, "key", "timeout", "max_retries", "requests_per_minute", "tokens_per_minute", "price")
"""Fields that only a served engine has."""
LOCAL = (
    "dtype",
    "kv_cache_gib",
    "memory_share",
    "sleep",
    "eager",
    "tensor_parallel",
    "replicas",
    "ray",
    "weight_transfer",
)
"""Fields about this machine's memory, processors and processes."""

_VARIABLE = re.compile(r"\$(\{[A-Za-z_][A-Za-z0-9_]*\}|[A-Za-z_][A-Za-z0-9_]*)")


def checked_key(value: object) -> object:
    """Return the key's field if it names an environment variable. Raises ValueError, without the value, otherwise."""
    if value is None or (isinstance(value, str) and _VARIABLE.fullmatch(value)):
        return value
    raise ValueError(
        "write the name of an environment variable that holds the key, as $NAME; a key itself must not stand in a recipe, "
        "which is copied into the run's folder"
    )


def secret(key: str | None) -> str:
    """Return the API key from its environment variable; "" without one. Raises UserError if the variable is not set."""
    if key is None:
        return ""
    name = variable(key)
    value = os.environ.get(name, "").strip()
    if not value:
        raise MachineError(f"engine.key: the environment variable {name} is not set; export it, or name another.")
    if not value.isascii() or not value.isprintable():
        raise UserError(f"engine.key: the environment variable {name} holds characters that no header can carry.")
    return value


def variable(key: str) -> str:
    """Return the name of the environment variable in a key's field: NAME for $NAME and ${NAME}."""
    return key.removeprefix("$").strip("{}")


def checked_url(value: object) -> object:
    """Return the address of an endpoint. Raises ValueError if it is none, or if it carries a password or a query."""
    if value is None:
        return value
    try:
        parts = urlsplit(value) if isinstance(value, str) else None
        sound = parts is not None and parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound or parts is None:
        raise ValueError("is not an address; write it as http://host:port/v1 or https://host/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            "must be a plain address; put a password or token into an environment variable, named by key: $NAME"
        )
    return value


def problem(fn: str, changed: Set[str]) -> str:
    """Return what is wrong with the fields of an engine section, or "". changed: fields with another value than the default."""
    if ":" in fn:
        return ""  # your own engine may read any of them
    if fn != FN:
        wrong = [name for name in OWN if name in changed]
        return f"{wrong[0]}: only for an endpoint; set fn: {FN}, or remove the key" if wrong else ""
    missing = [name for name in REQUIRED if name not in changed]
    if missing:
        return f"fn: {FN} needs {' and '.join(missing)}: the endpoint's address and the model's name there"
    wrong = [name for name in LOCAL if name in changed]
    if wrong:
        return (
            f"{wrong[0]}: the endpoint decides how it runs the model; remove the key, or use an engine of this machine"
        )
    return ""
