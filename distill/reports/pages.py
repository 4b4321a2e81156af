"""Write a run's report: report.json, report.md, report.html and plots/*.svg, each file atomically.

Text from models and data sets is untrusted. In Markdown it is put in fences longer than any run of backticks inside, in
HTML it is escaped, and control characters and bidirectional overrides are replaced.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import numpy as np
from markupsafe import Markup, escape

from distill.files import read_json, write_atomic
from distill.printable import printable
from distill.reports.block_kinds import (
    Answer,
    Block,
    Code,
    Figure,
    Folded,
    Heading,
    Panels,
    Table,
    Text,
    Views,
)
from distill.reports.headline import verdict
from distill.reports.report_blocks import blocks
from distill.reports.run_report import RunReport

_MARKUP = re.compile(r"[\\`*|~$]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])|\[(?=\^)|\](?=[(\[:])|<(?=[A-Za-z/!?])|&(?=#?\w+;)")
"""Characters that are markup in Markdown at their place: a closing bracket only before a link, and so on."""
_INTERVAL = re.compile(r"\[[−+]?[\d.]+, [−+]?[\d.]+\]$")
_BLOCK_START = re.compile(r"^(\d*)([-+.)>=#])(?=\s|$|[-=#>])")


def write_report(report: RunReport, folder: str | Path) -> dict[str, Path]:
    """Write all files of a report into a folder; return their paths by name."""
    folder = Path(folder)
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    full: RunReport = {**report, "verdict": verdict(report)}
    content = blocks(full)
    texts = {figure.file: figure.svg for figure in figures(content)}
    texts["report.md"] = markdown(full["name"], content)
    texts["report.html"] = html(full["name"], content)
    # Last, because other programs wait for this file.
    texts["report.json"] = to_json(full)
    return {name: write_atomic(folder / name, text) for name, text in texts.items()}


def figures(content: list[Block]) -> list[Figure]:
    """All figures in the blocks of a report, in order."""
    found: list[Figure] = []
    for block in content:
        if isinstance(block, Figure):
            found.append(block)
        elif isinstance(block, Views | Panels):
            found += block.figures
    return found


def read_report(path: str | Path) -> RunReport:
    """Read a report.json."""
    report: RunReport = read_json(Path(path), "`distill run` writes it anew.")
    return report


# ------------------------------------------------------------------------------------------------- JSON


def to_json(report: Mapping[str, Any]) -> str:
    """Strict ASCII JSON; non-finite numbers become null."""
    return json.dumps(_plain(report), indent=2, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


# --------------------------------------------------------------------------------------------- Markdown


def escape_cell(text: str) -> str:
    """Escape plain text for use inside a line of Markdown; line breaks become spaces."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(printable(text).split()))


def escape_markdown(text: str) -> str:
    """Escape plain text for a line of its own: also prevents lists, headings, quotations and rules."""
    return _BLOCK_START.sub(r"\1\\\2", escape_cell(text))


def fence(text: str, language: str = "text") -> str:
    """Return a code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{printable(text).rstrip()}\n{ticks}"


def markdown(title: str, content: list[Block]) -> str:
    """The blocks as Markdown under a title."""
    parts = [f"# {escape_markdown(title)}"]
    for block in content:
        match block:
            case Heading(text):
                parts.append(f"## {escape_markdown(text)}")
            case Text(text):
                parts.append(escape_markdown(text))
            case Table():
                parts.append(_markdown_table(block))
            case Code(text, language):
                parts.append(fence(text, language))
            case Figure():
                parts.append(_markdown_image(block))
            case Views(_, inside):
                for figure in inside:
                    parts += [escape_markdown(f"{figure.label}:"), _markdown_image(figure)]
            case Panels(title, inside):
                parts += [f"### {escape_markdown(title)}", " ".join(map(_markdown_image, inside))]
            case Folded(summary, inner):
                parts.append(f"### {escape_markdown(summary)}")
                for one in inner:
                    parts += _markdown_inside(one)
    return "\n\n".join(parts) + "\n"


def _markdown_image(figure: Figure) -> str:
    alt = escape_cell(figure.alt).replace("[", "(").replace("]", ")")
    return f"![{alt}]({quote(figure.file)})"


def _markdown_inside(block: Text | Code | Answer) -> list[str]:
    match block:
        case Code(text, language):
            return [fence(text, language)]
        case Answer():
            return [escape_markdown(f"{block.arm}: {block.judged}"), fence(block.text)]
        case Text(text):
            return [escape_markdown(text)]


def _markdown_table(table: Table) -> str:
    """A Markdown table, padded so that it is also readable as plain text."""
    rows = [[escape_cell(cell) for cell in row] for row in (table.header, *table.rows)]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(table.header))]
    rule = ["-" * w if a == "l" else "-" * (w - 1) + ":" for w, a in zip(widths, table.align, strict=True)]
    lines = []
    for row in (rows[0], rule, *rows[1:]):
        cells = [
            cell.ljust(w) if a == "l" else cell.rjust(w) for cell, w, a in zip(row, widths, table.align, strict=True)
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------- HTML


def html(title: str, content: list[Block]) -> str:
    """The blocks as one self-contained HTML page, without scripts and without network access."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("distill.reports"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters["brackets"] = _quiet_brackets
    template = environment.get_template("report.html.jinja")
    verdict_text, *rest = content
    return template.render(title=title, verdict=verdict_text, blocks=rest) + "\n"


def _quiet_brackets(cell: str) -> Markup:
    """The HTML of a table cell; the brackets of an interval are shown in grey."""
    text = str(escape(printable(cell)))
    return Markup(_INTERVAL.sub(r"<i>\g<0></i>", text))
