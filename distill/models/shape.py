"""The sizes of a model that determine its FLOPs and memory, read from its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from distill.records import UserError

PLAIN_MLP = {"gpt2", "gpt_neox", "gptj", "opt", "bloom", "falcon", "phi", "starcoder2"}
"""Model types whose MLP is two matrices; all others are taken as gated, with three."""


# ------------------------------------------------------------------------------------------------- shapes


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a decoder that determine its FLOPs and memory.

    intermediate: the MLP's width that a token passes, the mean over layers. stored: the width that is stored, which is more
    for a mixture of experts; 0 = the same.
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
        plain = config.get("model_type") in PLAIN_MLP
        return ModelShape(
            layers=layers,
            hidden=hidden,
            intermediate=active,
            heads=heads,
            kv_heads=size("num_key_value_heads", "num_kv_heads", "n_head_kv") or heads,
            head_dim=size("head_dim") or (hidden // heads if heads else 0),
            vocab=vocab,
            # transformers leaves the key out of config.json where it has its default.
            tied=bool(config.get("tie_word_embeddings", plain or config.get("model_type") == "gemma")),
            gated=not plain,
            stored=stored,
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
        return replace(self, layers=layers)

    @property
    def params_layer(self) -> int:
        """Matmul parameters of one layer: q and o, k and v, the MLP."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + (3 if self.gated else 2) * self.hidden * self.intermediate

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
        norms = (2 * self.layers + 1) * self.hidden
        idle = max(self.stored - self.intermediate, 0) * (3 if self.gated else 2) * self.hidden * self.layers
        return self.params_matmul + idle + norms + (0 if self.tied else self.params_head)


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


def _listed(config: Mapping[str, Any]) -> int:
    """Return the number of layers from a list with an entry a layer; 0 without one."""
    lists = (config.get(key) for key in ("layer_types", "layers_block_type", "hybrid_override_pattern"))
    return next((len(each) for each in lists if each), 0)


def _mlp_widths(config: Mapping[str, Any], hidden: int, layers: int) -> tuple[int, int]:
    """Return the MLP's width that a token passes and the one that is stored, means over layers."""
    dense = next(
        (config[k] for k in ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff") if config.get(k)), 0
    )
    dense = int(sum(dense) / len(dense)) if isinstance(dense, list) else int(dense or 4 * hidden)
    experts = next((int(config[k]) for k in EXPERTS if isinstance(config.get(k), int) and config[k] > 1), 0)
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
