"""Every message that docs/troubleshooting.md explains is one that the code can give."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
HEADING = re.compile(r"^### `(.+)`$", re.MULTILINE)
GAP = "…"
LEAST = 10
"""Characters of the longest fragment of a quoted message: fewer would be found by chance."""
QUOTED = HEADING.findall(PAGE.read_text(encoding="utf-8"))


def texts_of(tree: ast.AST) -> set[str]:
    """The texts in a module: constants, f-strings with GAP for what is filled in, and concatenations of both."""

    def text(node: ast.AST) -> str:
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else GAP
        if isinstance(node, ast.JoinedStr):
            return "".join(text(value) for value in node.values)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return text(node.left) + text(node.right)
        return GAP

    return {text(node) for node in ast.walk(tree) if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp)}


@pytest.fixture(scope="module")
def said() -> list[str]:
    """All texts of the package, each in one line."""
    modules = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "distill").rglob("*.py")]
    return [" ".join(text.split()) for module in modules for text in texts_of(module) if len(text) >= LEAST]


def is_said(quoted: str, said: list[str]) -> bool:
    """Whether a text has the quoted fragments in their order."""
    fragments = [part.strip() for part in quoted.split(GAP)]
    assert max(map(len, fragments)) >= LEAST, f"too little of the message is quoted: {quoted}"
    pattern = re.compile(".*".join(re.escape(part) for part in fragments if part))
    return any(pattern.search(text) for text in said)


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_quoted_message_is_in_the_code(quoted, said):
    assert is_said(quoted, said), f"no text of the code is: {quoted}"


def test_a_message_that_is_not_there_is_found(said):
    assert len(QUOTED) >= 40
    assert not is_said("…: stages: … is a circle; a stage cannot depend on its own output.", said)
