"""Load tokenizers, compare them, and find the ids that end a completion."""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.errors import DataError, in_a_line
from distill.files import read_json
from distill.models.rendering import turn_end_ids
from distill.models.shape import text_part
from distill.records import Template, UserError, stable_hash


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a local model folder. Raises DataError if it is missing or damaged."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # `tokenizers` raises plain Exception for a damaged file
        raise DataError(
            f"{folder}: the tokenizer cannot be loaded ({in_a_line(error)}): copy its files again from the model that these weights come "
            "from."
        ) from None


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a hash over vocabulary, merges and special tokens: equal exactly if the same text gives the same ids.

    Remembered for each tokenizer until a token is added, because it takes a second for a vocabulary of 150,000.
    """
    sizes = (len(tokenizer), len(tokenizer.added_tokens_decoder))
    known = _fingerprints.get(tokenizer)
    if known is None or known[0] != sizes:
        known = _fingerprints[tokenizer] = (sizes, _fingerprint(tokenizer))
    return known[1]


_fingerprints: weakref.WeakKeyDictionary[Any, tuple[tuple[int, int], str]] = weakref.WeakKeyDictionary()
"""By tokenizer: its sizes when its fingerprint was computed, and the fingerprint."""


def _fingerprint(tokenizer: Any) -> str:
    state = json.loads(tokenizer.backend_tokenizer.to_str()) if hasattr(tokenizer, "backend_tokenizer") else {}
    merges = state.get("model", {}).get("merges", [])
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    specials = sorted(
        (token_id, token.content, token.special) for token_id, token in tokenizer.added_tokens_decoder.items()
    )
    return stable_hash(json.dumps([vocabulary, merges, specials], ensure_ascii=True))


def template_hash(tokenizer: Any) -> str:
    """Return a hash of the chat template; empty for a tokenizer without one."""
    return stable_hash(tokenizer.chat_template) if tokenizer.chat_template else ""


def vocabulary_size(tokenizer: Any, config: Mapping[str, Any]) -> int:
    """Return the number of tokens that a model can read and write: the tokenizer's, less added tokens above the config's
    vocab_size (Gemma 3 1B's tokenizer has a token for images that its model does not know)."""
    rows = int(text_part(config).get("vocab_size", len(tokenizer)))
    unknown_to_model = range(rows, len(tokenizer))
    return rows if unknown_to_model and set(unknown_to_model) <= set(tokenizer.added_tokens_decoder) else len(tokenizer)


def check_same_tokenizer(written_by: str, vocab_size: int, tokenizer: Any, where: str) -> None:
    """Refuse stored distributions of another tokenizer, even one of the same size.

    written_by, vocab_size: the tokenizer fingerprint and length in the traces' metadata.
    """
    mine = tokenizer_fingerprint(tokenizer)
    if (written_by, vocab_size) != (mine, len(tokenizer)):
        raise UserError(
            f"{where}: the traces' distributions are over another tokenizer ({written_by}, {vocab_size} tokens) than "
            f"the student's ({mine}, {len(tokenizer)} tokens): their ids mean other text. Learn from the text instead, "
            "with loss: {fn: cross_entropy}, or take a teacher that shares the student's tokenizer."
        )


def stop_ids(folder: str | Path, tokenizer: Any, template: Template | None = None) -> tuple[int, ...]:
    """Return the ids that end a completion: the generation config's, the chat template's and the tokenizer's EOS.

    template: with its options, which may choose one of several chat templates; without, the ends of all of them. Raises
    UserError if a chat template refuses an assistant's turn.
    """
    path = Path(folder) / "generation_config.json"
    stored = read_json(path).get("eos_token_id") if path.is_file() else None
    ids = stored if isinstance(stored, list) else [stored]
    turn = turn_end_ids(tokenizer, template)
    return tuple(sorted({int(i) for i in (*ids, *turn, tokenizer.eos_token_id) if i is not None}))
