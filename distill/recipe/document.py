"""Read a YAML document that need not be trusted: bounded in size, depth and what aliases expand to, and one message for any fault.

Only plain values: mappings with text keys, lists, text, integers, finite numbers, true, false and null. A number without a point before
its exponent (`1e-4`) is a number, as in YAML 1.2, not text.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from distill.records import UserError

MAX_CHARS = 2**22
"""Characters of a document."""
MAX_DEPTH = 32
"""Mappings and lists inside one another."""
MAX_NODES = 200_000
"""Values of a document, those that aliases repeat included."""
MAX_DIGITS = 64
"""Characters of a number."""

_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq", "merge")}
_EXPONENT = re.compile(r"^[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$")


class _FaultError(Exception):
    """What is wrong with a document, and where (a YAML mark) if known."""

    def __init__(self, what: str, mark: Any = None) -> None:
        super().__init__(what)
        self.mark = mark


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without dates, binary data and sets, and with `1e-4` as a number."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag != "tag:yaml.org,2002:timestamp"]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def read(text: str, where: str) -> Any:
    """Return the value of a document. Raises UserError, with the place in the document, for whatever is wrong with it."""
    try:
        if len(text) > MAX_CHARS:
            raise _FaultError(f"longer than {MAX_CHARS:,} characters")
        _check_depth(text)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _Nodes(loader).check(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except _FaultError as fault:
        raise UserError(f"{where}: not valid YAML: {fault}{_place(fault.mark)}") from None
    except yaml.MarkedYAMLError as error:
        problem = " ".join(str(part) for part in (error.context, error.problem) if part)
        raise UserError(
            f"{where}: not valid YAML: {problem}{_place(error.problem_mark or error.context_mark)}"
        ) from None
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())[:300]}") from None


def _place(mark: Any) -> str:
    return f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""


def _check_depth(text: str) -> None:
    """Refuse a document that is nested too deep, before anything recurses into it."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise _FaultError(f"more than {MAX_DEPTH} mappings and lists inside one another", event.start_mark)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


class _Nodes:
    """Check a document's nodes before values are made of them."""

    def __init__(self, loader: _Loader) -> None:
        self._loader = loader
        self._sizes: dict[int, int] = {}
        self._open: set[int] = set()

    def check(self, node: Any) -> int:
        """Return how many values a node is, with those that its aliases repeat. Raises _FaultError for what no recipe holds."""
        if id(node) in self._open:
            raise _FaultError("an alias that contains itself", node.start_mark)
        if id(node) in self._sizes:
            return self._sizes[id(node)]
        self._open.add(id(node))
        if node.tag not in _TAGS:
            raise _FaultError(f"the tag {_short(node.tag)} is not used here", node.start_mark)
        if isinstance(node, yaml.ScalarNode):
            self._check_scalar(node)
            size = 1
        elif isinstance(node, yaml.MappingNode):
            size = 1 + sum(self.check(key) + self.check(value) for key, value in node.value)
            _check_keys(node)
        else:
            size = 1 + sum(map(self.check, node.value))
        if size > MAX_NODES:
            raise _FaultError(f"more than {MAX_NODES:,} values, aliases included", node.start_mark)
        self._open.discard(id(node))
        self._sizes[id(node)] = size
        return size

    def _check_scalar(self, node: yaml.ScalarNode) -> None:
        kind, text = node.tag.rpartition(":")[2], node.value
        if any(0xD800 <= ord(char) <= 0xDFFF for char in text):
            raise _FaultError("half of a surrogate pair, which is no character", node.start_mark)
        if kind not in ("int", "float"):
            return
        if len(text) > MAX_DIGITS:
            raise _FaultError(f"a number of more than {MAX_DIGITS} characters", node.start_mark)
        try:
            value = self._loader.yaml_constructors[node.tag](self._loader, node)
        except (ValueError, OverflowError, IndexError):
            raise _FaultError(f"{_short(text)} is not a number", node.start_mark) from None
        if not math.isfinite(value):
            raise _FaultError(f"{_short(text)}: infinite and undefined numbers are not used here", node.start_mark)


def _check_keys(node: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _FaultError("a key must be a text", key.start_mark)
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        if key.value in seen:
            raise _FaultError(f"the key {_short(key.value)} is given twice", key.start_mark)
        seen.add(key.value)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
