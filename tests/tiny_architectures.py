"""Tiny random models of any causal architecture of transformers, built from its config class alone."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "embedding_size", "lru_width"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "mamba_intermediate", "dim_model_base"), 32),
    **dict.fromkeys(
        ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size", "shared_intermediate_size"), 48
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "num_experts_per_tok", "num_kv_heads"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "linear_num_value_heads"), 4),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "attention_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "mamba_d_head", "mamba_head_dim", "ssm_state_size"), 8),
    **dict.fromkeys(("sliding_window", "attention_window_size"), 8),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 512),
}
LAYERS = ("layer_types", "layers_block_type", "mlp_layer_types")
OFTEN_NONE = ("head_dim", "num_key_value_heads")
FIELDS: dict[str, dict[str, Any]] = {
    **{key: {"rotary_dim": 8} for key in ("gptj", "codegen")},
    **{
        key: {"head_dim": 8}
        for key in ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "youtu", "minicpm3", "axk1")
    },
    "mamba2": {"num_heads": 8},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "roc_bert": {"enable_pronunciation": False, "enable_shape": False},
}
MOST_PARAMETERS = 4_500_000


class NotTinyError(Exception):
    """The config class has sizes of its own that this module does not know."""


def build(model_type: str, vocab_size: int, **fields: Any) -> Any:
    """Return a random float32 model with a few layers of every kind; norms, biases, sinks and gates are random too."""
    try:
        kind = type(AutoConfig.for_model(model_type))
    # A class without defaults for its parts.
    except Exception as error:
        raise NotTinyError(type(error).__name__) from None
    config = _config(kind, vocab_size, {**FIELDS.get(model_type, {}), **fields})
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if size > MOST_PARAMETERS + 64 * vocab_size:
            raise NotTinyError(f"{size} parameters")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.dim() >= 2:
                    parameter.copy_(0.35 * noise)
                else:
                    parameter.add_(0.1 * noise)
            model(torch.randint(1, vocab_size, (1, 12), generator=generator), use_cache=False)
    # Any config class may refuse these sizes in its own way.
    except Exception as error:
        raise NotTinyError(
            f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
        ) from None
    return model


def _config(kind: Any, vocab_size: int, fields: dict[str, Any]) -> Any:
    try:
        plain = kind()
    # A class without defaults for its parts.
    except Exception as error:
        raise NotTinyError(f"{type(error).__name__}") from None
    sizes = {k: v for k, v in SIZES.items() if _is_number(_value(plain, k))}
    sizes |= {k: SIZES[k] for k in OFTEN_NONE if k in plain.to_dict() and _value(plain, k) is None}
    if "kv_lora_rank" in sizes:
        sizes["num_key_value_heads"] = sizes.get("num_attention_heads", 4)
    if "qk_rope_head_dim" in sizes:
        sizes["head_dim"] = sizes["qk_rope_head_dim"] + sizes.get("qk_nope_head_dim", 8)
    for key in LAYERS:
        value = _value(plain, key)
        if isinstance(value, list) and len(value) > 4:
            kinds = list(dict.fromkeys(value))
            sizes[key] = (kinds * 4)[:4]
    sizes |= {"vocab_size": vocab_size, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, **fields}
    for chosen in (
        sizes,
        {k: v for k, v in sizes.items() if k != "head_dim"},
        {k: v for k, v in sizes.items() if k not in LAYERS},
    ):
        try:
            return kind(**chosen)
        # A class may refuse a size that it derives itself.
        except Exception:
            continue
    raise NotTinyError("its config takes none of the sizes")


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _value(config: Any, key: str) -> Any:
    try:
        return getattr(config, key, None)
    # Some configs refuse to give an attribute that varies over layers.
    except Exception:
        return None
