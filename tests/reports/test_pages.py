"""The report's files: their content, and that untrusted text stays text."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from distill.records import Cost, Ragged, Traces, UserError
from distill.reports import (
    arm_plots,
    columns,
    comparison,
    cost_blocks,
    curves,
    headline,
    pages,
    report_blocks,
    stage_blocks,
    svg,
    terminal,
    wording,
)
from distill.reports import arms as arms_module
from distill.reports.arm_groups import flipped, groups
from distill.reports.arms import ArmResults
from distill.reports.run_report import ArmRow, RunReport, StageRow, comparison_row, view

HOSTILE = (
    "<script>alert(1)</script> | `tick` ```` four\n```\n# not a heading\n"
    "[link](javascript:alert(1)) **bold** \x1b[31mred\u202e &amp; \ud800 $x$"
)


def traces(chance: float, seed: int, problems: int = 40, samples: int = 2) -> Traces:
    """Judged completions of one model; problem ids are reversed for odd seeds."""
    rng = np.random.default_rng(seed)
    ids = [f"p{i:03d}" for i in range(problems)][:: -1 if seed % 2 else 1]
    keys = [(key, s) for key in ids for s in range(samples)]
    right = [bool(rng.random() < chance) for _ in keys]
    ragged = Ragged.from_rows([np.arange(5 + i % 3) for i in range(len(keys))], np.int64)
    return Traces(
        trace_id=[f"{key}-{s}" for key, s in keys],
        problem_id=[key for key, _ in keys],
        sample=np.array([s for _, s in keys]),
        messages=[({"role": "user", "content": "?"},)] * len(keys),
        completion=[f"{HOSTILE} {ok}" for ok in right],
        answer=["7" if ok else None for ok in right],
        gold=["7"] * len(keys),
        prompt_ids=ragged,
        completion_ids=ragged,
        logprob=ragged,
        top=None,
        reward=[float(ok) for ok in right],
        rewards={},
        correct=list(right),
        finish_reason=["stop" if ok else "length" for ok in right],
    )


def arm(results: ArmResults, role: str, cost: Cost, stage: str) -> ArmRow:
    student = view(cost)
    more = view(cost + Cost(tokens_generated=90_000, flops=2.5e13, wall_seconds=61))
    return {
        "stage": stage,
        "role": role,  # type: ignore[typeddict-item]
        **arms_module.score(results, (1, 2)),  # type: ignore[typeddict-item]
        "seeds": 1,
        **student,
        "cost": {"student": student, "with_inference": more, "with_teacher": more},
    }


@pytest.fixture(scope="module")
def report() -> RunReport:
    results = {
        "teacher": ArmResults.collect([traces(0.7, 1)]),
        "kl": ArmResults.collect([traces(0.6, 2)]),
        "sft|<b>": ArmResults.collect([traces(0.2, 3)]),
    }
    roles = {"teacher": "teacher"}
    cost = Cost(tokens_trained=120_000, flops=8.1e13, wall_seconds=95.4, bytes_written=5_000_000)
    pairs = comparison.compare_trained({name: {0: one.correct} for name, one in results.items()})
    stage: StageRow = {
        "name": "kl",
        "kind": "train",
        "status": "done",
        "seconds": 95.4,
        "cost": {"tokens_trained": 120_000, "flops": 8.1e13, "bytes_written": 5_000_000},
        "predicted": {
            "tokens": 110_000,
            "bytes": 0,
            "flops": 7.5e13,
            "seconds": 80.0,
            "memory": 4e9,
        },
        "metrics": {"peak_memory": 5e9},
        "curves": {"loss": [2.0, 1.5, 1.2, 1.1, 1.0]},
    }
    return {
        "name": "quickstart",
        "description": "Sums, learned from a teacher's distribution.",
        "created": "2026-01-01T00:00:00Z",
        "seed": 17,
        "task": "sums",
        "environment": {
            "versions": {"torch": "2.10"},
            "machine": {"cores": 2, "odd": float("nan")},
        },
        "stages": [stage, {**stage, "name": "sft"}],
        "arms": {name: arm(one, roles.get(name, "student"), cost, name) for name, one in results.items()},
        "comparisons": [comparison_row(a, b, pair) for (a, b), pair in pairs.items()],
        "examples": arms_module.examples(results, "kl", "sft|<b>", {"p000": HOSTILE}, num=2),
        "recipe": "name: quickstart\n",
        "reproduce": ["distill run recipes/quickstart.yaml"],
        "notes": ["One seed."],
    }


# ----------------------------------------------------------------------------------------- scores, examples


def test_scores_of_traces() -> None:
    scores = arms_module.score(ArmResults.collect([traces(0.5, 2, problems=4)]), (1, 2))
    flags = np.array(traces(0.5, 2, problems=4).correct).reshape(4, 2)
    assert scores["accuracy"]["value"] == flags.mean()
    assert scores["pass_at"]["2"]["value"] == flags.any(1).mean()
    assert scores["maj_at"]["2"]["value"] == flags.any(1).mean()  # wrong ones gave no answer
    assert scores["clipped_ratio"] == 1 - flags.mean()
    assert (scores["problems"], scores["samples"], scores["unjudged"]) == (4, 2, 0)


def test_what_could_not_be_judged_counts_as_wrong_and_is_shown(report: RunReport) -> None:
    """An arm does not gain by answers that no judge can read, alone, over seeds or against another arm."""
    block = traces(0.5, 2, problems=40)
    right = np.array(block.correct)
    block.correct[:] = [None if n % 3 == 0 else bool(ok) for n, ok in enumerate(right)]
    unjudged = sum(one is None for one in block.correct)
    kept = np.array([one is True for one in block.correct]).reshape(40, 2)
    results = ArmResults.collect([block])
    scores = arms_module.score(results, (1, 2))
    assert scores["accuracy"]["value"] == kept.mean()
    assert scores["accuracy"]["n"] == 40
    assert scores["pass_at"]["2"]["value"] == kept.any(1).mean()
    assert scores["unjudged"] == unjudged > 20
    seeds = arms_module.score_seeds({1: results, 2: results}, (1, 2))
    assert seeds["accuracy"]["value"] == kept.mean()
    assert seeds["unjudged"] == 2 * unjudged
    whole: RunReport = {**report, "arms": {"kl": arm(results, "student", Cost(), "kl")}}
    table = report_blocks.accuracy_table(whole["arms"])
    column = table.header.index("not judged (wrong)")
    assert table.rows[0][column] == str(unjudged)
    block.correct[:] = [None] * len(right)
    with pytest.raises(ValueError, match="no problem was judged"):
        arms_module.score(ArmResults.collect([block]))


def test_scores_over_seeds_by_hand() -> None:
    runs = {seed: ArmResults.collect([traces(0.5, seed, problems=30)]) for seed in (1, 2, 3)}
    scores = arms_module.score_seeds(runs, (1, 2))
    flags = {seed: np.array(traces(0.5, seed, problems=30).correct).reshape(30, 2) for seed in runs}
    flags = {seed: f[::-1] if seed % 2 else f for seed, f in flags.items()}  # by problem id
    every = np.stack(list(flags.values()))
    assert scores["accuracy"]["value"] == pytest.approx(every.mean())
    assert scores["pass_at"]["2"]["value"] == pytest.approx(every.any(2).mean())
    assert scores["maj_at"]["2"]["value"] == pytest.approx(every.any(2).mean())
    assert scores["clipped_ratio"] == pytest.approx(1 - every.mean())
    assert [one["accuracy"]["value"] for one in scores["by_seed"]] == [f.mean() for f in flags.values()]
    assert (scores["seeds"], scores["samples"], scores["problems"]) == (3, 2, 30)
    other = ArmResults.collect([traces(0.5, 2, problems=29)])
    with pytest.raises(UserError, match="different problems"):
        arms_module.score_seeds({**runs, 4: other})


def test_blocks_in_any_order_give_the_same_results() -> None:
    whole = traces(0.5, 2)
    assert ArmResults.collect([whole]).correct == ArmResults.collect(iter([whole])).correct
    by_id = ArmResults.collect([whole]).samples["p003"]
    assert [one.sample for one in by_id] == [0, 1]


def test_examples_show_why_each_side_won(report: RunReport) -> None:
    assert {(e["won_by"], e["lost_by"]) for e in report["examples"]} >= {("kl", "sft|<b>")}
    for example in report["examples"]:
        shown = {answer["arm"]: answer["correct"] for answer in example["answers"]}
        assert shown[example["won_by"]] is True
        assert shown[example["lost_by"]] is False
        assert set(shown) == set(report["arms"])


# ---------------------------------------------------------------------------------------------- files


def test_report_json_has_the_declared_fields(report: RunReport, tmp_path: Path) -> None:
    paths = pages.write_report(report, tmp_path / "run")
    plots = {"accuracy", "pass_at_k", "compute_student", "compute_with_inference", "compute_with_teacher",
             "kl_loss", "sft_loss"}  # fmt: skip
    assert set(paths) >= {
        "report.json",
        "report.md",
        "report.html",
        *(f"plots/{p}.svg" for p in plots),
    }
    on_disk = (p for p in (tmp_path / "run").rglob("*") if p.is_file())
    assert sorted(p.relative_to(tmp_path / "run").as_posix() for p in on_disk) == sorted(paths)
    tree = json.loads(paths["report.json"].read_text(), parse_constant=pytest.fail)
    for one in tree["arms"].values():
        assert {"value", "low", "high", "n"} <= set(one["accuracy"])
        assert one["accuracy"]["low"] <= one["accuracy"]["value"] <= one["accuracy"]["high"]
        assert one["accuracy"]["n"] == 40
        assert all(isinstance(one[key], (int, float)) for key in ("tokens", "flops", "seconds"))
        assert set(one["cost"]) == {"student", "with_inference", "with_teacher"}
    assert tree["verdict"] == headline.verdict(report)
    assert tree["environment"]["machine"]["odd"] is None
    again = pages.read_report(paths["report.json"])
    pages.write_report(again, tmp_path / "again")
    assert (tmp_path / "again/report.html").read_text() == paths["report.html"].read_text().replace(
        '<td class="l">nan</td>', '<td class="l">None</td>'
    )


def test_hostile_text_stays_text_in_markdown(report: RunReport) -> None:
    text = pages.markdown(report["name"], report_blocks.blocks(report))
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    inline = [child for token in tokens for child in token.children or []]
    assert not [t for t in tokens if t.type == "html_block"]
    assert not [t for t in inline if t.type in ("html_inline", "link_open", "strong_open")]
    headings = [t.map for t in tokens if t.type == "heading_open"]
    assert not any(
        tokens[i + 1].content.startswith("not a heading") for i, t in enumerate(tokens) if t.type == "heading_open"
    )
    assert headings
    fences = [t for t in tokens if t.type == "fence"]
    assert any("# not a heading" in t.content and "<script>" in t.content for t in fences)
    rows = [t for t in tokens if t.type == "tr_open"]
    cells = [t for t in tokens if t.type in ("td_open", "th_open")]
    assert rows
    assert len(cells) == sum(
        len(t.header) * (len(t.rows) + 1) for t in report_blocks.blocks(report) if isinstance(t, report_blocks.Table)
    )
    assert "\x1b" not in text
    assert "\u202e" not in text


@pytest.mark.parametrize(
    "text",
    ["a|b", "<b>&lt;", "`x`", "1. one", "- item", "# head", "*a* _b_", "a\n\nb", "\\|", "---"],
)
def test_escaped_markdown_renders_as_the_original_text(text: str) -> None:
    tokens = MarkdownIt("commonmark").enable("table").parse(pages.escape_markdown(text))
    assert [t.type for t in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    shown = "".join(child.content for child in tokens[1].children or [])
    assert shown == " ".join(text.split())


SVG = "{http://www.w3.org/2000/svg}"


class Page(HTMLParser):
    """Collects tags, and the text outside style elements."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_one_file_without_scripts(report: RunReport) -> None:
    text = pages.html(report["name"], report_blocks.blocks(report))
    page = Page()
    page.feed(text)
    assert "script" not in page.tags
    assert not {"src", "onclick", "onerror"} & {name for name, _ in page.attributes}
    assert all(
        value is not None and (value == "data:," or value.startswith("#s"))
        for name, value in page.attributes
        if name == "href"
    )
    assert "<script>alert(1)</script>" in "".join(page.text)
    assert not re.search(r"url\(|@import", text)
    assert "\x1b" not in text


class Cells(HTMLParser):
    """Collects the rows of a page's tables, and the texts of its code blocks and headings."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.codes: list[str] = []
        self.headings: list[str] = []
        self.open: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "code":
            self.codes.append("")
        elif tag == "h2":
            self.headings.append("")
        self.open = tag if tag in ("td", "th", "code", "h2") else self.open

    def handle_endtag(self, tag: str) -> None:
        if tag == self.open:
            self.open = None

    def handle_data(self, data: str) -> None:
        if self.open in ("td", "th", "i"):
            self.rows[-1][-1] += data
        elif self.open == "code":
            self.codes[-1] += data
        elif self.open == "h2":
            self.headings[-1] += data


def test_markdown_and_html_agree(report: RunReport) -> None:
    """Both are parsed: they have the same headings, table cells and completions."""
    content_blocks = report_blocks.blocks(report)
    html = pages.html(report["name"], content_blocks)
    page = Cells()
    page.feed(html)
    tokens = MarkdownIt("commonmark").enable("table").parse(pages.markdown(report["name"], content_blocks))
    rows: list[list[str]] = []
    headings, fences = [], []
    for i, token in enumerate(tokens):
        if token.type == "tr_open":
            rows.append([])
        elif token.type in ("td_open", "th_open"):
            rows[-1].append("".join(c.content for c in tokens[i + 1].children or []))
        elif token.type == "heading_open" and token.tag == "h2":
            headings.append("".join(c.content for c in tokens[i + 1].children or []))
        elif token.type == "fence":
            fences.append(token.content.rstrip("\n"))
    assert headings == page.headings
    assert [[" ".join(c.split()) for c in row] for row in page.rows] == rows
    assert len(rows) > 10
    assert sorted(fences) == sorted(code.rstrip() for code in page.codes)
    assert headline.verdict(report) in " ".join(
        re.sub("<[^>]*>", "", html).replace("&lt;", "<").replace("&gt;", ">").split()
    )


def test_predicted_and_measured_stand_side_by_side_in_one_unit(report: RunReport) -> None:
    table = stage_blocks.prediction_table(stage_blocks.rows_of(report["stages"]))
    assert len({*table.header}) == len(table.header)  # every × says of what
    assert table.header[1:7] == [
        "predicted time (min)", "time (min)", "time ×", "predicted memory (GB)", "memory (GB)", "memory ×",
    ]  # fmt: skip
    assert table.rows[0][1:7] == ["1.33", "1.59", "1.19", "4", "5", "1.25"]
    assert [row[4:7] for row in table.rows] == [["4", "5", "1.25"]] * 3  # both, and the most
    unmeasured = stage_blocks.rows_of([{**report["stages"][0], "metrics": {}}])
    assert stage_blocks.prediction_table(unmeasured).rows[0][4:7] == ["–", "–", "–"]


def test_copies_for_seeds_and_the_arms_of_a_comparison_are_a_row_each(report: RunReport) -> None:
    one = report["stages"][0]
    names = ["kl@1", "kl@2", "v.kl@1", "v.kl@2", "v", "rl@1"]
    stages: list[StageRow] = [{**one, "name": name} for name in names]
    stages.append({**one, "name": "rl@2", "status": "running"})
    rows = stage_blocks.rows_of(stages)
    assert [(row.name, row.status) for row in rows] == [
        ("kl, 2 seeds", "done"), ("v, 2 arms", "done"), ("v", "done"), ("rl@1", "done"), ("rl@2", "running"),
    ]  # fmt: skip
    assert rows[0].took["tokens"] == 240_000
    assert rows[0].took["memory"] == 5e9


@pytest.mark.parametrize(
    ("values", "unit", "cells"),
    [
        ([1.2e15, 3e12, 0.0, 2e9, None], "TFLOP", ["1,200.0", "3.0", "0", "<0.1", "–"]),
        ([9.0, 5.5], "FLOP", ["9.00", "5.50"]),
    ],
)
def test_a_column_of_amounts_has_one_unit(values: list[float | None], unit: str, cells: list[str]) -> None:
    assert columns.amounts(values, "FLOP") == (unit, cells)


@pytest.mark.parametrize(
    ("values", "unit", "cells"),
    [
        ([3.25, 60.0, None], "s", ["3.2", "60.0", "–"]),
        ([1.0, 600.0, -60.0], "min", ["<0.1", "10.0", "−1.0"]),
        ([7200.0, 36000.0], "h", ["2", "10"]),
    ],
)
def test_a_column_of_times_has_one_unit(values: list[float | None], unit: str, cells: list[str]) -> None:
    assert columns.times(values) == (unit, cells)


def test_the_plot_is_wellformed_and_ordered(report: RunReport) -> None:
    tree = ElementTree.fromstring(arm_plots.accuracy_svg(report["arms"]))
    names = [t.text for t in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert [n for n in names if n in report["arms"]] == ["teacher", "kl", "sft|<b>"]
    assert len([p for p in tree.iter(f"{SVG}path") if p.get("class") == "mark"]) == 3
    for line in tree.iter("{http://www.w3.org/2000/svg}line"):
        assert 0 <= float(line.get("x1", "0")) <= arm_plots.WIDE


# -------------------------------------------------------------------------------------- arms and their order


def test_the_tables_have_the_order_and_the_signs_of_the_chart(report: RunReport) -> None:
    """Best arm first in every table; a pair is the better arm minus the other, those of students first."""
    (group,) = groups({**report, "arms": dict(reversed(report["arms"].items()))})
    order = ["teacher", "kl", "sft|<b>"]
    assert list(group.arms) == order
    assert [row[0] for row in report_blocks.accuracy_table(group.arms).rows] == order
    assert [row[0] for row in cost_blocks.cost_table(group.arms).rows] == order
    table = report_blocks.comparison_table(group)
    assert [row[0] for row in table.rows] == ["kl − sft|<b>", "teacher − kl", "teacher − sft|<b>"]
    assert all(row[1].startswith("+") for row in table.rows)
    (turned,) = groups({**report, "comparisons": [flipped(row) for row in report["comparisons"]]})
    assert report_blocks.comparison_table(turned).rows == table.rows


def test_what_was_evaluated_otherwise_is_no_arm(report: RunReport) -> None:
    evaluations = {
        "signal": {"stages": ["signal"], "task": "sums", "split": "held_out", "problems": 48, "samples": 8,
                   "sampling": "temperature 1, at most 48 tokens", "main": False},
    }  # fmt: skip
    measured = {"signal": {**report["arms"]["teacher"], "evaluation": "signal"}}
    whole: RunReport = {**report, "evaluations": evaluations, "measurements": measured}  # type: ignore[typeddict-item]
    content = report_blocks.blocks(whole)
    tables = [block for block in content if isinstance(block, report_blocks.Table)]
    (table,) = (one for one in tables if one.header[0] == "measurement")
    assert table.rows[0][0] == "signal"
    assert "temperature 1, at most 48 tokens" in table.rows[0]
    assert not any("signal" in row[0] for one in tables if one is not table for row in one.rows)
    assert headline.verdict(whole) == headline.verdict(report)


def test_the_ledger_adds_up_and_names_who_shares(report: RunReport) -> None:
    ledger = [
        {
            "what": "stages",
            "stages": ["teacher"],
            "arms": ["kl", "sft", "both", "rl", "own"],
            "flops": 3e14,
            "seconds": 60.0,
        },
        {"what": "stages", "stages": ["kl"], "arms": ["kl"], "flops": 1e14, "seconds": 30.0},
        {"what": "unused", "stages": ["tried"], "arms": [], "flops": 0.0, "seconds": 1.0},
        {"what": "evaluation", "stages": ["verdict"], "arms": [], "flops": 1e14, "seconds": 9.0},
    ]
    table = cost_blocks.ledger_blocks({**report, "ledger": ledger})[1]  # type: ignore[typeddict-item]
    assert isinstance(table, report_blocks.Table)
    assert table.header == ["stages", "needed by", "compute (TFLOP)", "share", "time (s)"]
    assert [row[1] for row in table.rows] == ["kl, sft, both and 2 more", "kl", "no arm", "evaluation", ""]
    assert [row[2:] for row in table.rows] == [
        ["300", "60%", "60"], ["100", "20%", "30"], ["0", "0%", "1"], ["100", "20%", "9"], ["500", "100%", "100"],
    ]  # fmt: skip


def test_an_unfinished_run_shows_its_stages_first(report: RunReport) -> None:
    stages: list[StageRow] = [
        report["stages"][0],
        {**report["stages"][1], "status": "failed", "error": "no trace is left"},
    ]
    content = report_blocks.blocks({**report, "stages": stages})
    headings = [block.text for block in content if isinstance(block, report_blocks.Heading)]
    assert headings[0] == "Stages"
    assert headings.count("Stages") == 1
    assert "sft failed: no trace is left" in [block.text for block in content if isinstance(block, report_blocks.Text)]


def test_the_minus_sign_is_no_hyphen(report: RunReport) -> None:
    """A hyphen before a digit stands in no cell, no sentence and no label."""
    worse = [flipped(row) for row in report["comparisons"]]
    content = report_blocks.blocks(
        {**report, "comparisons": worse, "description": "", "examples": [], "recipe": "", "created": ""}
    )
    texts = [block.text for block in content if isinstance(block, report_blocks.Text)]
    texts += [cell for block in content if isinstance(block, report_blocks.Table) for row in block.rows for cell in row]
    negative = {"loss": [-0.5, -1.5, -1e-4]}
    drawn = curves.panels({**report["stages"][0], "curves": negative})  # type: ignore[typeddict-item]
    texts += [label.text or "" for label in ElementTree.fromstring(drawn[0][2]).iter(f"{SVG}text")]
    assert any("−1.5" in text or "−1" in text for text in texts)
    assert not [text for text in texts if re.search(r"(?<!\w)-\d", text)]
    assert wording.span(-0.021 * 100, 9.24) == "−2.1 to 9.2"
    assert wording.span(12.54, 24.7) == "12.5–24.7"
    assert [wording.minus(text) for text in ("-0.0", "-0.04", "-0", "5e-04", "-10")] == [
        "0.0",
        "−0.04",
        "0",
        "5e−04",
        "−10",
    ]


def test_a_run_without_arms_still_reports(report: RunReport, tmp_path: Path) -> None:
    bare: RunReport = {**report, "arms": {}, "comparisons": [], "examples": []}
    assert "plots/accuracy.svg" not in pages.write_report(bare, tmp_path)
    assert "All 2 stages are done. This recipe evaluates no model." in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.97, "10 s"), (99.6, "1 min 40 s"), (3725, "1 h 02 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert wording.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (999.9, "1 kB"), (81e12, "81 TB"), (1234567, "1.23 MB")],
)
def test_scaled_numbers(value: float, text: str) -> None:
    assert wording.scaled(value, "B") == text


# ---------------------------------------------------------------------------------------------- terminal


def test_sparkline() -> None:
    assert terminal.sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert terminal.sparkline([3, 3, 3]) == "▁▁▁"
    assert terminal.sparkline([1, float("nan"), None, 2]) == "▁  █"
    assert terminal.sparkline([]) == ""
    assert len(terminal.sparkline(list(range(1000)), width=40)) == 40


def test_interval_bar() -> None:
    bar = terminal.interval_bar({"low": 0.2, "value": 0.5, "high": 0.7}, width=10)
    assert bar == "··├──●─┤··"
    assert terminal.interval_bar({"low": 0, "value": 1, "high": 1}, width=4) == "├──●"


def test_show_prints_a_run_and_no_control_characters(report: RunReport) -> None:
    out = io.StringIO()
    hostile: RunReport = {**report, "name": "[red]x[/red]\x1b[2J"}
    terminal.show(hostile, Console(file=out, width=140, color_system=None))
    text = out.getvalue()
    assert "[red]x[/red]" in text
    assert "\x1b" not in text
    for expected in ("kl", "sft|<b>", "●", "loss", "▁", "no claim about"):
        assert expected in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_show_fits_the_terminal(report: RunReport, width: int) -> None:
    """Nothing is wrapped in a table; narrow terminals lose columns, but no name and no interval."""
    out = io.StringIO()
    stages: list[StageRow] = [{**report["stages"][0], "name": f"stage_with_a_long_name@{n}"} for n in (1, 2)]
    whole: RunReport = {**report, "verdict": "v", "stages": stages, "measurements": {"signal": report["arms"]["kl"]}}
    terminal.show(whole, Console(file=out, width=width, color_system=None))
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    for name, arm in report["arms"].items():
        interval = wording.interval_text(arm["accuracy"])
        assert len([line for line in lines if line.startswith(f"{name} ") and interval in line]) == 1
    assert any(line.startswith("stage_with_a_long_name, 2 seeds") and "done" in line for line in lines)
    assert any("kl − sft|<b>" in line and "+" in line for line in lines)
    assert ("with teacher" in out.getvalue()) == (width == 120)


# ---------------------------------------------------------------------------------------- compute, curves


def with_points(report: RunReport) -> RunReport:
    arm = report["arms"]["kl"]
    end = arm["flops"]
    points = [
        {"flops": end * f, "accuracy": 0.3 * f, "low": 0.3 * f - 0.05, "high": 0.3 * f + 0.05} for f in (0.5, 0.2)
    ]
    return {**report, "arms": {**report["arms"], "kl": {**arm, "snapshots": points}}}  # type: ignore[typeddict-item]


def marks(svg: str, name: str) -> list[tuple[float, float]]:
    """The positions of an arm's marks."""
    tree = ElementTree.fromstring(svg)
    groups = [g for g in tree.iter(f"{SVG}g") if (g.findtext(f"{SVG}title") or "").startswith(name)]
    found = []
    for path in groups[0].iter(f"{SVG}path"):
        if path.get("class") == "bar" or path.get("class") == "bar small":
            x, low, high = re.match(r"M([\d.]+) ([\d.]+)V([\d.]+)", path.get("d", "")).groups()  # type: ignore[union-attr]
            found.append((float(x), (float(low) + float(high)) / 2))
    return found


def test_snapshots_are_a_curve_in_order_of_compute(report: RunReport) -> None:
    arms = with_points(report)["arms"]
    x = [at for at, _ in marks(arm_plots.compute_svg(arms, "student"), "kl")]
    assert len(x) == 3
    assert x == sorted(x)
    # Logarithmic: from a fifth to a half of the budget is the same distance as any factor of 2.5.
    ratio = (x[1] - x[0]) / (x[2] - x[1])
    assert ratio == pytest.approx(np.log(2.5) / np.log(2), rel=0.02)
    # The cost of the teacher's inference counts from the first snapshot on, so the curve is compressed.
    shifted = [at for at, _ in marks(arm_plots.compute_svg(arms, "with_inference"), "kl")]
    flops, more = arms["kl"]["flops"], arms["kl"]["cost"]["with_inference"]["flops"]
    expected = np.log((more) / (more - 0.5 * flops)) / np.log((more - 0.5 * flops) / (more - 0.8 * flops))
    assert (shifted[2] - shifted[1]) / (shifted[1] - shifted[0]) == pytest.approx(expected, rel=0.03)


def test_an_arm_without_compute_is_a_horizontal_line(report: RunReport) -> None:
    free = {
        **report["arms"]["teacher"],
        "cost": {v: view(Cost()) for v in report["arms"]["teacher"]["cost"]},
        "flops": 0.0,
    }
    svg = arm_plots.compute_svg({**report["arms"], "teacher": free}, "student")  # type: ignore[dict-item]
    assert svg.count('class="level"') == 1
    assert "teacher (no compute)" in svg
    everything = arm_plots.compute_svg({"teacher": free}, "student")  # type: ignore[dict-item]
    ElementTree.fromstring(everything)


def test_the_axis_of_good_arms_does_not_begin_at_zero(report: RunReport) -> None:
    """Arms between 94% and 100% are told apart, the axis says where it begins, and a level's label avoids the marks."""
    base = report["arms"]["kl"]
    near = {"value": 0.96, "low": 0.94, "high": 0.98, "n": 512}
    free = {**base, "accuracy": near, "cost": {view: {**row, "flops": 0.0} for view, row in base["cost"].items()}}
    arms = {"kl": {**base, "accuracy": {**near, "value": 0.99, "low": 0.97, "high": 1.0}}, "start": free}
    tree = ElementTree.fromstring(arm_plots.accuracy_svg(arms))  # type: ignore[arg-type]
    texts = [one.text for one in tree.iter(f"{SVG}text")]
    assert "accuracy from 90%, 95% intervals" in texts
    assert "90%" in texts
    assert "0%" not in texts
    drawn = ElementTree.fromstring(arm_plots.compute_svg(arms, "student", arm_plots.NARROW))  # type: ignore[arg-type]
    (label,) = (one for one in drawn.iter(f"{SVG}text") if one.text == "start (no compute)")
    left, y = float(label.get("x", "0")), float(label.get("y", "0"))
    ((at, middle),) = marks(arm_plots.compute_svg(arms, "student", arm_plots.NARROW), "kl")  # type: ignore[arg-type]
    assert not (left < at < left + 18 * svg.CHAR and abs(y - middle) < 12)


@pytest.mark.parametrize("width", [arm_plots.WIDE, arm_plots.NARROW])
def test_labels_of_many_arms_do_not_cover_one_another(report: RunReport, width: int) -> None:
    arms = {}
    for n in range(10):
        base = report["arms"]["kl"]
        value = 0.4 + 0.01 * n
        interval = {"value": value, "low": value - 0.05, "high": value + 0.05, "n": 40}
        cost = {v: {"tokens": 1.0, "flops": 1e14 * (1 + 0.1 * n), "seconds": 1.0} for v in base["cost"]}
        arms[f"arm {n}"] = {
            **base,
            "accuracy": interval,
            "flops": 1e14 * (1 + 0.1 * n),
            "cost": cost,
        }
    for drawn in (arm_plots.compute_svg(arms, "student", width), arm_plots.pass_svg(arms, width)):  # type: ignore[arg-type]
        tree = ElementTree.fromstring(drawn)
        texts = [t for t in tree.iter(f"{SVG}text") if (t.text or "").startswith("arm ")]
        assert len(texts) == 10
        at = [(float(t.get("x", "0")), float(t.get("y", "0"))) for t in texts]
        for i, (xa, ya) in enumerate(at):
            assert 0 <= xa < width
            for xb, yb in at[i + 1 :]:
                assert abs(ya - yb) > 11 or abs(xa - xb) > 30


def test_curves_show_all_logged_quantities() -> None:
    stage: StageRow = {
        "name": "rl", "kind": "grpo", "status": "done", "seconds": 1.0, "cost": {}, "curve_steps": [1.0, 2.0, 3.0],
        "curves": {"reward": [0.1, None, 0.4], "reward/accuracy": [0.0, 0.1, 0.3], "reward/<b>": [0.1, 0.1, 0.1],
                   "length": [50.0, 60.0, 70.0], "lr": [1.0, 1.0, 1.0], "kl_ref": [None, None, None]},
    }  # fmt: skip
    found = {stem: svg for stem, _, svg in curves.panels(stage)}
    assert set(found) == {"reward", "length"}
    tree = ElementTree.fromstring(found["reward"])
    lines = [p for p in tree.iter(f"{SVG}path") if p.get("class") == "line"]
    assert len(lines) == 3
    assert {"accuracy", "<b>"} <= {t.text for t in tree.iter(f"{SVG}text")}
    assert lines[-1].get("d", "").count("M") == 2  # a gap where nothing was logged


def test_panels_that_say_nothing_or_the_same_twice_are_left_out_and_named() -> None:
    stage: StageRow = {
        "name": "kl", "kind": "train", "status": "done", "seconds": 1.0, "cost": {}, "curve_steps": [1.0, 2.0],
        "curves": {"loss": [2.0, 1.0], "kl": [2.0001, 1.00005], "label_nll": [2.5, 1.5], "clipped_ratio": [0.0, 0.0],
                   "kl_engine": [2e-7, -1e-7], "frac_reward_zero_std": [0.25, 0.25]},
    }  # fmt: skip
    assert [(stem, label) for stem, label, _ in curves.panels(stage)] == [
        ("loss", "kl: loss = KL to the teacher (nats)"), ("nll", "kl: label NLL (nats)"),
    ]  # fmt: skip
    assert curves.left_out(stage) == [
        "share truncated 0", "groups with equal rewards 0.25", "KL, engine to trainer (nats) at most 2e−7",
    ]  # fmt: skip
    noise = {**stage, "curves": {"loss": [1e-7, -3e-8]}}
    assert curves.panels(noise) == []  # type: ignore[arg-type]


def test_title_values_and_axis_of_a_panel_do_not_cover_one_another() -> None:
    """The title and the values have a line each above the plot, and the axis says that it counts steps."""
    stage: StageRow = {
        "name": "kl", "kind": "train", "status": "done", "seconds": 1.0, "cost": {}, "curve_steps": [1.0, 2.0],
        "curves": {"agreement": [0.25, 0.75], "reward": [0.0, 1.0], "reward/think_format": [0.5, 0.9], "reward/accuracy": [0.5, 0.91]},
    }  # fmt: skip
    for _, label, drawn in curves.panels(stage):
        texts = list(ElementTree.fromstring(drawn).iter(f"{SVG}text"))
        title = label.partition(": ")[2]
        places = {one.text: float(one.get("y", "0")) for one in texts}
        assert len(title) * 6.6 < curves.WIDTH
        assert (
            places[title] + 12
            <= places["from 0.25 to 0.75" if "reward" not in title else "from 0 to 1"]
            < curves.TOP - 8
        )
        assert places["step"] > curves.HEIGHT - curves.BOTTOM + 20
        ends = sorted(y for text, y in places.items() if text in ("think_format", "accuracy"))
        assert not ends or ends[1] - ends[0] >= 11


def test_copies_of_a_stage_share_a_panel_with_a_line_a_seed() -> None:
    def copy(seed: int, values: list[float]) -> StageRow:
        return {
            "name": f"rl@{seed}", "kind": "grpo", "status": "done", "seconds": 1.0, "cost": {},
            "curve_steps": [float(n + 1) for n in range(len(values))], "curves": {"reward": values},
        }  # fmt: skip

    stages = [copy(1, [0.1, 0.2]), copy(2, [0.1, 0.3, 0.5])]
    blocks = report_blocks.curve_blocks([*stages, copy(1, [0.5]) | {"name": "other"}])
    assert [getattr(block, "title", "") for block in blocks[1:]] == [
        "rl (grpo, 2 training seeds)",
        "other (grpo)",
    ]
    (found,) = curves.seed_panels(stages)
    assert (found[0], found[1]) == ("reward", "rl: reward")
    tree = ElementTree.fromstring(found[2])
    assert len([p for p in tree.iter(f"{SVG}path") if p.get("class") == "line seed"]) == 2
    assert "2 seeds; mean of the last 0.35" in {t.text for t in tree.iter(f"{SVG}text")}


def test_smoothing_by_hand() -> None:
    assert curves.smooth([0.0, 3.0, 6.0, None], 3) == [1.5, 3.0, 4.5, 6.0]
    assert curves.smooth([None, None], 1) == [None, None]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0, 0.3, [0, 0.1, 0.2, 0.3]), (3, 3, [3])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert svg.linear_ticks(low, high) == expected


def test_log_ticks_are_round_and_inside() -> None:
    assert svg.log_ticks(1e13, 1e15) == [1e13, 3e13, 1e14, 3e14, 1e15]
    assert svg.log_ticks(1.1e14, 2.2e14) == [1.5e14, 2e14]


# ----------------------------------------------------------------------------------------- in the browser


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_in_a_browser(
    report: RunReport, tmp_path: Path, visit: Callable[..., Any], width: int, scheme: str
) -> None:
    paths = pages.write_report(with_points(report), tmp_path)
    assert paths["report.html"].stat().st_size < 5_000_000
    page = visit(paths["report.html"], width, scheme)
    assert page.title() == "quickstart – distill report"
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    shown = "svg[role=img]:visible"
    widths = page.locator(shown).evaluate_all("all => all.map(one => one.getBoundingClientRect().width)")
    assert widths
    assert all(w <= width for w in widths)
    small = page.locator(shown).evaluate_all(
        "all => Math.min(...all.flatMap(s => [...s.querySelectorAll('text')]).map(t => t.getBoundingClientRect().height))"
    )
    assert small >= 9
    views = page.locator(".views figure")
    assert [views.nth(n).is_visible() for n in range(views.count())][:2] == [True, False]
    page.focus(".views input >> nth=0")
    page.keyboard.press("ArrowRight")
    assert [views.nth(n).is_visible() for n in range(views.count())][:2] == [False, True]
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert "<script>alert(1)</script>" in page.locator("details[open]").first.inner_text()
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 21, 23)")
    # A table that is wider than the page shows a shadow at the side where it goes on; the name of the row stays in sight.
    assert "gradient" in page.evaluate("getComputedStyle(document.querySelector('.table')).backgroundImage")
    first = page.evaluate("getComputedStyle(document.querySelector('.table:not(.stacked) td')).position")
    assert first == ("sticky" if width < 640 else "static")
