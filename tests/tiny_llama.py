"""A few random layers of a Llama, behind any tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def save(tokenizer: Any, folder: Path, layers: int = 2) -> Path:
    """Save the model, tied embeddings, fp32, with its tokenizer.

    Its heads are as wide as the narrowest that vLLM's attention on CPUs takes.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from distill import models

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    models.save(LlamaForCausalLM(config), tokenizer, folder)
    return folder
