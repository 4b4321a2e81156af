"""The sizes of a model that determine its FLOPs and memory, read from its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from distill.records import UserError

PLAIN_MLP = {"gpt2", "gpt_neox", "gptj", "opt", "bloom", "falcon", "phi", "starcoder2"}
"""Model types whose MLP is two matrices; all others are taken as gated, with three."""
TIED = {"gemma", "gemma2", "gemma3", "gemma3_text", "cohere", "cohere2"}
"""Model types whose output head is the embedding unless the config says otherwise."""
WINDOW_PATTERN = {"gemma2": 2, "gemma3_text": 6, "gemma3": 6, "cohere2": 4, "gpt_oss": 2}
"""Model types of which every n-th layer attends to all positions and the others to a window."""
HEAD_NORMS = {"qwen3", "qwen3_moe", "gemma3", "gemma3_text", "olmo2", "olmo3"}
"""Model types that normalise queries and keys."""
FUSED = {"phi3"}
"""Model types whose q, k, v are one matrix, and gate and up another."""
FOUR_NORMS = {"gemma2", "gemma3", "gemma3_text"}
"""Model types with a norm before and after attention and MLP."""


# ------------------------------------------------------------------------------------------------- shapes


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a decoder that determine its FLOPs and memory.

    intermediate: the MLP's width that a token passes, the mean over layers. stored: the width that is stored, which is more
    for a mixture of experts; 0 = the same. window: positions that `windowed` of the layers attend to; the others attend to
    all. attention: matmul parameters of a layer's attention, and cached: values that it caches for a token, both 0 = by the
    number of heads. norms: of the hidden state, in a layer. head_norms: whether queries and keys are normalised. softcap:
    whether attention scores are capped. experts: their number, 0 without any. fused: whether one matrix gives queries, keys
    and values, and one gate and up.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    gated: bool = True
    stored: int = 0
    window: int = 0
    windowed: int = 0
    attention: int = 0
    cached: int = 0
    norms: int = 2
    head_norms: bool = False
    softcap: bool = False
    experts: int = 0
    fused: bool = False

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> ModelShape:
        """Read a transformers config.json, of a decoder alone or as the text part of a larger model.

        Mixtures of experts count the experts that a token passes; layers that are not attention (convolutions, state-space
        models) count as matrices of the MLP's size. Raises UserError if the width or the number of layers is missing.
        """
        config = text_part(config)

        def size(*keys: str) -> int:
            return next((int(config[key]) for key in keys if isinstance(config.get(key), int) and config[key]), 0)

        hidden = size("hidden_size", "n_embd", "d_model", "dim", "embed_dim")
        layers = size("num_hidden_layers", "n_layer", "n_layers", "num_layers") or _listed(config)
        vocab = size("vocab_size")
        missing = [
            name
            for name, found in {"hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": vocab}.items()
            if not found
        ]
        if missing:
            raise UserError(f"config.json: {missing[0]} is missing; the model's cost cannot be counted.")
        heads = size("num_attention_heads", "n_head", "n_heads", "num_heads")
        active, stored = _mlp_widths(config, hidden, layers)
        kind = config.get("model_type")
        plain = kind in PLAIN_MLP
        window, windowed = _windows(config, layers)
        head_dim = size("head_dim") or (hidden // heads if heads else 0)
        attention, cached = 0, 0
        if latent := size("kv_lora_rank"):
            attention, cached, head_dim = _latent_attention(config, hidden, heads, latent)
        return ModelShape(
            layers=layers,
            hidden=hidden,
            intermediate=active,
            heads=heads,
            kv_heads=size("num_key_value_heads", "num_kv_heads", "n_head_kv") or heads,
            head_dim=head_dim,
            vocab=vocab,
            # transformers leaves the key out of config.json where it has its default.
            tied=bool(config.get("tie_word_embeddings", plain or kind in TIED)),
            gated=not plain,
            stored=stored,
            window=window,
            windowed=windowed,
            attention=attention,
            cached=cached,
            norms=4 if kind in FOUR_NORMS else 2,
            head_norms=kind in HEAD_NORMS,
            softcap=config.get("attn_logit_softcapping") is not None,
            experts=_num_experts(config),
            fused=kind in FUSED,
        )

    @staticmethod
    def from_params(params: float) -> ModelShape:
        """A typical shape with about `params` parameters, for when only the count is known."""
        small = params < 1e9
        vocab, ratio = (49_152, 32) if small else (128_256, 96)
        low, high = 1.0, 1e5
        for _ in range(60):
            hidden = (low + high) / 2
            total = 12 * (hidden / ratio + 8) * hidden**2 + vocab * hidden * (1 if small else 2)
            low, high = (hidden, high) if total < params else (low, hidden)
        width = max(64, round(low / 64) * 64)
        body = params - vocab * width * (1 if small else 2)
        # Attention without grouped heads is 4 H^2 and an MLP of 8/3 H is 8 H^2: 12 H^2 a layer.
        layers = max(1, round(body / (12 * width**2)))
        return ModelShape(layers, width, width * 8 // 3, width // 64, width // 64, 64, vocab, tied=small)

    def with_layers(self, layers: int) -> ModelShape:
        """The same model pruned to `layers`."""
        return replace(self, layers=layers, windowed=round(self.windowed * layers / self.layers))

    @property
    def params_layer(self) -> int:
        """Matmul parameters of one layer: q and o, k and v, the MLP."""
        by_heads = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return (self.attention or by_heads) + (3 if self.gated else 2) * self.hidden * self.intermediate

    @property
    def params_body(self) -> int:
        return self.layers * self.params_layer

    @property
    def params_head(self) -> int:
        return self.hidden * self.vocab

    @property
    def params_matmul(self) -> int:
        """N: parameters in matmuls, the head included, the embedding not."""
        return self.params_body + self.params_head

    @property
    def params_total(self) -> int:
        """All that is stored: an untied model's embedding, every expert, and the norms' scales too."""
        norms = (self.norms * self.layers + 1) * self.hidden
        idle = max(self.stored - self.intermediate, 0) * (3 if self.gated else 2) * self.hidden * self.layers
        return self.params_matmul + idle + norms + (0 if self.tied else self.params_head)

    @property
    def is_mixture(self) -> bool:
        """Whether a token passes a part of the MLP only."""
        return self.stored > self.intermediate

    def cached_values(self, length: float) -> float:
        """Keys and values that all layers cache for a sequence of `length` tokens; grouped heads count once, and layers with
        a window keep the window only."""
        each = self.cached or 2 * self.kv_heads * self.head_dim
        return each * ((self.layers - self.windowed) * length + self.windowed * min(length, self.window))

    def attended(self, context: float) -> float:
        """Positions that a token attends to, the mean over layers, where full attention has `context`."""
        share = self.windowed / self.layers
        return (1 - share) * context + share * min(context, self.window)


EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
CHOSEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "top_k_experts",
    "experts_per_token",
    "moe_top_k",
)


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config of the language model, which a composite model's config holds as a section."""
    for key in ("text_config", "llm_config", "language_config", "decoder"):
        if isinstance(config.get(key), Mapping):
            return {"tie_word_embeddings": config.get("tie_word_embeddings", False), **config[key]}
    return config


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int, int]:
    """Return the window of sliding attention and the number of layers that have it; (0, 0) without one."""
    window = config.get("sliding_window")
    if not isinstance(window, int) or config.get("use_sliding_window") is False:
        return 0, 0
    if kinds := config.get("layer_types"):
        return window, sum(kind == "sliding_attention" for kind in kinds)
    pattern = config.get("sliding_window_pattern") or WINDOW_PATTERN.get(config.get("model_type", ""))
    return window, layers - layers // pattern if isinstance(pattern, int) else layers


def _latent_attention(config: Mapping[str, Any], hidden: int, heads: int, latent: int) -> tuple[int, int, int]:
    """Return (matmul parameters, cached values of a token, head size in the products) of DeepSeek's latent attention.

    Queries and keys have a part with and one without a position; keys and values come from a latent vector, which is cached
    with the key's part that has a position (DeepSeek-V2, arXiv:2405.04434, section 2.1).
    """
    placed, plain, value = (int(config.get(f"{k}_head_dim") or 0) for k in ("qk_rope", "qk_nope", "v"))
    query = int(config.get("q_lora_rank") or 0)
    by_query = query * (hidden + heads * (placed + plain)) if query else hidden * heads * (placed + plain)
    by_latent = hidden * (latent + placed) + latent * heads * (plain + value)
    return by_query + by_latent + heads * value * hidden, latent + placed, (placed + plain + value) // 2


def _listed(config: Mapping[str, Any]) -> int:
    """Return the number of layers from a list with an entry a layer; 0 without one."""
    lists = (config.get(key) for key in ("layer_types", "layers_block_type", "hybrid_override_pattern"))
    return next((len(each) for each in lists if each), 0)


def _num_experts(config: Mapping[str, Any]) -> int:
    """Return the number of experts to choose from; 0 for a dense model."""
    return next((int(config[k]) for k in EXPERTS if isinstance(config.get(k), int) and config[k] > 1), 0)


def _mlp_widths(config: Mapping[str, Any], hidden: int, layers: int) -> tuple[int, int]:
    """Return the MLP's width that a token passes and the one that is stored, means over layers."""
    dense = next(
        (config[k] for k in ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff") if config.get(k)), 0
    )
    dense = int(sum(dense) / len(dense)) if isinstance(dense, list) else int(dense or 4 * hidden)
    experts = _num_experts(config)
    if not experts:
        return dense, dense
    width = config.get("moe_intermediate_size") or config.get("expert_intermediate_size") or dense
    width = int(sum(width) / len(width)) if isinstance(width, list) else int(width)
    chosen = next((int(config[k]) for k in CHOSEN if isinstance(config.get(k), int) and config[k]), 1)
    shared = config.get("shared_expert_intermediate_size") or config.get("shared_intermediate_size") or 0
    shared = int(shared) or width * int(config.get("n_shared_experts") or config.get("num_shared_experts") or 0)
    num_dense = int(config.get("first_k_dense_replace") or 0) or len(config.get("mlp_only_layers") or [])
    share = 1 - min(num_dense, layers) / layers
    active, stored = (share * (number * width + shared) + (1 - share) * dense for number in (chosen, experts))
    return round(active), round(stored)
