"""What can be wrong with a model folder is found before it is loaded, and said in one sentence."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_architectures import NotTinyError, build
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from distill import models, recipe
from distill.models.preflight import _check_weights
from distill.records import UserError
from distill.run.plan import check_plugs

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def only(name: str) -> Callable[[Path], None]:
    """The weights in a file of another name, and none beside it."""

    def edit(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / name)

    return edit


def written(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    (folder / "config.json").unlink()


def moved(folder: Path) -> None:
    """A stage's folder, with the model below it."""
    inner = folder / "model"
    inner.mkdir()
    for path in [p for p in folder.iterdir() if p.is_file()]:
        path.rename(inner / path.name)


def index(**weight_map: str) -> Callable[[Path], None]:
    return written("model.safetensors.index.json", json.dumps({"weight_map": weight_map}))


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def one_layer_more(weights: dict[str, torch.Tensor]) -> None:
    weights |= {k.replace("layers.1", "layers.2"): v.clone() for k, v in weights.items() if "layers.1." in k}


CASES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "adapter": (adapter, r"a LoRA adapter for some/base, which is not a model.*merge it with peft"),
    "adapter_beside": (written("adapter_config.json", "{}"), r"a LoRA adapter .* beside another model's config"),
    "stage_folder": (moved, r"is not a model's folder \(it holds no config\.json\); name .*/model\."),
    "index_beside_one_file": (index(a="model-00001-of-00002.safetensors"), "and an index of other files"),
    "index_of_missing_files": (
        lambda f: (only("x.safetensors")(f), index(a="model-00001-of-00002.safetensors")(f)),
        "1 of 1 weight files are missing",
    ),
    "index_of_other_tensors": (index(**{"model.other": "model.safetensors"}), r"lacks 1 of the weights .*model\.other"),
    "pointer_weights": (written("model.safetensors", POINTER), "git LFS pointer.*git lfs pull"),
    "pointer_tokenizer": (written("tokenizer.json", POINTER), "tokenizer.json: is a git LFS pointer"),
    "pointer_config": (written("config.json", POINTER), "config.json: is a git LFS pointer"),
    "mistral": (only("consolidated.safetensors"), "Mistral's own format"),
    "pth": (only("consolidated.00.pth"), "pickled weights are not loaded"),
    "bin": (only("pytorch_model.bin"), "pickled weights are not loaded.*save_pretrained"),
    "gguf": (only("model.Q4.gguf"), "a GGUF file is read only as package://"),
    "flax": (only("flax_model.msgpack"), "Flax's weights are not read"),
    "tensorflow": (only("tf_model.h5"), "TensorFlow's weights are not read"),
    "other_name": (only("weights.safetensors"), "transformers reads model.safetensors: rename it"),
    "hidden_size": (lambda f: edit_config(f, hidden_size=64), "weights have another shape than the config says"),
    "vocab_size": (lambda f: edit_config(f, vocab_size=50000), "weights have another shape than the config says"),
    "more_layers": (lambda f: edit_config(f, num_hidden_layers=3), "lacks 9 weights, which would be random"),
    "fewer_layers": (edit_weights(one_layer_more), r"hold a layer model\.layers\.2 and config.json has 2 layers"),
    "biases": (
        edit_weights(lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(128)})),
        r"the files hold model\.layers\.0\.self_attn\.q_proj\.bias, which the model .* does not have",
    ),
    "broken_config": (written("config.json", '{"model_type": '), "config.json: is not JSON"),
    "list_config": (written("config.json", "[]"), "config.json: is not a JSON object"),
    "no_type": (lambda f: (f / "config.json").write_text('{"vocab_size": 3}'), "has no model_type"),
    "own_code": (
        lambda f: edit_config(f, model_type="mine", auto_map={"AutoModelForCausalLM": "modeling.Mine"}),
        "Python code of its own .*trust_remote_code: true",
    ),
    "unknown_type": (lambda f: edit_config(f, model_type="mine"), "no causal language model of type 'mine'"),
    "odd_value": (lambda f: edit_config(f, hidden_size="many"), "config.json: transformers cannot read it"),
    "no_tokenizer": (no_tokenizer, "holds no tokenizer"),
    "broken_tokenizer": (written("tokenizer.json", "{"), "the tokenizer cannot be loaded"),
    "small_embedding": (
        lambda f: (
            edit_config(f, vocab_size=49000),
            edit_weights(lambda w: w.update({k: v[:49000].clone() for k, v in w.items() if len(v) == 49152}))(f),
        ),
        r"has id 49000 and the model 49000 embeddings.*resize_token_embeddings\(49152\)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_folder_that_cannot_be_used_is_refused_in_one_sentence(
    tiny_dir: Path, tmp_path: Path, case: str
) -> None:
    folder = shutil.copytree(tiny_dir, tmp_path / "m")
    change, message = CASES[case]
    change(folder)
    with pytest.raises(UserError) as caught:
        models.check_model(folder)
    said = str(caught.value)
    assert re.search(message, said), said
    assert len(said.splitlines()) == 1
    with pytest.raises(UserError) as before_a_run:
        check_plugs(trained(folder))
    assert str(before_a_run.value) == said


def trained(folder: Path, **stage: Any) -> recipe.Recipe:
    fields = {"kind": "train", "model": "m", "data": "./x.jsonl", "loss": {"fn": "cross_entropy"}, "epochs": 1, **stage}
    return recipe.validate({"name": "r", "models": {"m": str(folder), "t": str(folder)}, "stages": {"s": fields}})


def test_good_folders_are_let_through(tiny_dir: Path, tmp_path: Path) -> None:
    """Also with the head of a tied model stored, an image's token above the embedding, and Mistral's own copy."""
    folder = shutil.copytree(tiny_dir, tmp_path / "m")
    models.check_model(folder)
    check_plugs(trained(folder))
    edit_weights(lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))(folder)
    index(**dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors"))(folder)
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    tokenizer = models.load_tokenizer(folder)
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    models.check_model(folder)
    check_plugs(trained(folder))
    assert models.vocabulary_size(tokenizer, models.config_of(folder)) == 49152


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors", "bitsandbytes"])
def test_quantised_weights_run_in_an_engine_and_are_not_trained(tiny_dir: Path, tmp_path: Path, method: str) -> None:
    folder = shutil.copytree(tiny_dir, tmp_path / "m")
    stored = {"bitsandbytes": {"load_in_4bit": True}, "gptq": {"bits": 4, "group_size": 8}}.get(method, {})
    edit_config(folder, quantization_config={"quant_method": method, **stored})
    models.check_model(folder)
    with pytest.raises(
        UserError, match=rf"stages.s.model: m has quantised weights \({method}\), which cannot be trained"
    ):
        check_plugs(trained(folder))
    pruned = {"kind": "prune", "model": "m", "layers": 2}
    taught = {"model": "t", "teacher": "m", "loss": {"fn": "forward_kl"}, "dtype": "float32"}
    in_trainer = trained(folder, **taught)
    shutil.copytree(tiny_dir, tmp_path / "t")
    in_trainer.models["t"] = recipe.ModelConfig(source=str(tmp_path / "t"))
    if method == "gptq" and find_spec("optimum") is None:
        with pytest.raises(UserError, match=r"s: the trainer cannot read the quantised weights of m \(gptq: .*optimum"):
            check_plugs(in_trainer)
    with pytest.raises(UserError, match="prune the model that it was made from"):
        check_plugs(recipe.validate({"name": "r", "models": {"m": str(folder)}, "stages": {"s": pruned}}))


def test_no_architecture_of_transformers_is_refused_as_it_was_saved(tmp_path: Path) -> None:
    """Every causal model's own files pass, whatever transformers renames, merges, ties and leaves out."""
    wrong, passed = [], 0
    for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            model = build(model_type, 512)
        except NotTinyError:
            continue
        folder = tmp_path / model_type
        try:
            model.save_pretrained(folder)
        except Exception:  # Some tiny models cannot be saved; they cannot be loaded either.
            continue
        try:
            models.check_folder(folder)
            _check_weights(folder)
            passed += 1
        except Exception as error:
            wrong.append(f"{model_type}: {type(error).__name__} {error}")
        shutil.rmtree(folder)
    assert not wrong, "\n".join(wrong)
    assert passed > 60
