"""Backbone configs: any causal language model of transformers, or a small default."""

import copy

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
)

from .base import check_limits

MAX_LAYERS = 1_000  # a larger number is a damaged or a hostile file


def causal_config(
    backbone: dict | PreTrainedConfig, vocab_size: int, length: int
) -> PreTrainedConfig:
    """Return a copy of a backbone's config for this vocabulary and sequences of this length.

    Args:
        backbone: a config, or a dict with its `model_type`.
        vocab_size: number of tokens.
        length: of the longest sequence.

    Raises:
        ValueError: a dict without a `model_type` of transformers, or with too many layers.
    """
    if isinstance(backbone, dict):
        fields = dict(backbone)
        if "model_type" not in fields:
            raise ValueError(f"expected backbone_config with a model_type, got {fields}")
        # Some configs build a list of their layers. The name of the number differs by family.
        layers = {name: MAX_LAYERS for name in fields if "layer" in name}
        check_limits(fields, **layers)
        kind = fields.pop("model_type")
        if kind not in CONFIG_MAPPING:
            raise ValueError(f"expected a model_type of transformers, as 'llama', got {kind!r}")
        config = AutoConfig.for_model(kind, **fields)
    else:
        config = copy.deepcopy(backbone)  # the caller's stays unchanged
    config.vocab_size = vocab_size
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    if (getattr(config, "max_position_embeddings", None) or length) < length:
        config.max_position_embeddings = length
    return config


def check_causal_config(config: PreTrainedConfig):
    """Raise a `ValueError` unless the config is of a causal language model."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            "expected backbone_config of a causal language model of transformers, got "
            f"{type(config).__name__}"
        )


def small_llama() -> LlamaConfig:
    """The default backbone of a prior."""
    return LlamaConfig(
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )


def small_opt(width: int, num_layers: int, length: int, dropout: float) -> OPTConfig:
    """The default backbone of a causal-LM decoder; dropout is that of residual branches."""
    return OPTConfig(
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=2 * width,
        num_hidden_layers=num_layers,
        # About one head for 32 channels; their number has to divide the width.
        num_attention_heads=max(n for n in range(1, width // 32 + 2) if width % n == 0),
        max_position_embeddings=length,
        dropout=dropout,
    )
