"""The config of the text encoder that needs no weights."""

from transformers import PreTrainedConfig

from .base import MAX_CONDITION_DIM, check_limits, check_range, strict_config


@strict_config
class HashedTextConfig(PreTrainedConfig):
    """
    Args:
        hidden_size: D, the length of a word's vector.
    """

    model_type = "progressive_vae_hashed_text"

    hidden_size: int = 128

    def __post_init__(self, **kwargs):
        check_limits(vars(self), hidden_size=MAX_CONDITION_DIM)
        super().__post_init__(**kwargs)

    def validate_sizes(self):
        check_range(self, hidden_size=1)
