"""Check before a run that a model folder loads whole: config, tokenizer, and every weight's name and shape. Loads no weights."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from distill.errors import DataError, in_a_line
from distill.models.checkpoint_folder import check_folder, check_loaded, has_tokenizer, read_config, weight_headers
from distill.models.loading import model_class
from distill.models.shape import text_part
from distill.models.tokenizer import load_tokenizer, stop_ids

LAYER = re.compile(r"(?P<layers>.*?\.(?:layers|h|blocks))\.(?P<number>\d+)\.(?P<rest>.+)")


def check_model(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Check a local model folder; return its tokenizer. Raises UserError with the way out.

    The names and shapes in the files' headers go through transformers' own loading, onto no device: its conversions and
    ties count. Quantised weights and a model's own code are checked when they are loaded.
    """
    check_folder(folder)
    config = read_config(folder)
    check_code(folder, config, trust_remote_code)
    tokenizer = check_tokenizer(folder, trust_remote_code)
    if not trust_remote_code and not quantised_as(config):
        _check_weights(folder)
    _check_ids(folder, config, tokenizer)
    return tokenizer


def quantised_as(config: Mapping[str, Any]) -> str:
    """Return the method by which a checkpoint's weights are quantised; "" for plain weights."""
    stored = config.get("quantization_config") or text_part(config).get("quantization_config") or {}
    return str(stored.get("quant_method") or ("bitsandbytes" if stored else ""))


def check_code(folder: Path, config: Mapping[str, Any], trust_remote_code: bool) -> None:
    """Refuse a model that needs its own Python code where the recipe does not allow it, and an unknown type of model."""
    if trust_remote_code:
        return
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    if config.get("auto_map") and config.get("model_type") not in CONFIG_MAPPING:
        raise DataError(
            f"{folder}: the model comes with Python code of its own (auto_map), which is not run unless the recipe allows it: "
            "read the code, then set trust_remote_code: true at the model."
        )
    model_class(folder)
    try:
        AutoConfig.from_pretrained(folder, local_files_only=True)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{folder}/config.json: transformers cannot read it ({in_a_line(error)}).") from None


def check_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a model folder. Raises UserError if it is missing or damaged."""
    if not has_tokenizer(folder) and not trust_remote_code:
        raise DataError(
            f"{folder}: holds no tokenizer (tokenizer.json or tokenizer.model): copy the tokenizer's files from the model that "
            "these weights come from."
        )
    return load_tokenizer(folder, trust_remote_code=trust_remote_code)


def _check_weights(folder: Path) -> None:
    """Compare the weights' names and shapes with the model that config.json describes."""
    import torch
    from transformers import AutoConfig
    from transformers.utils import logging

    headers = weight_headers(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    kind = model_class(folder)._model_mapping[type(config)]
    kind = kind[0] if isinstance(kind, tuple) else kind
    weights = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in headers.items()}
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=torch.bfloat16,
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    check_loaded(folder, info)
    _check_unused(folder, model.state_dict().keys(), headers, info.get("unexpected_keys") or ())


def _check_unused(folder: Path, used: Collection[str], headers: Collection[str], unused: Collection[str]) -> None:
    """Refuse weights of decoder layers that the config does not have: the model would compute something else.

    Layers that predict further tokens stand after the last layer and have other weights than it: they are no part of the
    language model.
    """
    layers: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in used:
        if found := LAYER.fullmatch(name):
            layers[found["layers"]][int(found["number"])].add(found["rest"])
    extra: dict[tuple[str, int], set[str]] = defaultdict(set)
    for name in unused:
        if found := LAYER.fullmatch(name):
            extra[found["layers"], int(found["number"])].add(found["rest"])
    for (where, number), rest in sorted(extra.items()):
        known = layers.get(where)
        if not known:
            continue
        if number not in known:
            if any(rest == same for same in known.values()):
                raise DataError(
                    f"{folder}: the files hold a layer {where}.{number} and config.json has {len(known)} layers "
                    "(num_hidden_layers): the layers above would be dropped; copy the config.json that belongs to the weights."
                )
            continue
        # A mask stored as `attn.bias` has no weight beside it.
        for name in sorted(rest):
            whole = f"{where}.{number}.{name}"
            module, _, last = whole.rpartition(".")
            if last == "weight" or (last == "bias" and f"{module}.weight" in headers):
                raise DataError(
                    f"{folder}: the files hold {whole}, which the model of config.json does not have: it would be dropped; copy "
                    "the config.json that belongs to the weights."
                )


def _check_ids(folder: Path, config: Mapping[str, Any], tokenizer: Any) -> None:
    """Refuse a tokenizer whose tokens above the embedding occur: in the chat template, as stop ids, or as ordinary text."""
    rows = text_part(config).get("vocab_size")
    if not isinstance(rows, int) or len(tokenizer) <= rows:
        return
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    stops = stop_ids(folder, tokenizer)
    added = tokenizer.added_tokens_decoder
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if number >= rows and (number not in added or token in template or number in stops):
            raise DataError(
                f"{folder}: the tokenizer's token {token!r} has id {number} and the model {rows} embeddings: take the model's own "
                f"tokenizer, or call model.resize_token_embeddings({len(tokenizer)}) and save the model."
            )
