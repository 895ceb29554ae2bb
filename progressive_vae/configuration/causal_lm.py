"""Configs of the causal networks that transformers gives us: any one of them, or a small one."""

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

MAX_LAYERS = 1_000  # more is a damaged or a hostile file


def causal_config(
    backbone: dict | PreTrainedConfig, vocab_size: int, length: int
) -> PreTrainedConfig:
    """A config, or one of a dict with its `model_type`, that gets its vocabulary size and of the
    length of the sequences that it will see."""
    if isinstance(backbone, dict):
        fields = dict(backbone)
        if "model_type" not in fields:
            raise ValueError(f"expected backbone_config with a model_type, got {fields}")
        # Some configs make a list of their layers; each family has its own name for these.
        layers = {name: MAX_LAYERS for name in fields if "layer" in name}
        check_limits(fields, **layers)
        kind = fields.pop("model_type")
        if kind not in CONFIG_MAPPING:
            raise ValueError(f"expected a model_type of transformers, as 'llama', got {kind!r}")
        config = AutoConfig.for_model(kind, **fields)
    else:  # the caller keeps a config of his own
        config = copy.deepcopy(backbone)
    config.vocab_size = vocab_size
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    if (getattr(config, "max_position_embeddings", None) or length) < length:
        config.max_position_embeddings = length
    return config


def check_causal_config(config: PreTrainedConfig):
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            "expected backbone_config of a causal language model of transformers, got "
            f"{type(config).__name__}"
        )


def small_llama() -> LlamaConfig:
    """The default of a prior."""
    return LlamaConfig(
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )


def small_opt(width: int, num_layers: int, length: int) -> OPTConfig:
    """The default of a raster decoder."""
    return OPTConfig(
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=2 * width,
        num_hidden_layers=num_layers,
        # About one head for 32 channels, of a number that divides the width.
        num_attention_heads=max(n for n in range(1, width // 32 + 2) if width % n == 0),
        max_position_embeddings=length,
        dropout=0.0,
    )
