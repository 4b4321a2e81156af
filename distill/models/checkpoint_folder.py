"""Check a model folder before it is used: all weights there and whole, in a format that is read, for the tokenizer beside it."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.models.shape import text_part
from distill.records import UserError

INDEX = "model.safetensors.index.json"
CONVERT = "load it with transformers and save it with save_pretrained, which writes safetensors"


def check_folder(folder: Path) -> None:
    """Check that a model folder's weights are complete safetensors. Reads headers only. Raises UserError with the way out."""
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise UserError(f"{index}: is not an index of weights; download or save the model again.") from None
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise UserError(
                f"{folder}: {len(missing)} of {len(names)} weight files are missing ({', '.join(missing[:3])}); download or "
                "copy the model again."
            )
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".msgpack", ".h5"))
        if others:
            raise UserError(
                f"{folder}: holds {others[0]} and no safetensors, and pickled weights are not loaded: {CONVERT}."
            )
        raise UserError(f"{folder}: holds a config and no weights (*.safetensors).")
    for file in files:
        _check_file(file)


def _check_file(file: Path) -> None:
    """Compare a safetensors file's size with its header."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        first = opened.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
        if length > size - 8:
            raise UserError(f"{file}: is cut or no safetensors file ({size} bytes); download or save the model again.")
        try:
            header = json.loads(opened.read(length))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file}: has a damaged header; download or save the model again.") from None
    if size != 8 + length + end:
        raise UserError(
            f"{file}: has {size} bytes and its header promises {8 + length + end}; download or save the model again."
        )


def check_loaded(folder: Path | str, info: Mapping[str, Any]) -> str:
    """Refuse weights that were not in the checkpoint; return what was there and not used, for the user.

    info: transformers' loading info. Raises UserError.
    """
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise UserError(
            f"{folder}: the checkpoint lacks {len(missing)} weights, which would be random ({', '.join(missing[:3])}). Is it a "
            "model of another class, an adapter, or incomplete?"
        )
    if mismatched := list(info.get("mismatched_keys") or ()):
        name = mismatched[0][0] if isinstance(mismatched[0], tuple) else mismatched[0]
        raise UserError(f"{folder}: {len(mismatched)} weights have another shape than the config says ({name}).")
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
        raise UserError(
            f"{name}: the tokenizer has {num_tokens} tokens and the model's {which} {rows} rows (vocab_size "
            f"{text.get('vocab_size')}): call model.resize_token_embeddings({num_tokens}) and save the model."
        )
