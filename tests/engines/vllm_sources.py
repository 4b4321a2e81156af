"""The installed vLLM's sources as syntax trees: also of files that cannot be imported without a GPU. Imports no vLLM."""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path


def installed() -> Path | None:
    """The folder of the installed package; None if there is none."""
    found = importlib.util.find_spec("vllm")
    return Path(found.submodule_search_locations[0]) if found and found.submodule_search_locations else None


@functools.cache
def tree(path: str) -> ast.Module:
    folder = installed()
    assert folder is not None
    return ast.parse((folder / path).read_text(encoding="utf-8"))


def file_of(module: str) -> str:
    """The path of a module, `vllm.a.b`, in the package."""
    folder, path = installed(), module.partition(".")[2].replace(".", "/")
    assert folder is not None
    return f"{path}.py" if path and (folder / f"{path}.py").exists() else f"{path}/__init__.py".lstrip("/")


def find(path: str, name: str) -> ast.AST:
    """The class, function or method (`Class.method`) of a file; AssertionError if it is not there."""
    node: ast.AST = tree(path)
    for part in name.split("."):
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        below = [each for each in ast.walk(node) if isinstance(each, kinds) and each.name == part]
        assert below, f"vllm/{path} has no {name}"
        node = below[0]
    return node


def source(path: str, name: str) -> str:
    """The source of a class or function, in the form of `ast.unparse`: one spelling, no comments."""
    return ast.unparse(find(path, name))


def arguments(path: str, name: str) -> list[str]:
    """The names of a function's arguments, without self."""
    node = find(path, name)
    assert isinstance(node, ast.FunctionDef)
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    every += [each for each in (node.args.vararg, node.args.kwarg) if each is not None]
    return [each.arg for each in every if each.arg not in ("self", "cls")]


def fields(path: str, name: str) -> list[str]:
    """The annotated names of a class, in their order: the fields of a dataclass or a named tuple."""
    node = find(path, name)
    assert isinstance(node, ast.ClassDef)
    return [
        each.target.id for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    ]


def names(path: str) -> set[str]:
    """Every name that a file defines, imports or lists."""
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.ImportFrom) and node.level == 1 and node.names[0].name == "*":
            found |= names(str(Path(path).parent / f"{node.module}.py"))
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            found.add(node.value)
    return found
