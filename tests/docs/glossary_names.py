"""The names that metrics.jsonl, stage.json and report.json can hold, read from the code, and those that docs/glossary.md explains.

A metric is a key of a dictionary literal: in a function of `training/` or `stages/` that returns metrics or is called so, or assigned to a name
`metrics`, `measures` or `record`, or in a stage's `Result`. A key that is computed is a pattern: `reward/<>`.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from distill.records import Cost
from distill.reports import run_report
from distill.traces.summary import Stats

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "glossary.md"
NAMES = {"metrics", "measures", "record"}
RETURNED = ("dict[str, Tensor]", "dict[str, float]", "dict[str, float | None]", "Mapping[str, Tensor]")
NO_METRICS = {
    "training/checkpoint.py", "training/optim.py", "training/policy.py",  # states, by the names of parameters
    "stages/divergence.py",  # sums of a token, from which the rows of the report are made
}  # fmt: skip
"""Files whose dictionaries of numbers are no metrics."""
REPORT_ROWS = (
    run_report.ArmRow, run_report.ComparisonRow, run_report.DivergenceRow, run_report.TraceRatioRow, run_report.Amounts,
    run_report.IntervalRow,
)  # fmt: skip


def in_code() -> set[str]:
    """Every name that a metric, a stage's result, an arm, a comparison or a cost can have."""
    found = {name for path in sorted((ROOT / "distill").glob("[ts]*/**/*.py")) for name in _metrics_of(path)}
    found |= {field.name for row in (Stats, Cost) for field in dataclasses.fields(row)}
    return found | {name for row in REPORT_ROWS for name in row.__annotations__}


def in_run(run: Path) -> set[str]:
    """Every name in a run's metrics.jsonl and stage.json files, and in the arms of its report."""
    found: set[str] = set()
    for path in run.glob("*/metrics.jsonl"):
        found |= {key for line in path.read_text(encoding="utf-8").splitlines() for key in json.loads(line)}
    for path in run.glob("*/stage.json"):
        found |= json.loads(path.read_text(encoding="utf-8"))["metrics"].keys()
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    return found.union(*report["arms"].values(), *report["comparisons"], *(stage["cost"] for stage in report["stages"]))


def explained() -> set[str]:
    """Every name in the first column of the glossary's tables; capitals (`reward/NAME`) stand for any text."""
    rows = re.findall(r"^\| (`[^|]+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {name.rpartition("divergence.")[2] for row in rows for name in re.findall(r"`([^`]+)`", row)}


def unexplained(names: set[str]) -> set[str]:
    """Those of the names that the glossary does not have. A computed part (`<>`) fits any text of an entry."""
    known = explained()
    patterns = [re.sub(r"NAME|METRIC", ".+", re.escape(entry)) for entry in known if re.search(r"NAME|METRIC", entry)]

    def has(name: str) -> bool:
        if "<>" in name:
            return any(re.fullmatch(pattern_of(name), entry) for entry in known)
        return name in known or any(re.fullmatch(pattern, name) for pattern in patterns)

    return {name for name in names if not has(name)}


def pattern_of(name: str) -> str:
    """A computed name as a regular expression."""
    return re.escape(name).replace("<>", ".*")


def _metrics_of(path: Path) -> Iterator[str]:
    where = path.relative_to(ROOT / "distill").as_posix()
    if where.partition("/")[0] not in ("training", "stages") or where in NO_METRICS:
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            returns = "" if node.returns is None else ast.unparse(node.returns)
            if node.name.endswith(("metrics", "divergences")) or any(each in returns for each in RETURNED):
                yield from _keys(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if _is_metrics(target):
                    yield from _keys(node.value)
                elif isinstance(target, ast.Subscript) and _is_metrics(target.value) and (key := _text(target.slice)):
                    yield key
        elif isinstance(node, ast.keyword) and node.arg in NAMES:
            yield from _keys(node.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Result":
            yield from _keys(node.args[1])


def _is_metrics(node: ast.AST) -> bool:
    return (isinstance(node, ast.Name) and node.id in NAMES) or (isinstance(node, ast.Attribute) and node.attr in NAMES)


def _keys(node: ast.AST) -> Iterator[str]:
    """The keys of the dictionaries in an expression; of a dictionary in a dictionary the outer ones only."""
    inner: list[Any] = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.Dict):
        yield from (key for each in node.keys if each is not None and (key := _text(each)))
        inner = [value for key, value in zip(node.keys, node.values, strict=True) if key is None]
    key = node.key if isinstance(node, ast.DictComp) else node.slice if _is_store(node) else None
    if key is not None and (name := _text(key)):
        yield name
    for each in inner:
        yield from _keys(each)


def _is_store(node: ast.AST) -> TypeGuard[ast.Subscript]:
    return isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "<>" for part in node.values)
    return ""
