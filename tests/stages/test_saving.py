"""Stages that train, up to the model on the disk: what plain transformers loads is what was trained, or nothing is trained."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_architectures import build
from transformers import AutoModelForCausalLM

from distill import models, recipe, run_folder
from distill.models import saving
from distill.progress import Screen
from distill.records import UserError
from distill.stages import prune, train
from distill.stages.context import Context
from distill.stages.inputs import student

TIED = {"rank": 2, "target_modules": ["q_proj", "embed_tokens"]}


def stage_context(run: Path, base: Path, stage: dict[str, Any]) -> Context:
    rows = [{"question": f"{n} + {n}?", "completion": f"It is {2 * n}."} for n in range(8)]
    data = run / "chat.jsonl"
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kind = {"train": {"data": str(data), "loss": {"fn": "cross_entropy"}, "steps": 2, "lr": 1e-2}, "prune": {}}
    tree = {
        "name": "t",
        "models": {"base": str(base)},
        "stages": {"s": {"model": "base", **kind[stage["kind"]], **stage}},
    }
    resolved = recipe.validate(tree)
    context = Context(recipe=resolved, run=run, name="s", screen=Screen(io.StringIO()))
    context.folder.mkdir(parents=True)
    state = run_folder.State(kind=stage["kind"], config=resolved.stages["s"].model_dump(mode="json"), inputs={})
    run_folder.write(context.folder, state)
    return context


@pytest.fixture(scope="module")
def base(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama of four layers whose generation config transformers loads and does not save."""
    folder = tmp_path_factory.mktemp("base")
    models.save(build("llama", len(tokenizer), tie_word_embeddings=True), tokenizer, folder)
    (folder / "generation_config.json").write_text(
        json.dumps({"do_sample": False, "temperature": 0.6, "eos_token_id": 2})
    )
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float32", "save_dtype": "bfloat16"},
        {"dtype": "bfloat16"},
        {"dtype": "float32", "lora": TIED},
        {"dtype": "bfloat16", "lora": {"rank": 2, "modules_to_save": ["lm_head"]}},
    ],
)
def test_a_stage_saves_what_it_trained(
    changes: dict[str, Any], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 to the digit; a merge or a cast to bfloat16 rounds the weights. The generation config is mended before."""
    trained: list[torch.Tensor] = []
    whole = student.save_student

    def watched(model: Any, *rest: Any) -> Any:
        trained.append(saving.label_logps(model))
        return whole(model, *rest)

    monkeypatch.setattr(train, "save_student", watched)
    context = stage_context(tmp_path, base, {"kind": "train", **changes})
    train.run(context.recipe.stages["s"], context)
    assert "do_sample set to true" in context.screen.stream.getvalue()  # type: ignore[attr-defined]
    saved = AutoModelForCausalLM.from_pretrained(context.folder / "model", dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    gap, moved = (saving.label_logps(saved) - trained[0]).abs(), (saving.label_logps(before) - trained[0]).abs()
    exact = changes["dtype"] == "float32" and "save_dtype" not in changes
    assert float(gap.max()) < 1e-3 if exact else float(gap.mean()) < 0.2
    assert float(moved.mean()) > 0.5


def test_a_pruned_model_in_bfloat16_is_proven(base: Path, tmp_path: Path) -> None:
    context = stage_context(tmp_path, base, {"kind": "prune", "layers": 2})
    assert prune.run(context.recipe.stages["s"], context).metrics["layers_kept"] == [0, 3]
    assert models.config_of(context.folder / "model")["num_hidden_layers"] == 2


def test_what_cannot_be_saved_is_refused_before_the_first_step(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = stage_context(tmp_path / "a", base, {"kind": "train", "dtype": "float32"})
    model = models.load(base, dtype="float32")
    # Two weights that are one, which the class does not declare: safetensors cannot hold them, and transformers says so at the end.
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    monkeypatch.setattr(models, "load", lambda *_, **__: model)
    with pytest.raises(UserError, match="base: cannot be saved by transformers, so nothing is trained"):
        train.run(context.recipe.stages["s"], context)
    assert not (context.folder / "metrics.jsonl").exists()
    monkeypatch.undo()
    monkeypatch.setattr(student, "free_space", lambda folder: 1000)
    context = stage_context(tmp_path / "b", base, {"kind": "train", "dtype": "float32"})
    with pytest.raises(UserError, match=r"0\.0 GB are free, and the trained model takes"):
        train.run(context.recipe.stages["s"], context)


def test_a_wrong_merge_fails_the_stage(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter that is unloaded instead of merged: the base is there, and what was learned is not."""
    import peft

    monkeypatch.setattr(peft.PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
    context = stage_context(tmp_path, base, {"kind": "train", "dtype": "float32", "lora": {"rank": 2}})
    with pytest.raises(UserError, match="with its adapter merged is not the model that is trained"):
        train.run(context.recipe.stages["s"], context)
    assert not (context.folder / "model").exists()


def test_a_model_that_does_not_fit_twice_is_compared_file_by_file(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mixture of experts, whose weights have other names and shapes in memory than in the files."""
    monkeypatch.setattr(saving, "COPY_SHARE", 0.0)
    for model in (build("qwen3_moe", 512), build("gpt2", 512)):
        folder = tmp_path / model.config.model_type
        model.save_pretrained(folder)
        assert "file by file" in models.prove_saved(model, folder)
        parameter = next(model.parameters())
        with torch.no_grad():
            parameter[3] += 1.0
        with pytest.raises(UserError, match=r"Weights that differ: .*(embed_tokens|wte)\.weight"):
            models.prove_saved(model, folder)


@pytest.mark.parametrize(("keep", "left"), [(0, []), (1, ["step-00000002"]), (2, ["step-00000002"])])
def test_checkpoints_that_are_left_when_the_model_is_saved(base, tmp_path, keep, left):
    stage = {"kind": "train", "keep_checkpoints": keep, "checkpoint_every": 1, "dtype": "float32"}
    context = stage_context(tmp_path, base, stage)
    train.run(context.recipe.stages["s"], context)
    assert sorted(path.name for path in (context.folder / "checkpoints").glob("*")) == left
    assert (context.folder / "model" / "model.safetensors").is_file()
