"""The recipes for GPUs, without one: what their headers say of memory is what is computed, and every stage runs at tiny size."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from project import Project

from distill import models, recipe
from distill.compute import cards
from distill.run import fit
from distill.tools.fit_output import COLUMNS, _sum
from distill.tools.listing import RECIPES

CARD_RECIPES = sorted(RECIPES.glob("*_qwen.yaml"))
SAID = re.compile(
    r"# Predicted by `distill check recipes/(\w+)\.yaml --gpu ([\w:-]+)`: ([\d.]+) hours, ([\d.]+) GB of traces"
)
STAGE = re.compile(r"#   (\w+) ([\w.]+) ([\d.]+): (.+)")


def near(said: float, computed: float) -> bool:
    """Within a tenth; small numbers within their rounding."""
    return abs(said - computed) <= max(0.1 * computed, 0.051)


@pytest.mark.parametrize("path", CARD_RECIPES, ids=lambda path: path.stem)
def test_the_header_says_what_is_predicted(path):
    text = path.read_text()
    said = SAID.search(text)
    assert said, "no header with the predicted memory"
    assert said[1] == path.stem
    found = fit.verdicts(recipe.load(path), cards.parse(said[2]))
    assert all(each.fits for each in found), [each.problem for each in found]
    assert near(float(said[3]), sum(each.row.amounts["seconds"] for each in found) / 3600)
    assert near(float(said[4]), sum(each.row.amounts["bytes"] for each in found) / 1e9)
    by_name = {each.row.name.replace("@1", ""): each for each in found if each.need}
    lines = STAGE.findall(text[said.end() :])
    assert {kind for kind, *_ in lines} == {each.row.kind for each in by_name.values()}
    for kind, name, total, parts in lines:
        computed = by_name[name]
        fullest = max(each.need for each in by_name.values() if each.row.kind == kind)
        assert near(float(total), fullest / cards.GIB), name
        assert near(float(total), computed.need / cards.GIB), name
        stated = {part: float(number) for part, number in (each.rsplit(" ", 1) for each in parts.split(", "))}
        for column, names in COLUMNS.items():
            assert near(stated.get(column, 0.0), _sum(computed, names)), (name, column)


@pytest.mark.parametrize(
    ("name", "gpu"),
    [(name, gpu) for name in ("distil_24gb_qwen", "grpo_qwen") for gpu in ("4090", "3090", "a10", "l4")]
    + [
        (name, gpu)
        for name in ("distil_qwen", "r1_distill_qwen", "r1_zero_qwen")
        for gpu in ("a100", "h100-pcie", "h200")
    ]
    + [("r1_qwen", "a100:8")],
)
def test_a_recipe_fits_every_card_of_its_size(name, gpu):
    found = fit.verdicts(recipe.load(RECIPES / f"{name}.yaml"), cards.parse(gpu))
    assert [each.problem for each in found if not each.fits] == []


def test_a_reference_sync_that_never_comes_is_refused():
    stage = {
        "kind": "grpo",
        "model": "m",
        "task": "t",
        "rewards": [{"fn": "accuracy"}],
        "steps": 400,
        "reference_every": 400,
    }
    with pytest.raises(ValueError, match="never comes in 400 steps"):
        recipe.GrpoStage(**stage)
    assert recipe.GrpoStage(**stage | {"steps": 800}).reference_every == 400


# ------------------------------------------------------------------------------------------------- at tiny size

SMALL = {
    "problems": 6, "samples": 2, "steps": 2, "prompts": 2, "group_size": 2, "mini_batches": 1, "batch_traces": 4,
    "micro_tokens": 2048, "epochs": 1, "snapshot_problems": 4, "snapshot_every": 1, "max_rows": 8, "max_tokens": 512,
    "shard_rows": 64, "checkpoint_every": 1,
}  # fmt: skip
DROPPED = ("lora", "distributed", "seeds", "reference_every")


def tiny(tree: dict[str, Any], model: Path, folder: Path) -> dict[str, Any]:
    """The recipe with tiny models, local problems and traces, and as little work as its kinds allow."""
    problems, traces = folder / "problems.jsonl", folder / "traces.jsonl"
    rows = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(40)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    replies = [
        {"problem": row["question"], "generations": [f"<think>double</think>\\boxed{{{row['answer']}}}"] * 2,
         "correctness_math_verify": [True, False], "answer": row["answer"]}
        for row in rows
    ]  # fmt: skip
    traces.write_text("".join(json.dumps(row) + "\n" for row in replies))
    tree = {**tree, "models": {name: {"source": str(model)} for name in tree["models"]}}
    tree.pop("distributed", None)
    tree["tasks"] = {
        name: {"fn": "jsonl", "path": str(problems), "template": task["template"]}
        for name, task in tree["tasks"].items()
    }
    stages = {}
    for name, stage in tree["stages"].items():
        if name.startswith("math_"):  # as the stages on GSM8K
            continue
        small = {key: SMALL.get(key, value) for key, value in stage.items() if key not in DROPPED}
        if stage["kind"] in ("eval", "compare"):
            small |= {"problems": 3, "samples": stage.get("samples", 1) and min(stage.get("samples", 1), 2)}
            small["pass_at"] = [1]
        if "samples" in stage and stage["kind"] == "generate":
            small["samples"] = 2
        if "sampling" in stage or stage["kind"] in ("grpo", "on_policy", "generate", "eval", "compare"):
            small["sampling"] = {**stage.get("sampling", {}), "max_tokens": 6}
        if stage["kind"] in ("generate", "score", "eval", "compare", "grpo", "on_policy"):
            small["engine"] = {"fn": "transformers", "dtype": "float32", "batch_size": 16}
        if "budget" in stage:
            small["budget"] = stage["budget"]
        if "rewards" in stage:
            small["rewards"] = [
                {**reward, **({"cache": 2} if "cache" in reward else {})} for reward in stage["rewards"]
            ]
        if stage["kind"] in ("train", "grpo", "on_policy"):
            small["dtype"] = "float32"
        if stage["kind"] == "train":
            small["keep_truncated"] = True  # random models write to the limit
        if str(stage.get("data", "")).startswith("open-r1/"):
            small["data"] = str(traces)
        if stage["kind"] == "filter":  # a random model is never right
            small["keep"] = [{"fn": "code_blocks", "max_blocks": 99}]
        stages[name] = small
    tree["stages"] = stages
    return tree


@pytest.fixture(scope="module")
def padded_dir(tiny_dir, tokenizer, tmp_path_factory) -> Path:
    """The tiny model with 128 further rows in its embedding and head, as the 7B Qwen2.5 has them and the small ones do not."""
    model = models.load(tiny_dir, dtype="float32")
    model.resize_token_embeddings(len(tokenizer) + 128)
    folder = tmp_path_factory.mktemp("padded")
    models.save(model, tokenizer, folder)
    return folder


def r1_like(model_dir: Path, folder: Path, padding: int) -> Path:
    """The tiny model with R1-Distill's way of tokens: the same text tokens, others for turns, and <think> opened by the prompt."""
    model, words = models.load(model_dir, dtype="float32"), models.load_tokenizer(model_dir)
    words.add_tokens(["<U>", "<A>", "<think>", "</think>"])
    words.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}{% elif m.role == 'assistant' %}"
        "<A>{{ m.content.split('</think>')[-1] }}<|im_end|>{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<A><think>\n{% endif %}"
    )
    model.resize_token_embeddings(len(words) + padding)
    models.save(model, words, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["distil_24gb_qwen", "r1_distill_qwen", "grpo_qwen", "r1_qwen"])
def test_every_stage_runs_at_tiny_size(name, tiny_dir, padded_dir, tmp_path):
    """The other recipes for GPUs are made of the same stages. The teacher's head has more rows than the students'."""
    tree = tiny(yaml.safe_load((RECIPES / f"{name}.yaml").read_text()), tiny_dir, tmp_path)
    if "teacher" in tree["models"]:
        tree["models"]["teacher"] = {"source": str(padded_dir)}
    if name == "r1_distill_qwen":  # R1's distilled models have special tokens that Qwen's do not
        for role, tokens in (("teacher", 128), ("same", 64)):
            tree["models"][role] = {"source": str(r1_like(tiny_dir, tmp_path / role, padding=tokens))}
    made = Project(tmp_path, tree)
    ran = made.run()
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr
    assert (made.run_dir / "report.json").is_file()
