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
from distill.reports import arm_plots, comparison, curves, pages, report_blocks, svg, terminal, wording
from distill.reports import arms as arms_module
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
    table = report_blocks.accuracy_table(whole)
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
    assert tree["verdict"] == wording.verdict(report)
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
    assert wording.verdict(report) in " ".join(
        re.sub("<[^>]*>", "", html).replace("&lt;", "<").replace("&gt;", ">").split()
    )


def test_predicted_and_measured_memory_stand_side_by_side(report: RunReport) -> None:
    table = report_blocks.prediction_table(report)
    assert table.header[-3:] == ["predicted", "memory", "×"]
    assert [row[-3:] for row in table.rows] == [["4 GB", "5 GB", "1.25"]] * 3  # both, and the most
    unmeasured = {**report, "stages": [{**report["stages"][0], "metrics": {}}]}
    assert report_blocks.prediction_table(unmeasured).rows[0][-3:] == ["–", "–", "–"]


def test_the_plot_is_wellformed_and_ordered(report: RunReport) -> None:
    tree = ElementTree.fromstring(arm_plots.accuracy_svg(report["arms"]))
    names = [t.text for t in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert [n for n in names if n in report["arms"]] == ["teacher", "kl", "sft|<b>"]
    assert len([p for p in tree.iter(f"{SVG}path") if p.get("class") == "mark"]) == 3
    for line in tree.iter("{http://www.w3.org/2000/svg}line"):
        assert 0 <= float(line.get("x1", "0")) <= arm_plots.WIDE


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
    supported = comparison.difference_over_seeds(a.tolist(), b.tolist())
    row = comparison_row("kl", "sft|<b>", supported)
    assert "over 3 training seeds an arm the difference is supported" in wording.verdict(
        {**report, "comparisons": [*report["comparisons"], row]}
    )
    equal = comparison_row("kl", "sft|<b>", comparison.difference_over_seeds(a.tolist(), a.tolist()))
    assert "is inconclusive" in wording.verdict({**report, "comparisons": [equal]})


def test_the_verdict_says_where_the_students_held_out_kl_differs(report: RunReport) -> None:
    def measured(value: float) -> dict[str, object]:
        return {"kl": {"value": value, "low": value - 0.01, "high": value + 0.02, "n": 9}}

    arms = {
        name: {**arm, "divergence": measured(kl)}
        for (name, arm), kl in zip(report["arms"].items(), (0.0, 0.02, 0.1), strict=True)
    }
    pair = {"a": "kl", "b": "sft|<b>", "difference": {"value": -0.08, "low": -0.1, "high": -0.05, "n": 9}}

    def said(low: float) -> str:
        pairs = [{**pair, "difference": {**pair["difference"], "high": -low}}]  # type: ignore[dict-item]
        return wording.verdict({**report, "arms": arms, "divergence_pairs": pairs})  # type: ignore[typeddict-item]

    both = "In held-out KL to the teacher, kl 0.020 [0.010, 0.040] and sft|<b> 0.100 [0.090, 0.120] nats a token, "
    assert said(0.05).startswith(wording.verdict(report))
    assert said(0.05).endswith(f" {both}they differ (sft|<b> − kl +0.080 [+0.050, +0.100]).")
    assert said(-0.01).endswith(f" {both}no difference is shown (sft|<b> − kl +0.080 [-0.010, +0.100]).")


def test_verdict_of_three_students_groups_the_pairs_by_their_evidence(
    report: RunReport,
) -> None:
    rng = np.random.default_rng(0)
    runs = {name: rng.normal(mean, 0.05, (3, 40)) for name, mean in (("kl", 0.6), ("rl", 0.2))}
    runs["sft"] = runs["kl"] + rng.normal(0, 0.1, (3, 1))
    some = next(arm for arm in report["arms"].values() if arm["role"] == "student")
    arms = {
        name: {**some, "accuracy": {**some["accuracy"], "value": float(values.mean())}} for name, values in runs.items()
    }
    rows = [
        comparison_row(a, b, comparison.difference_over_seeds(runs[a].tolist(), runs[b].tolist()))
        for a, b in (("kl", "rl"), ("kl", "sft"), ("rl", "sft"))
    ]
    said = wording.verdict({**report, "arms": arms, "comparisons": rows})  # type: ignore[typeddict-item]
    supported, inconclusive = said.split("these are inconclusive")
    assert "over 3 training seeds an arm these differences are supported" in supported
    assert "kl − rl +" in supported
    assert "sft − rl +" in supported
    assert "rl" not in inconclusive
    assert "and rl " in said  # students by accuracy, the worst one last


def test_a_run_without_arms_still_reports(report: RunReport, tmp_path: Path) -> None:
    bare: RunReport = {**report, "arms": {}, "comparisons": [], "examples": []}
    assert "plots/accuracy.svg" not in pages.write_report(bare, tmp_path)
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
    assert "mean 0.35" in {t.text for t in tree.iter(f"{SVG}text")}


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
