"""No module reads a sub-module of a library that it has not imported: in a fresh process that is an AttributeError."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import distill

PACKAGE = Path(distill.__file__).parent
RESOLVE = """
import importlib, json, sys
top, *names = json.loads(sys.argv[1])
importlib.import_module(top)
for name in names:
    found = sys.modules[top]
    for part in name.split(".")[1:]:
        if not hasattr(found, part):
            print(name)
            break
        found = getattr(found, part)
"""


def imported(tree: ast.AST) -> tuple[dict[str, str], set[str]]:
    """The modules behind the names of a file, and all modules that its imports load."""
    names, loaded = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                loaded.add(alias.name)
                top = alias.name.partition(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            loaded.add(node.module)
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names, {".".join(name.split(".")[:n]) for name in loaded for n in range(1, name.count(".") + 2)}


def unimported(path: Path) -> Iterator[tuple[str, int]]:
    """The modules, with their lines, that a file reads as attributes of a package without an import of them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names, loaded = imported(tree)
    for node in ast.walk(tree):
        parts: list[str] = []
        inner: ast.expr | ast.AST = node
        while isinstance(inner, ast.Attribute):
            parts.insert(0, inner.attr)
            inner = inner.value
        if not parts or not isinstance(inner, ast.Name) or inner.id not in names:
            continue
        name = f"{names[inner.id]}.{parts[0]}"
        if name not in loaded and is_module(name):
            yield name, node.lineno


@functools.cache
def is_module(name: str) -> bool:
    """Whether a library has a file for the module; nothing is imported."""
    top, *parts = name.split(".")
    spec = importlib.util.find_spec(top)
    folders = spec.submodule_search_locations if spec is not None else None
    files = [Path(folder, *parts) for folder in folders or ()]
    return any(file.with_suffix(".py").is_file() or (file / "__init__.py").is_file() for file in files)


def missing(top: str, names: list[str]) -> list[str]:
    """The modules that a fresh process does not have after importing their package."""
    command = [sys.executable, "-c", RESOLVE, json.dumps([top, *names])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout.split()


def test_the_search_finds_the_fault_that_push_had(tmp_path: Path) -> None:
    file = tmp_path / "push.py"
    file.write_text("import huggingface_hub\nprint(huggingface_hub.constants.ENDPOINT)\n")
    assert {*unimported(file)} == {("huggingface_hub.constants", 2)}
    assert missing("huggingface_hub", ["huggingface_hub.constants"]) == ["huggingface_hub.constants"]
    file.write_text(
        "import huggingface_hub\nimport huggingface_hub.constants\nprint(huggingface_hub.constants.ENDPOINT)\n"
    )
    assert [*unimported(file)] == []


def test_every_sub_module_is_there_in_a_fresh_process() -> None:
    where: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for name, line in unimported(path):
            where.setdefault(name, []).append(f"{path.relative_to(PACKAGE.parent)}:{line}")
    by_top: dict[str, list[str]] = {}
    for name in where:
        by_top.setdefault(name.partition(".")[0], []).append(name)
    assert "torch" in by_top
    faults = {name: where[name] for top, names in by_top.items() for name in missing(top, names)}
    assert faults == {}
