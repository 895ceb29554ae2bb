"""The config of the prior."""

import math

from transformers import AutoConfig, PreTrainedConfig

from .base import (
    PartConfig,
    check_classes,
    check_limits,
    check_names,
    check_range,
    name_classes,
    strict_config,
)
from .causal_lm import causal_config, check_causal_config, small_llama
from .level import MAX_CODES

NUM_PREFIX_TOKENS = 4  # vectors that a prior with `condition_dim` reads before the codes


@strict_config
class ProgressiveVAEPriorConfig(PartConfig):
    """`P_Φ(z_1)`, optionally conditioned on a class and on embeddings.

    Args:
        codebook_size: K_1, the number of codes of the coarsest level.
        grid_size: [H_1, W_1].
        num_classes: number of class labels; 0 for an unconditional prior.
        class_dropout: probability that training shows the null condition in place of class and
            embeddings, and each of two alone; at 0 the null condition, whose bits are the headline,
            is never learned.
        condition_dim: D, the length of the embeddings that the prior is conditioned on, as those of
            a text encoder; `None`: none.
        backbone_config: any causal-LM config of transformers, as a config or as a dict with its
            `model_type`; its vocabulary is set to codes, classes and the null class. `None`
            stands for a small Llama.
        finer_fingerprint: `fingerprint` of the finer levels on whose codes this part was trained; a
            pipeline refuses other ones. `None`: unchecked.
    """

    model_type = "progressive_vae_prior"
    sub_configs = {"backbone_config": AutoConfig}  # where attn_implementation and dtype go on to

    codebook_size: int = 64
    grid_size: list[int] | tuple[int, ...] = (4, 4)
    num_classes: int = 0
    class_dropout: float = 0.1
    condition_dim: int | None = None
    backbone_config: dict | PreTrainedConfig | None = None
    finer_fingerprint: str | None = None

    def __post_init__(self, **kwargs):
        check_names(self, kwargs)
        check_limits(vars(self), codebook_size=MAX_CODES)
        self.grid_size = list(self.grid_size)
        name_classes(self)
        if self.backbone_config is None:
            self.backbone_config = small_llama()
        self.backbone_config = causal_config(
            self.backbone_config, self.vocab_size, self.sequence_length + self.num_prefix_tokens
        )
        super().__post_init__(**kwargs)

    def validate_sizes(self):
        check_range(self, codebook_size=1)
        check_classes(self)
        if len(self.grid_size) != 2 or min(self.grid_size) < 1:
            raise ValueError(f"expected grid_size of two positive numbers, got {self.grid_size}")

    def validate_backbone(self):
        check_causal_config(self.backbone_config)

    @property
    def is_conditional(self) -> bool:
        """Whether there is a condition."""
        return bool(self.num_classes) or self.condition_dim is not None

    @property
    def num_prefix_tokens(self) -> int:
        """Vectors between the class token and the codes, which attend to the embeddings."""
        return 0 if self.condition_dim is None else NUM_PREFIX_TOKENS

    @property
    def sequence_length(self) -> int:
        """L_1 = H_1·W_1: the class token stands where a code token before the first would."""
        return math.prod(self.grid_size)

    @property
    def vocab_size(self) -> int:
        """Tokens: K_1 codes, then the classes, then the null class."""
        return self.codebook_size + self.num_classes + 1
