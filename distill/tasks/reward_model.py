"""A trained reward model: computes one logit from prompt and completion. Each model is loaded once per process.

It reads the problem's conversation and the completion with its own tokenizer and chat template, never the policy's ids, and
without the task template's instructions: it judges the reply to the question. Generative judges are not supported.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill import models
from distill.recipe import Dtype, ModelConfig
from distill.records import Message, UserError

_loading = threading.Lock()


def load(path: str, dtype: Dtype = "auto") -> RewardModel:
    """Load the reward model of a folder or hub id once per process, on the GPU if there is one."""
    with _loading:
        return _load(path, dtype)


@functools.cache
def _load(path: str, dtype: Dtype) -> RewardModel:
    folder = models.resolve(ModelConfig(source=path))
    if dtype == "auto":
        dtype = models.auto_dtype(folder)
    return RewardModel(_classifier(folder, dtype, path), models.load_tokenizer(folder))


def _classifier(folder: Path, dtype: Dtype, path: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.num_labels != 1:
        raise UserError(
            f"reward model {path!r} has num_labels = {config.num_labels}, but a Bradley-Terry reward model is a sequence "
            "classifier with one label (one logit). Use a model that was trained that way."
        )
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"reward model {path!r} has no weights for {', '.join(missing[:3])}, so it is not a trained reward model."
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


class RewardModel:
    """A sequence classifier with one label and its tokenizer."""

    def __init__(self, classifier: Any, tokenizer: Any) -> None:
        self._classifier, self._tokenizer = classifier, tokenizer
        self._tokenizer.padding_side = "right"
        config = classifier.config
        if config.pad_token_id is None:
            # The classifier reads the last position that is not padding, so its config must name the padding id.
            config.pad_token_id = tokenizer.pad_token_id
        self._pads = config.pad_token_id is not None and tokenizer.pad_token_id is not None
        self._max_tokens = getattr(config, "max_position_embeddings", None)
        self._lock = threading.Lock()

    def score(
        self,
        messages: Sequence[Message],
        texts: Sequence[str],
        *,
        sigmoid: bool = False,
        batch_size: int = 8,
    ) -> list[float | None]:
        """Return a logit (or its sigmoid) for each text as the reply to `messages`; None if both are too long together."""
        ids = [self._encode(messages, text) for text in texts]
        fits = [n for n, row in enumerate(ids) if not self._max_tokens or len(row) <= self._max_tokens]
        # Texts of similar length share a batch, so that there is little padding.
        fits.sort(key=lambda n: len(ids[n]))
        size = batch_size if self._pads else 1
        scores: list[float | None] = [None] * len(texts)
        with self._lock:
            for start in range(0, len(fits), size):
                batch = fits[start : start + size]
                logits = self._forward([ids[n] for n in batch], sigmoid)
                for n, logit in zip(batch, logits, strict=True):
                    scores[n] = logit
        return scores

    def _encode(self, messages: Sequence[Message], text: str) -> list[int]:
        """Return the conversation's ids: through the chat template, or as question and reply for a tokenizer without one."""
        tokenizer = self._tokenizer
        if not tokenizer.chat_template:
            return list(tokenizer(messages[-1]["content"], text)["input_ids"])
        conversation = [*messages, {"role": "assistant", "content": text}]
        rendered = models.conversation_text(tokenizer, conversation)
        return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def _forward(self, ids: list[list[int]], sigmoid: bool) -> list[float]:
        import torch

        padding = {"padding": len(ids) > 1, "return_tensors": "pt"}
        inputs = self._tokenizer.pad({"input_ids": ids}, **padding).to(self._classifier.device)
        with torch.inference_mode():
            logit_N = self._classifier(**inputs).logits[:, 0].float()
        scored: list[float] = (logit_N.sigmoid() if sigmoid else logit_N).tolist()
        return scored
