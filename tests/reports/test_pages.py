"""The report's files: what they hold, and that hostile text stays text."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from distill.records import Cost, Ragged, Traces
from distill.reports import arms as arms_module
from distill.reports import compare, content, pages, plot, terminal, wording
from distill.reports.arms import ArmResults
from distill.reports.schema import ArmRow, RunReport, StageRow, comparison_row, view

HOSTILE = (
    "<script>alert(1)</script> | `tick` ```` four\n```\n# not a heading\n"
    "[link](javascript:alert(1)) **bold** \x1b[31mred\u202e &amp; \ud800 $x$"
)


def traces(chance: float, seed: int, problems: int = 40, samples: int = 2) -> Traces:
    """Judged completions of one model; problem ids run backwards for odd seeds."""
    rng = np.random.default_rng(seed)
    ids = [f"p{i:03d}" for i in range(problems)][:: -1 if seed % 2 else 1]
    keys = [(key, s) for key in ids for s in range(samples)]
    right = [bool(rng.random() < chance) for _ in keys]
    ragged = Ragged.from_rows([np.arange(5 + i % 3) for i in range(len(keys))], np.int64)
    return Traces(
        trace_id=[f"{key}-{s}" for key, s in keys],
        problem_id=[key for key, _ in keys],
        sample=np.array([s for _, s in keys]),
        messages=['[{"role": "user"}]'] * len(keys),
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
    pairs = compare.compare_arms({name: one.correct for name, one in results.items()})
    stage: StageRow = {
        "name": "kl",
        "kind": "train",
        "status": "done",
        "seconds": 95.4,
        "cost": {"tokens_trained": 120_000, "flops": 8.1e13, "bytes_written": 5_000_000},
        "predicted": {"tokens": 110_000, "bytes": 0, "flops": 7.5e13, "seconds": 80.0},
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
        "arms": {
            name: arm(one, roles.get(name, "student"), cost, name) for name, one in results.items()
        },
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
    assert scores["truncation"] == 1 - flags.mean()
    assert (scores["problems"], scores["samples"], scores["unjudged"]) == (4, 2, 0)


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


def test_report_json_has_what_is_promised(report: RunReport, tmp_path: Path) -> None:
    paths = pages.write_report(report, tmp_path / "run")
    assert set(paths) == {"report.json", "report.md", "report.html", "accuracy.svg"}
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == sorted(paths)
    tree = json.loads(paths["report.json"].read_text(), parse_constant=pytest.fail)
    for one in tree["arms"].values():
        assert {"value", "low", "high", "n"} <= set(one["accuracy"])
        assert one["accuracy"]["low"] <= one["accuracy"]["value"] <= one["accuracy"]["high"]
        assert one["accuracy"]["n"] == 40
        assert all(isinstance(one[key], (int, float)) for key in ("tokens", "flops", "seconds"))
        assert set(one["cost"]) == {"student", "with_inference", "with_teacher"}
    assert tree["verdict"] == wording.verdict(report)
    assert tree["environment"]["machine"]["odd"] is None
    again = pages.read_report(paths["report.json"])
    pages.write_report(again, tmp_path / "again")
    assert (tmp_path / "again/report.html").read_text() == paths["report.html"].read_text().replace(
        '<td class="l">nan</td>', '<td class="l">None</td>'
    )


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = pages.write_atomic(tmp_path / "report.md", "old")
    with pytest.raises(UnicodeEncodeError):
        pages.write_atomic(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_hostile_text_stays_text_in_markdown(report: RunReport) -> None:
    text = pages.markdown(report["name"], content.blocks(report))
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    inline = [child for token in tokens for child in token.children or []]
    assert not [t for t in tokens if t.type == "html_block"]
    assert not [t for t in inline if t.type in ("html_inline", "link_open", "strong_open")]
    headings = [t.map for t in tokens if t.type == "heading_open"]
    assert "not a heading" not in "".join(
        tokens[i + 1].content for i, t in enumerate(tokens) if t.type == "heading_open"
    )
    assert headings
    fences = [t for t in tokens if t.type == "fence"]
    assert any("# not a heading" in t.content and "<script>" in t.content for t in fences)
    rows = [t for t in tokens if t.type == "tr_open"]
    cells = [t for t in tokens if t.type in ("td_open", "th_open")]
    assert rows
    assert len(cells) == sum(
        len(t.header) * (len(t.rows) + 1)
        for t in content.blocks(report)
        if isinstance(t, content.Table)
    )
    assert "\x1b" not in text
    assert "\u202e" not in text


@pytest.mark.parametrize(
    "text",
    ["a|b", "<b>&lt;", "`x`", "1. one", "- item", "# head", "*a* _b_", "a\n\nb", "\\|", "---"],
)
def test_escaped_markdown_shows_what_went_in(text: str) -> None:
    tokens = MarkdownIt("commonmark").enable("table").parse(pages.escape_markdown(text))
    assert [t.type for t in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    shown = "".join(child.content for child in tokens[1].children or [])
    assert shown == " ".join(text.split())


class Page(HTMLParser):
    """Tags, and the text outside style."""

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
    text = pages.html(report["name"], content.blocks(report))
    page = Page()
    page.feed(text)
    assert "script" not in page.tags
    assert not {"src", "onclick", "onerror"} & {name for name, _ in page.attributes}
    assert all(value == "data:," for name, value in page.attributes if name == "href")
    assert "<script>alert(1)</script>" in "".join(page.text)
    assert not re.search(r"url\(|@import", text)
    assert "\x1b" not in text


def test_markdown_and_html_agree(report: RunReport) -> None:
    content_blocks = content.blocks(report)
    page = Page()
    page.feed(pages.html(report["name"], content_blocks))
    on_page = " ".join("".join(page.text).split())
    for block in content_blocks:
        if isinstance(block, content.Table):
            for cell in (cell for row in block.rows for cell in row):
                assert " ".join(cell.split()) in on_page
    assert wording.verdict(report) in on_page
    unescaped = pages.markdown(report["name"], content_blocks).replace("\\", "")
    assert wording.verdict(report).split(" (")[0].split("sft")[0] in unescaped


def test_the_plot_is_wellformed_and_ordered(report: RunReport) -> None:
    svg = plot.accuracy_svg(report["arms"])
    tree = ElementTree.fromstring(svg)
    names = [t.text for t in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert [n for n in names if n in report["arms"]] == ["teacher", "kl", "sft|<b>"]
    assert len(list(tree.iter("{http://www.w3.org/2000/svg}circle"))) == 3
    for line in tree.iter("{http://www.w3.org/2000/svg}line"):
        assert 0 <= float(line.get("x1", "0")) <= plot.WIDTH


# ---------------------------------------------------------------------------------------------- verdicts


def test_verdict_of_one_seed_claims_nothing_about_training(report: RunReport) -> None:
    sentence = wording.verdict(report)
    assert sentence.startswith("On 40 held-out problems kl ")
    assert "(teacher " in sentence
    assert "these two checkpoints differ" in sentence
    assert "says nothing about the ways of training" in sentence
    assert "supported" not in sentence
    swapped = {**report, "comparisons": [flip(row) for row in report["comparisons"]]}
    assert wording.verdict(swapped) == sentence  # type: ignore[arg-type]


def flip(row: dict) -> dict:  # type: ignore[type-arg]
    ends = row["difference"]
    turned = {**ends, "value": -ends["value"], "low": -ends["high"], "high": -ends["low"]}
    return {**row, "a": row["b"], "b": row["a"], "difference": turned}


def test_verdict_over_seeds(report: RunReport) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.6, 0.05, (3, 40)), rng.normal(0.2, 0.05, (3, 40))
    supported = compare.difference_over_seeds(a.tolist(), b.tolist())
    row = comparison_row("kl", "sft|<b>", supported)
    assert "over 3 training seeds an arm the difference is supported" in wording.verdict(
        {**report, "comparisons": [*report["comparisons"], row]}
    )
    equal = comparison_row("kl", "sft|<b>", compare.difference_over_seeds(a.tolist(), a.tolist()))
    assert "is inconclusive" in wording.verdict({**report, "comparisons": [equal]})


def test_a_run_without_arms_still_reports(report: RunReport, tmp_path: Path) -> None:
    bare: RunReport = {**report, "arms": {}, "comparisons": [], "examples": []}
    assert "accuracy.svg" not in pages.write_report(bare, tmp_path)
    assert "No arm of this run has been evaluated yet." in (tmp_path / "report.md").read_text()


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
    for expected in ("kl", "sft|<b>", "●", "loss", "▁", "these two checkpoints differ"):
        assert expected in text
