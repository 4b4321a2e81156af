"""Model cards of a run, read by the hub's library, and the upload to the hub without the network call."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors
import yaml
from chat_families import family_tokenizer
from huggingface_hub import ModelCard
from needs import slowness
from project import SUMS

from distill import models, recipe, run_folder
from distill.errors import MachineError
from distill.records import UserError
from distill.reports.run_report import RunReport
from distill.reports.usage_snippets import transformers_code
from distill.run import card_facts, model_card
from distill.run.model_card import model_folder, push, write, write_all
from distill.stages.trained_prompt import TrainedPrompt
from distill.tasks import templates

HOSTILE = "<script>alert(1)</script> | **bold** \x1b[31m `tick`"


def resolved(base: str) -> recipe.Recipe:
    train = {
        "kind": "train",
        "steps": 2,
        "data": "data/rows.jsonl",
        "task": "sums",
        "loss": {"fn": "cross_entropy"},
    }
    tree: dict[str, Any] = {
        "name": "carded", "models": {"base": base}, "tasks": {"sums": SUMS},
        "stages": {
            "teacher": {**train, "model": "base"},
            "traces": {"kind": "generate", "model": "teacher", "task": "sums", "problems": 4},
            "student": {"kind": "prune", "model": "base", "layers": 2},
            "kl": {"kind": "train", "model": "student", "data": "traces", "steps": 2},
            "sft": {**train, "model": "student"},
        },
    }  # fmt: skip
    return recipe.validate(tree)


@pytest.fixture
def run(tmp_path: Path, tiny_dir: Path) -> Path:
    """The folder of a run with the models of three stages."""
    folder = tmp_path / "carded"
    for name, kind in (("teacher", "train"), ("student", "prune"), ("kl", "train")):
        standing = run_folder.State(kind=kind, config={}, inputs={}, status="done", seconds=61.0)
        standing.cost = {"tokens_trained": 12_000, "flops": 3e12}
        run_folder.write(folder / name, standing)
        shutil.copytree(tiny_dir, folder / name / "model")
    return folder


def report(stage: str) -> RunReport:
    interval = {"value": 0.41, "low": 0.35, "high": 0.47, "n": 256}
    view = {"tokens": 12_000.0, "flops": 3e12, "seconds": 61.0}
    more = {**view, "flops": 9e12}
    arm = {"stage": stage, "role": "student", "accuracy": interval, "maj_at": {}, "clipped_ratio": 0.01, "mean_length": 9.0,
           "pass_at": {"1": interval, "8": {**interval, "value": 0.8}}, "problems": 256, "samples": 8, "unjudged": 0,
           "seeds": 1, **view, "cost": {"student": view, "with_inference": more, "with_teacher": more}}  # fmt: skip
    row = {"a": "kl", "b": "sft", "unit": "checkpoints", "difference": {"value": 0.02, "low": -0.03, "high": 0.07, "n": 256},
           "p_value": 0.4, "p_holm": 0.4, "method": "", "verdict": "not shown"}  # fmt: skip
    return {"name": "carded", "task": HOSTILE, "arms": {"kl": arm}, "comparisons": [row],
            "reproduce": ["distill run recipes/carded.yaml"]}  # type: ignore[typeddict-item,return-value]  # fmt: skip


def test_the_card_says_where_a_model_comes_from(run: Path) -> None:
    path = write(resolved("HuggingFaceTB/SmolLM2-135M"), run, "kl")
    assert path == run / "kl" / "model" / "README.md"
    read = ModelCard.load(path)
    assert read.data.base_model == "HuggingFaceTB/SmolLM2-135M"
    assert read.data.library_name == "transformers"
    assert {"distill", "train", "generate", "prune"} <= set(read.data.tags)
    history = read.text[re.search(r"\| stage +\| kind", read.text).start() :]  # type: ignore[union-attr]
    rows = [line for line in history.splitlines() if line.startswith("| ")]
    lineage = {row.split("|")[1].strip(): row for row in rows}
    assert [name for name in lineage if name in ("teacher", "traces", "student", "kl", "sft")] == [
        "teacher", "traces", "student", "kl",
    ]  # fmt: skip
    assert "12 k" in lineage["kl"]
    assert "model student, data traces" in lineage["kl"]
    assert "This model has not been evaluated yet." in read.text
    assert write(resolved("x/y"), run, "sft") is None


def test_scores_come_with_the_report_as_a_model_index(run: Path) -> None:
    written = write_all(resolved("x/y"), run, report("kl"))
    assert {path.parent.parent.name for path in written} == {"teacher", "student", "kl"}
    read = ModelCard.load(run / "kl" / "model" / "README.md")
    (result,) = read.data.eval_results
    assert result.metric_value == 0.41
    assert result.metric_name == "pass@1 41.0% [35.0, 47.0]"
    assert "pass@8 80.0% [35.0, 47.0]" in read.text
    assert "+2.0 [−3.0, +7.0] points (no difference shown)" in read.text
    assert "9 TFLOP" in read.text
    assert "distill run recipes/carded.yaml" in read.text
    assert not ModelCard.load(run / "teacher" / "model" / "README.md").data.eval_results


def test_a_card_holds_no_markup_and_no_path_of_the_machine(run: Path, tiny_dir: Path) -> None:
    path = write(resolved(str(tiny_dir)), run, "kl", report("kl"))
    assert path is not None
    text = path.read_text()
    assert str(tiny_dir.parent) not in text
    assert tiny_dir.name in text
    body = ModelCard(text).text
    assert "\\<script>" in body
    assert "\x1b" not in text
    assert ModelCard(text).data.base_model is None


def test_push_finds_checkpoints_and_names_them(run: Path, tmp_path: Path) -> None:
    assert model_folder(run / "kl") == run / "kl" / "model"
    assert model_folder(run / "kl" / "model") == run / "kl" / "model"
    with pytest.raises(UserError, match="is not a model"):
        model_folder(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"has no README\.md"):
        push(run / "kl", "me/model")
    write(resolved("x/y"), run, "kl")
    with pytest.raises(UserError, match="is not the name of a repository"):
        push(run / "kl", "model")


def test_a_hub_that_is_not_there_is_named_in_seconds(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    write(resolved("x/y"), run, "kl")
    began = time.monotonic()
    with pytest.raises(MachineError, match=r"the hub \(http://127\.0\.0\.1:9\) cannot be reached"):
        push(run / "kl", "me/model")
    assert time.monotonic() - began < 20 * slowness()


# ------------------------------------------------------------------------------------------ prompt, licence, size


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)


def card_of(run: Path, base: str = "x/y") -> str:
    path = write(resolved(base), run, "kl", report("kl"))
    assert path is not None
    return path.read_text(encoding="utf-8")


def test_the_cards_script_runs_and_prompts_as_in_training(
    run: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = card_of(run).replace("max_new_tokens=256", "max_new_tokens=3")
    first, second = python_blocks(text)
    monkeypatch.chdir(run / "kl" / "model")
    names: dict[str, Any] = {}
    exec(first, names)
    template = templates.think_answer
    question = ({"role": "user", "content": names["question"]},)
    expected = models.render_prompt(tokenizer, template, question)
    assert names["inputs"]["input_ids"][0].tolist() == expected.tolist()
    assert names["output"].shape[1] == len(expected) + 3
    assert capsys.readouterr().out.endswith("\n")
    assert second.splitlines()[1] == "from vllm import LLM, SamplingParams"
    ids = {"tokenizer": tokenizer}
    own = r"from |llm = |tokenizer = |\(answer,\) = |print"
    exec("\n".join(line for line in second.splitlines() if not re.match(own, line)), ids)
    assert ids["ids"] == expected.tolist()
    shown = text.split("## Prompt")[1].split("```")[1]
    assert models.prompt_text(tokenizer, template, ({"role": "user", "content": "{question}"},)).strip() in shown


def test_a_base_models_card_prompts_with_plain_text(run: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "kl" / "model" / "chat_template.jinja").unlink()
    first, _ = python_blocks(card_of(run).replace("max_new_tokens=256", "max_new_tokens=1"))
    monkeypatch.chdir(run / "kl" / "model")
    names: dict[str, Any] = {}
    exec(first, names)
    assert names["prompt"] == templates.think_answer.plain.replace("{question}", names["question"])


@pytest.mark.parametrize("family", ["gemma3", "qwen3", "deepseek_r1_distill"])
def test_the_prompt_of_other_families_is_the_one_of_training(family: str, smollm2_dir: Path, tmp_path: Path) -> None:
    """A template without a system role, one with an option, one that opens the thinking that the task begins with."""
    tokenizer = family_tokenizer(smollm2_dir, family)
    tokenizer.save_pretrained(tmp_path)
    tree = resolved("x/y").model_dump(mode="json")
    template = dataclasses.replace(templates.think_answer, prefill="<think>\n")
    if family == "qwen3":
        tree["tasks"]["sums"]["template_options"] = {"enable_thinking": False}
        template = dataclasses.replace(templates.think_answer, options={"enable_thinking": False})
    if family == "gemma3":
        template = templates.think_answer
    recipe_here = recipe.validate(tree)
    own = pytest.MonkeyPatch()
    own.setattr(card_facts, "trained_prompt", lambda recipe, name: TrainedPrompt(template, "sums"))
    usage = card_facts.usage_of(recipe_here, "kl", tmp_path)
    own.undo()
    assert usage is not None
    code = transformers_code(usage)
    names: dict[str, Any] = {"tokenizer": tokenizer}
    exec(code[code.index("question = ") : code.index("inputs = ")], names)
    question = ({"role": "user", "content": names["question"]},)
    assert names["prompt"] == models.prompt_text(tokenizer, template, question)


def test_the_front_matter_keeps_to_the_hubs_spec(run: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: mine\nlicense_link: https://x/y\nlanguage:\n- en\n- de\n---\n# Base\n"
    )
    text = card_of(run, str(base))
    data = ModelCard(text).data
    assert (data.license, data.license_name, data.license_link) == ("other", "mine", "https://x/y")
    assert data.language == ["en", "de"]
    assert data.base_model is None
    tree = ModelCard(card_of(run, "HuggingFaceTB/SmolLM2-135M")).data.to_dict()
    assert tree["base_model"] == "HuggingFaceTB/SmolLM2-135M"
    assert tree["base_model_relation"] in ("adapter", "merge", "quantized", "finetune")
    assert tree["pipeline_tag"] == "text-generation"
    (model,) = tree["model-index"]
    (result,) = model["results"]
    assert result["task"]["type"] == "text-generation"
    assert {"type", "name"} <= result["dataset"].keys()
    assert [set(metric) >= {"type", "value"} for metric in result["metrics"]] == [True]


def test_a_licence_that_is_not_known_is_not_invented_and_one_that_is_set_stays(run: Path) -> None:
    text = card_of(run)
    assert "license" not in yaml.safe_load(text.split("---")[1])
    assert "The licence of the base model x/y is not known here" in text
    path = run / "kl" / "model" / "README.md"
    with pytest.raises(UserError, match="is not an identifier of the hub"):
        model_card.set_licence(path, "Apache 2")
    model_card.set_licence(path, "apache-2.0")
    assert ModelCard.load(path).data.license == "apache-2.0"
    assert "is not known here" not in path.read_text()
    assert "## Settings" in path.read_text()
    again = card_of(run)  # the next report
    assert ModelCard(again).data.license == "apache-2.0"


def test_the_card_has_size_data_and_limits(run: Path) -> None:
    text = card_of(run)
    weights = run / "kl" / "model" / "model.safetensors"
    with safetensors.safe_open(weights, "np") as file:
        parameters = sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    assert f"{parameters:,}" in text
    assert f"{weights.stat().st_size / 1e6:,.1f} MB" in text
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert "the traces of stage traces" in text
    assert rows["parameters"]
    limits = text.split("## Limits")[1].split("## ")[0]
    assert "Made for task sums" in limits
    assert "59.0% of the replies to 256 held-out problems were wrong" in limits
    assert "one training seed" in limits
    assert "Trained on texts of at most 4,096 tokens" in limits
