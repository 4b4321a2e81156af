"""What is saved is what was in memory: pruned, adapted and mended models, reloaded by plain transformers; bad folders refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_architectures import NotTinyError, build
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from distill import models
from distill.models.checkpoint_folder import check_loaded
from distill.models.prune import decoder_layers
from distill.models.saving import label_logps
from distill.recipe import LoraConfig
from distill.records import UserError

PRUNED = (
    "llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "phi3", "olmo2", "cohere2", "granite", "smollm3", "gpt_oss",
    "mixtral", "qwen3_moe", "deepseek_v3", "lfm2", "gpt2", "gpt_neox", "opt", "falcon", "bloom", "mamba", "qwen3_next",
)  # fmt: skip


class _Skipped(torch.nn.Module):
    """A decoder layer that does nothing: what a pruned layer is."""

    def __init__(self, tuples: bool) -> None:
        super().__init__()
        self.tuples = tuples

    def forward(self, hidden_states: torch.Tensor, *args: Any, **options: Any) -> Any:
        return (hidden_states,) if self.tuples else hidden_states


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        *((model_type, {}) for model_type in PRUNED),
        ("qwen3_moe", {"decoder_sparse_step": 2}),
        ("qwen3_moe", {"mlp_only_layers": [1, 3]}),
        ("deepseek_v3", {"first_k_dense_replace": 2}),
        ("glm4_moe", {"first_k_dense_replace": 2}),
        ("ernie4_5_moe", {"moe_layer_start_index": 2}),
        ("smollm3", {"no_rope_layers": [0, 1, 1, 0]}),
        ("llama4_text", {"moe_layers": [1, 3], "no_rope_layers": [1, 0, 1, 0]}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
        ("cohere2", {"layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]}),
        ("lfm2_moe", {}),
        ("gpt_neo", {}),
        ("minicpm3", {}),
        ("recurrent_gemma", {}),
        ("nemotron_h", {}),
        ("modernbert-decoder", {}),
        ("granitemoehybrid", {}),
    ],
)
@pytest.mark.parametrize("layers", [2, 3])
def test_a_pruned_model_is_the_model_with_its_layers_skipped(
    model_type: str, fields: dict[str, Any], layers: int, tmp_path: Path
) -> None:
    """Against the whole model, in which the layers that are left out return what they get."""
    whole, model = build(model_type, 512, **fields), build(model_type, 512, **fields)
    kept = models.prune_layers(model, layers)
    assert len(kept) == layers
    assert {kept[0], kept[-1]} == {0, 3}
    model.save_pretrained(tmp_path)
    models.prove_saved(model, tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    modules = decoder_layers(whole)
    for index in set(range(4)) - set(kept):
        skipped = _Skipped(model_type in ("bloom", "falcon", "gpt_neo", "gptj"))
        for name in ("attention_type", "layer_type", "block_type", "is_attention_layer", "mlp"):
            if hasattr(modules[index], name):
                setattr(skipped, name, getattr(modules[index], name))
        modules[index] = skipped
    torch.testing.assert_close(label_logps(saved), label_logps(whole), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "fields", "said"),
    [
        ("jamba", {}, r"no config of JambaForCausalLM says that the layers \[0, 2, 3\] are left .*expert_layer_period"),
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            "the saved config computes another model from the same weights",
        ),
        ("zamba2", {}, "Keep another number of layers, or use another model"),
    ],
)
def test_a_model_that_is_another_one_without_some_layers_is_not_pruned(
    model_type: str, fields: dict[str, Any], said: str, tmp_path: Path
) -> None:
    model = build(model_type, 512, **fields)

    def pruned() -> None:
        models.prune_layers(model, 3)
        model.save_pretrained(tmp_path)
        models.prove_saved(model, tmp_path)

    with pytest.raises(UserError, match=said):
        pruned()


def test_decoder_layers_are_those_with_the_most_parameters() -> None:
    """Not the experts of one layer, and not the layers of a vision tower, however many there are."""
    model = build("llama", 512)
    model.model.layers[0].experts = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(9))
    model.vision = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(9))
    assert decoder_layers(model) is model.model.layers


@pytest.mark.slow
def test_every_causal_model_is_pruned_or_refused_in_one_sentence(tmp_path: Path) -> None:
    done, refused = 0, []
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            model = build(model_type, 512)
        except NotTinyError:
            continue
        try:
            models.prune_layers(model, 3)
            model.save_pretrained(tmp_path / model_type)
            models.prove_saved(model, tmp_path / model_type)
        except UserError:
            refused.append(model_type)
        else:
            done += 1
    assert set(refused) <= {"diffllama", "hrm_text", "jamba", "xlm", "youtu", "zamba", "zamba2"}
    assert done > 110


@pytest.mark.parametrize("targets", [{"target_modules": ["q_proj", "embed_tokens"]}, {"target_modules": ["q_proj", "lm_head"]},
                                     {"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}])  # fmt: skip
def test_adapters_on_the_ends_of_a_tied_model_are_saved_as_they_were_trained(
    targets: dict[str, Any], tmp_path: Path
) -> None:
    model = build("llama", 512, tie_word_embeddings=True)
    assert models.ties_ends(model)
    adapted = models.add_lora(model, LoraConfig(rank=4, **{"target_modules": ["q_proj"], **targets}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    trained = label_logps(adapted.get_base_model())
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path)
    models.prove_saved(merged, tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(label_logps(saved), trained, atol=1e-4, rtol=1e-4)


def test_another_model_on_the_disk_is_found_by_the_names_of_its_weights(tmp_path: Path) -> None:
    model = build("llama", 512)
    model.save_pretrained(tmp_path)
    models.prove_saved(model, tmp_path)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(0.5)
    with pytest.raises(UserError, match=r"Weights that differ: model\.layers\.1\.mlp\.up_proj\.weight"):
        models.prove_saved(model, tmp_path)


def test_a_generation_config_that_cannot_be_saved_is_mended_before_training(tmp_path: Path) -> None:
    model = build("llama", 512)
    model.generation_config = GenerationConfig(temperature=0.6, top_p=0.9, eos_token_id=7)
    model.generation_config.do_sample = False
    with pytest.raises(ValueError, match="do_sample"):
        model.save_pretrained(tmp_path)
    assert "do_sample set to true" in models.mend_generation_config(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 0.6
    assert models.mend_generation_config(model) == ""


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    build("llama", 512).save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def _copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def test_incomplete_and_cut_checkpoints_are_refused_before_they_load(sharded: Path, tmp_path: Path) -> None:
    models.check_folder(sharded)
    missing = _copy(sharded, tmp_path / "missing")
    sorted(missing.glob("*.safetensors"))[1].unlink()
    with pytest.raises(UserError, match=r"1 of \d+ weight files are missing \(model-00002"):
        models.check_folder(missing)
    cut = _copy(sharded, tmp_path / "cut")
    file = sorted(cut.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="its header promises"):
        models.check_folder(cut)
    file.write_bytes(b"\xff" * 7)
    with pytest.raises(UserError, match="is cut or no safetensors file"):
        models.check_folder(cut)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="holds a config and no weights"):
        models.check_folder(pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="save_pretrained, which writes safetensors"):
        models.check_folder(pickled)


def test_weights_that_would_be_random_and_ids_without_an_embedding_are_refused(tmp_path: Path) -> None:
    model = build("llama", 512)
    weights = {name: p for name, p in model.state_dict().items() if "layers.1.mlp" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(UserError, match=r"lacks 3 weights, which would be random \(model\.layers\.1\.mlp\.down_proj"):
        models.load(tmp_path, dtype="float32")
    assert check_loaded("f", {"unexpected_keys": {"vision.a", "vision.b"}}) == (
        "2 weights of the checkpoint are not part of the language model (vision.a)"
    )
    with pytest.raises(
        UserError, match=r"512 tokens and the model's embedding 500 rows .*: call model.resize_token_embeddings\(512\)"
    ):
        models.check_vocabulary({"vocab_size": 500}, 500, 512, 512, "m")
    models.check_vocabulary({"vocab_size": 512}, 512, 512, 500, "m")


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "qwen3_moe", "mixtral", "opt", "lfm2"])
@pytest.mark.parametrize("adapted", [False, True])
def test_exported_weights_are_a_checkpoint_and_reach_another_model(
    model_type: str, adapted: bool, tmp_path: Path
) -> None:
    """By the names of the files that save_pretrained writes, adapters on experts, ends and layers merged in."""
    model, other = build(model_type, 512), build(model_type, 512)
    ends = [n for n, m in model.named_modules() if m is model.get_input_embeddings()]
    if adapted:
        model = models.add_lora(model, LoraConfig(rank=4, modules_to_save=ends))
        if not models.ties_ends(model.get_base_model()) and models.ties_ends(other):
            other = models.add_lora(other, LoraConfig(rank=4, modules_to_save=ends)).unload()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    trained = label_logps(model)
    models.copy_weights(other, models.exported_weights(model))
    torch.testing.assert_close(label_logps(other), trained, atol=1e-4, rtol=1e-4)
    exported = {name: tensor.clone() for name, tensor in models.exported_weights(model)}
    (model.merge_and_unload() if adapted else model).save_pretrained(tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    assert files.keys() == exported.keys()
    for name, tensor in files.items():
        torch.testing.assert_close(tensor, exported[name], atol=1e-5, rtol=1e-5)
    del exported["model.layers.1.mlp.experts.0.down_proj.weight" if "moe" in model_type else name]
    with pytest.raises(ValueError, match=r"weights are missing|no weight called"):
        models.copy_weights(other, exported.items())


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"modules_to_save": ["embed_out"]}, r"lora\.modules_to_save: the model has no module 'embed_out'"),
        ({"target_modules": ["q_proj", "v_prj"]}, r"lora\.target_modules: .* 'v_prj'\. Did you mean 'v_proj'"),
    ],
)
def test_a_module_that_the_model_does_not_have_is_not_left_out_in_silence(lora: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        models.add_lora(build("llama", 512), LoraConfig(rank=4, **lora))


def test_a_merge_that_goes_wrong_is_found_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    adapted = models.add_lora(build("gemma", 512), LoraConfig(rank=4))
    models.rehearse_merge(adapted)
    assert not float(sum(p.abs().sum() for n, p in adapted.named_parameters() if "lora_B" in n))
    monkeypatch.setattr(peft.PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
    with pytest.raises(UserError, match="with its adapter merged is not the model that is trained"):
        models.rehearse_merge(adapted)
