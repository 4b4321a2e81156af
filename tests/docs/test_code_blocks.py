"""Every code block of docs/ and of the README does what the page says; docs/site/WRITING.md has the conventions."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import page_blocks
import pytest
import tiny_llama
import yaml
from glossary_names import in_run, unexplained
from page_blocks import ROOT, Runner, blocks
from project import REFERENCE, command_line

from distill.recipe import document

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MOST_NOT_RUN = 0.15
"""Share of the blocks that may have a reason not to be run."""
TINY = {
    "cold_start": {"steps": 2, "batch_traces": 4},
    "teacher": {"steps": 1, "prompts": 2, "group_size": 2},
    "traces": {"problems": 24, "top_logprobs": 16},
    "unseen": {"problems": 6, "top_logprobs": 16},
    "clean": {"keep": [{"fn": "length", "max_tokens": 100}]},
    "student": {"layers": 2, "positions": 64},
    "kl": {"batch_traces": 8, "keep_truncated": True},
    "sft": {"batch_traces": 8, "keep_truncated": True},
    "both": {"batch_traces": 8, "keep_truncated": True},
    "verdict": {"problems": 4, "arms": {"teacher": "teacher", "kl": "kl", "sft": "sft"}},
}
"""The quickstart's stages at tiny size. A random model solves nothing, so `clean` keeps all."""


@pytest.fixture(scope="module")
def quickstart(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the quickstart at tiny size, run to its end. PAGE_FOLDER in the environment keeps it for the next time."""
    kept = os.environ.get("PAGE_FOLDER")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("page")
    if (folder / "runs" / "quickstart" / "report.html").is_file():
        return folder
    tree = document.read((ROOT / "recipes" / "quickstart.yaml").read_text(), "quickstart")
    tree["models"]["base"] = str(tiny_llama.save(tokenizer, folder / "models" / "tiny", layers=4))
    assert tree["stages"].keys() == TINY.keys()
    for name, stage in tree["stages"].items():
        stage |= TINY[name]
        if "sampling" in stage:
            stage["sampling"] |= {"max_tokens": 8}
            stage["engine"] = REFERENCE
    shutil.copytree(ROOT / "recipes", folder / "recipes", dirs_exist_ok=True)
    (folder / "data").symlink_to(ROOT / "data")
    (folder / "recipes" / "quickstart.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    done = command_line(folder, "run", "recipes/quickstart.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_of(page: Path, quickstart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "work"
    shutil.copytree(quickstart, folder, symlinks=True)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    runner = Runner(folder)
    for block in blocks(page):
        runner.run(block)


def test_the_recipe_that_is_explained_is_the_quickstart() -> None:
    first = next(block for block in blocks(ROOT / "docs" / "a-recipe.md") if block.language == "yaml")
    lines = (ROOT / "recipes" / "quickstart.yaml").read_text().splitlines()
    assert first.text.splitlines() == [line for line in lines if "yaml-language-server" not in line]


PREDICTED = re.compile(r"--gpu \S+`: ([\d.]+) hours, ([\d.]+) GB of traces")


def test_the_table_of_gpu_recipes_has_the_predictions_of_their_heads() -> None:
    table = (ROOT / "docs" / "machines.md").read_text()
    recipes = {path.stem: path.read_text() for path in (ROOT / "recipes").glob("*_qwen.yaml")}
    rows = {name: row for row in table.splitlines() for name in recipes if row.startswith(f"| `{name}`")}
    assert rows.keys() == recipes.keys()
    for name, text in recipes.items():
        hours, traces = PREDICTED.search(text).groups()
        fullest = max(float(each) for each in re.findall(r"^#   \w+ \S+ ([\d.]+): ", text, re.MULTILINE))
        *_, said_hours, said_traces, said_gib, _ = (cell.strip() for cell in rows[name].split("|"))
        assert (said_hours, said_traces, float(said_gib)) == (hours, f"{traces} GB", fullest), name


def test_the_glossary_has_what_a_run_holds(quickstart: Path) -> None:
    found = in_run(quickstart / "runs" / "quickstart")
    assert {"loss", "kl", "reward/accuracy", "mean_support", "accuracy", "p_holm", "flops"} <= found
    assert not unexplained(found)


def test_few_blocks_are_not_run() -> None:
    found = [block for page in PAGES for block in blocks(page) if block.language != "text"]
    left = [f"{block.place} ({block.reason})" for block in found if block.reason]
    assert len(left) <= MOST_NOT_RUN * len(found) + 1, (
        f"{len(left)} of {len(found)} blocks are not run: {', '.join(left)}"
    )


WRONG = {
    "a recipe's unknown key": ("```yaml\nkl: {kind: train, ..., learning_rat: 1}\n```\n", "unknown key"),
    "an unknown stage": ("<!-- block: fields of quickstart/kll -->\n```yaml\nlr: 1\n```\n", "no stage 'kll'"),
    "a failing program": ("```python\nassert 1 == 2\n```\n", "page.md:1"),
    "an unknown verb": ("```sh\ndistill distil recipes/quickstart.yaml\n```\n", "no verb"),
    "an unknown option": ("```sh\ndistill doctor recipes/quickstart.yaml --jsonn\n```\n", "--jsonn"),
    "a wrong override": ("```sh\ndistill run recipes/grpo_qwen.yaml stages.rl.lrr=1\n```\n", "lrr"),
    "a command that fails": ("```sh\ndistill show runs/none\n```\n", "ended with 2, not 0"),
    "a command that does not fail": ("<!-- block: fails 2 -->\n```sh\ndistill ls losses\n```\n", "ended with 0, not 2"),
    "an unknown extra": ("```sh\npip install 'distill[everything]'\n```\n", "no extra"),
    "an unknown target": ("```sh\nmake quickstartt\n```\n", "no target"),
    "a command of the system": ("```sh\napt-get install bubblewrap\n```\n", "say why"),
    "a language that is not known": ("```rust\nfn main() {}\n```\n", "no such language"),
    "JSON": ("```json\n{,}\n```\n", "page.md:1"),
}


@pytest.mark.parametrize(("text", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_block_is_found(text: str, said: str, quickstart: Path, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(text)
    (block,) = blocks(tmp_path / "page.md")
    with pytest.raises(AssertionError, match=said):
        Runner(quickstart).run(block)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```\nx\n```\n", "without a language"),
        ("<!-- block: not run: lazy -->\n```sh\nls\n```\n", "no reason"),
        ("<!-- block: perhaps -->\n```sh\nls\n```\n", "unknown comment"),
        ("<!-- block: fails 2 -->\nText.\n", "without a block"),
        ("```sh\nls\n", "without an end"),
    ],
)
def test_a_wrong_page_is_found(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(AssertionError, match=said):
        blocks(tmp_path / "page.md")


def test_blocks_in_order_share_files_and_names(quickstart: Path, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(
        "```python\n# mine_of_page.py\nNUMBER = 3\n```\n"
        "```python\nfrom mine_of_page import NUMBER\n```\n"
        "- in a list\n\n    ```python\n    (__import__('pathlib').Path('out.txt')).write_text(str(NUMBER))\n    ```\n"
        '<!-- block: file rows.jsonl -->\n```jsonl\n{"a": 1}\n```\n'
        "<!-- block: part of on_policy -->\n```yaml\nname: other\n```\n"
        "```sh\ndistill run recipes/quickstart.yaml  # finished: nothing is done\ndistill show runs/quickstart\n```\n"
    )
    folder = shutil.copytree(quickstart, tmp_path / "work", symlinks=True)
    runner = Runner(folder)
    for block in blocks(tmp_path / "page.md"):
        runner.run(block)
    assert (folder / "out.txt").read_text() == "3"
    assert (folder / "rows.jsonl").read_text() == '{"a": 1}\n'
    assert page_blocks.parsed(["traces", "stats", "x"])[0] == ("traces", "stats")
