"""Chat templates of many families, as TRL ships them, on a real tokenizer with the special tokens that they write."""

from __future__ import annotations

import functools
import importlib.resources
import re
from typing import Any

from transformers import AutoTokenizer

FAMILIES = sorted(
    path.name.removesuffix(".jinja")
    for path in (importlib.resources.files("trl") / "chat_templates").iterdir()
    if path.name.endswith(".jinja") and not path.name.endswith("_training.jinja")
)
SPECIAL = re.compile(
    r"<\|[^|<>'\"{}\s]{1,40}\|>|<｜[^｜<>'\"{}]{1,40}｜>|\[/?[A-Z_]{3,25}\]|</?(?:start_of_turn|end_of_turn|bos|eos|s)>|<turn\|>|<channel\|>|<end_of_utterance>"
)
ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<｜end▁of▁sentence｜>",
    "<|return|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|end|>",
    "<end_of_turn>",
)


def source(family: str) -> str:
    return (importlib.resources.files("trl") / "chat_templates" / f"{family}.jinja").read_text(encoding="utf-8")


@functools.cache
def family_tokenizer(folder: Any, family: str) -> Any:
    return with_template(folder, source(family))


def with_template(folder: Any, chat_template: Any) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = chat_template if isinstance(chat_template, str) else " ".join(chat_template.values())
    found = sorted(set(SPECIAL.findall(text)) - set(tokenizer.get_vocab()))
    tokenizer.add_special_tokens({"additional_special_tokens": found})
    tokenizer.chat_template = chat_template
    tokenizer.eos_token = next((end for end in ENDS if end in text), tokenizer.eos_token)
    return tokenizer
