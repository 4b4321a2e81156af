"""More tiny models, and traces that one of them wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

FOREIGN_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}[assistant] "
)


@pytest.fixture(scope="session")
def other_dir(tiny_dir, tokenizer, tmp_path_factory) -> Path:
    """The tiny model with other weights."""
    import torch

    from distill import models

    model = models.load(tiny_dir, dtype="float32")
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("other")
    models.save(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def narrow_dir(tokenizer, tmp_path_factory) -> Path:
    """A tiny model with another tokenizer: whole words, cut at white space."""
    import torch
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from distill import models

    words = [
        "<unk>",
        "<eos>",
        *"0123456789",
        "+",
        "-",
        "=",
        "?",
        "<",
        ">",
        "think",
        "user",
        "assistant",
    ]
    backend = Tokenizer(kinds.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256, eos_token_id=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("narrow")
    models.save(LlamaForCausalLM(config), fast, folder)
    return folder


@pytest.fixture(scope="session")
def written(tiny_dir, tmp_path_factory) -> Path:
    """The traces of the first teacher, made once."""
    from scored_runs import context

    from distill.stages import generate

    run = tmp_path_factory.mktemp("written")
    ctx = context(run, {"a": tiny_dir, "b": tiny_dir}, "traces")
    generate.run(ctx.recipe.stages["traces"], ctx)
    return run / "traces"


@pytest.fixture(scope="session")
def foreign_dir(mistral, tmp_path_factory):
    """A tiny random model behind Mistral's tokenizer, with a chat template of its own."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from distill import models

    torch.manual_seed(3)
    mistral.chat_template = FOREIGN_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(mistral), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("foreign")
    models.save(LlamaForCausalLM(config), mistral, folder)
    return folder
