"""Tiny random models whose tokens are bytes: their tokenizer is read and their steps are made in no time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHAT = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"


def tokenizer(*more: str, chat: bool = True) -> Any:
    """A tokenizer of bytes with a chat template. more: further tokens, which make it another tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {sign: n for n, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>")
    made.add_special_tokens({"additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>", *more]})
    made.chat_template = CHAT if chat else None
    return made


def save(folder: Path, layers: int, tokens: Any, says: str = "", to: tuple[str, ...] = ()) -> Path:
    """Save a model. says: what it learns to answer to prompts of which each ends in one of `to`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from distill import models

    torch.manual_seed(layers)
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True, initializer_range=0.2,
        eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ends = tokens(says + "<|end|>", add_special_tokens=False)["input_ids"]
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(150 if says else 0):
        ids = torch.tensor([[*tokens(to[step % len(to)], add_special_tokens=False)["input_ids"], *ends]])
        loss = torch.nn.functional.cross_entropy(
            model(input_ids=ids).logits[0, -len(ends) - 1 : -1], torch.tensor(ends)
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert not says or loss.item() < 0.1
    models.save(model, tokens, folder)
    return folder
