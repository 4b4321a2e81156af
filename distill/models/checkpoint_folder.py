"""Check a model folder before it is used: all weights there and whole, in a format that is read, for the tokenizer beside it."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.errors import DataError, UserError
from distill.models.shape import text_part

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
CONVERT = "load it with transformers and save it with save_pretrained, which writes safetensors"
LFS = b"version https://git-lfs"
ADAPTER = "adapter_config.json"
READ_ENDS = (".safetensors", ".json", ".model", ".txt", ".jinja", ".tiktoken")
"""The ends of the names of files that are read from a model's folder."""
VOCABULARY = re.compile(r"(tokenizer\.|vocab|spiece|sentencepiece|tekken|merges|bpe|.*\.(model|tiktoken|spm)$)")
"""The names of files that hold a tokenizer's vocabulary; tokenizer_config.json alone is no tokenizer."""
OTHER_FORMATS = {
    ".gguf": "a GGUF file is read only as package://<installed package>/<file>.gguf; name the model in transformers format",
    ".h5": "TensorFlow's weights are not read; name a copy with safetensors",
    ".msgpack": "Flax's weights are not read; name a copy with safetensors",
}
"""What to do with weights that are not safetensors, by the end of the file's name; all others are pickled."""


def check_folder(folder: Path) -> None:
    """Check that a folder is a model in transformers format, with complete safetensors. Reads headers only.

    Raises UserError with the way out.
    """
    check_is_model(folder)
    read_config(folder)
    _check_pointers(folder)
    for file, names in _weight_files(folder).items():
        there = check_file(file)
        if missing := sorted(names - there.keys()):
            raise DataError(
                f"{file}: lacks {len(missing)} of the weights that {INDEX} says it holds ({missing[0]}): the index belongs to "
                "other files; download or save the model again."
            )


def is_whole(folder: Path) -> bool:
    """Whether a folder holds a model with all of its weights and a tokenizer."""
    try:
        check_folder(folder)
    except UserError:
        return False
    return has_tokenizer(folder)


def check_is_model(folder: Path) -> None:
    """Check that a folder holds a model's config and no adapter. Raises UserError that says what the folder is instead."""
    adapter, config = folder / ADAPTER, folder / "config.json"
    if adapter.is_file():
        base = _read_json(adapter).get("base_model_name_or_path") or "a model that it does not name"
        beside = " beside another model's config" if config.is_file() else ""
        raise DataError(
            f"{folder}: holds a LoRA adapter for {base}{beside}, which is not a model of its own: merge it with peft "
            "(AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(NEW)), save the tokenizer to "
            "NEW too, and name NEW."
        )
    if config.is_file():
        return
    nearby = [*folder.glob("*/config.json"), *folder.glob("*/*/config.json")]
    nearby += [parent / "model" / "config.json" for parent in folder.resolve().parents[:2]]
    models = sorted({str(path.parent) for path in nearby if path.is_file()})
    if models:
        raise DataError(f"{folder}: is not a model's folder (it holds no config.json); name {' or '.join(models[:3])}.")
    others = _other_weights(folder)
    if others:
        raise DataError(f"{folder}: holds no config.json and {others[0]}: {_way_out(others[0])}.")
    raise DataError(f"model folder {str(folder)!r} holds no config.json. Name a folder in transformers format.")


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json. Raises UserError if it is damaged or names no type of model."""
    config = _read_json(folder / "config.json")
    if not config.get("model_type") and not config.get("auto_map"):
        raise DataError(
            f"{folder}/config.json: has no model_type, so that nobody can tell what the weights are; copy the config.json that "
            "belongs to them."
        )
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        if path.read_bytes().startswith(LFS):
            raise DataError(_pointer(path)) from None
        raise DataError(f"{path}: is not JSON ({error}); download or save the model again.") from None
    if not isinstance(loaded, dict):
        raise DataError(f"{path}: is not a JSON object; download or save the model again.")
    return loaded


def _pointer(path: Path) -> str:
    return f"{path}: is a git LFS pointer, not the file itself: run `git lfs pull` in {path.parent}, or download the model."


def _check_pointers(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        small = path.suffix in READ_ENDS and path.is_file() and path.stat().st_size < 1024
        if small and path.read_bytes().startswith(LFS):
            raise DataError(_pointer(path))


def _weight_files(folder: Path) -> dict[Path, set[str]]:
    """Return the files that transformers reads, each with the names that the index promises in it. Raises UserError."""
    index, single = folder / INDEX, folder / WEIGHTS
    if not index.is_file():
        if single.is_file():
            return {single: set()}
        if others := sorted(path.name for path in folder.glob("*.safetensors")):
            if others[0].startswith("consolidated"):
                way = f"it is in Mistral's own format: name a copy in transformers format, with {WEIGHTS}"
            elif len(others) > 1:
                way = f"several files need {INDEX}: download it, or save the model again"
            else:
                way = f"transformers reads {WEIGHTS}: rename it if it holds the whole model"
            raise DataError(f"{folder}: holds {others[0]} and neither {WEIGHTS} nor {INDEX}; {way}.")
        if others := _other_weights(folder):
            raise DataError(f"{folder}: holds {others[0]} and no safetensors: {_way_out(others[0])}.")
        raise DataError(f"{folder}: holds a config and no weights (*.safetensors).")
    files: dict[Path, set[str]] = {}
    try:
        for name, file in _read_json(index)["weight_map"].items():
            files.setdefault(folder / file, set()).add(name)
    except (KeyError, AttributeError, TypeError):
        raise DataError(f"{index}: is not an index of weights; download or save the model again.") from None
    if single.is_file() and {*files} != {single}:
        raise DataError(
            f"{folder}: holds {WEIGHTS} and an index of other files ({INDEX}), which may be two different models: remove the "
            "one that is left over."
        )
    if missing := sorted(file.name for file in files if not file.is_file()):
        raise DataError(
            f"{folder}: {len(missing)} of {len(files)} weight files are missing ({', '.join(missing[:3])}); download or "
            "copy the model again."
        )
    return files


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a file with a tokenizer's vocabulary."""
    return any(VOCABULARY.match(path.name) for path in folder.iterdir())


def weight_headers(folder: Path) -> dict[str, list[int]]:
    """Return the shape of every weight that transformers reads from a folder, by name."""
    return {name: shape for file in _weight_files(folder) for name, shape in check_file(file).items()}


def _other_weights(folder: Path) -> list[str]:
    ends = (".bin", ".pt", ".pth", *OTHER_FORMATS)
    found = [path.name for path in folder.iterdir() if path.suffix in ends and path.name != "training_args.bin"]
    return sorted(found)


def _way_out(file: str) -> str:
    return OTHER_FORMATS.get(Path(file).suffix, f"pickled weights are not loaded: {CONVERT}")


def check_file(file: Path) -> dict[str, list[int]]:
    """Compare a safetensors file's size with its header; return the shapes of its weights. Raises UserError."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        first = opened.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
        if length > size - 8:
            raise DataError(f"{file}: is cut or no safetensors file ({size} bytes); download or save the model again.")
        try:
            header = json.loads(opened.read(length))
            weights = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = max((entry["data_offsets"][1] for entry in weights.values()), default=0)
            shapes = {name: list(entry["shape"]) for name, entry in weights.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f"{file}: has a damaged header; download or save the model again.") from None
    if size != 8 + length + end:
        raise DataError(
            f"{file}: has {size} bytes and its header promises {8 + length + end}; download or save the model again."
        )
    return shapes


def check_loaded(folder: Path | str, info: Mapping[str, Any]) -> str:
    """Refuse weights that were not in the checkpoint; return what was there and not used, for the user.

    info: transformers' loading info. Raises UserError.
    """
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise DataError(
            f"{folder}: the checkpoint lacks {len(missing)} weights, which would be random ({', '.join(missing[:3])}). Is it a "
            "model of another class, an adapter, or incomplete?"
        )
    if mismatched := list(info.get("mismatched_keys") or ()):
        name = mismatched[0][0] if isinstance(mismatched[0], tuple) else mismatched[0]
        raise DataError(f"{folder}: {len(mismatched)} weights have another shape than the config says ({name}).")
    unused = sorted(info.get("unexpected_keys") or ())
    return f"{len(unused)} weights of the checkpoint are not part of the language model ({unused[0]})" if unused else ""


def check_vocabulary(
    config: Mapping[str, Any], embedding_rows: int, head_rows: int, num_tokens: int, name: str
) -> None:
    """Refuse a tokenizer with more tokens than the model has embeddings or logits for. Raises UserError."""
    text = text_part(config)
    rows = min(embedding_rows, head_rows)
    if num_tokens > rows:
        which = "embedding" if embedding_rows <= head_rows else "output head"
        raise DataError(
            f"{name}: the tokenizer has {num_tokens} tokens and the model's {which} {rows} rows (vocab_size "
            f"{text.get('vocab_size')}): call model.resize_token_embeddings({num_tokens}) and save the model."
        )
