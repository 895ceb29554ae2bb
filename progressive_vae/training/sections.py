"""The sections of a recipe, their flags and their types.

A section has the fields of a config that a run may choose, with the config's types and defaults;
`tests/test_recipe.py` compares them. Flags, YAML and `--help` follow from these classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from jsonargparse import ArgumentParser

from ..configuration.level import ProgressiveVAELevelConfig
from ..configuration.prior import ProgressiveVAEPriorConfig
from ..configuration.validation import MAX_LEVELS
from ..data.args import DataSettings
from .args import FitSettings, PriorFitSettings, RunSettings
from .cli import parse_or_raise

# Width and layers of decoders by name.
DECODER_SIZES = {
    "small": {"hidden_size": 384, "num_layers": 6},
    "base": {"hidden_size": 768, "num_layers": 12},
    "large": {"hidden_size": 1024, "num_layers": 24},
}
SECTIONS = ("levels", *(f"level_{i}" for i in range(1, MAX_LEVELS + 1)), "prior", "data", "run")


@dataclass
class RefitSection:
    __doc__ = ProgressiveVAELevelConfig.__doc__

    # `DECODER_FIELDS` without those that the data set decides; `None` retains the level's own.
    hidden_size: int | None = None
    num_layers: int | None = None
    dropout: float | None = None
    condition_num_layers: int | None = None
    neighbor_inputs: bool | None = None
    attention_head_dim: int | None = None
    pixel_distribution: str | None = None
    pixel_logit_rank: int | None = None
    palette_size: int | None = None
    decoder_type: str | None = None
    ordering: str | None = None
    num_groups: int | None = None
    backbone_config: dict[str, Any] | None = None
    class_dropout: float | None = None
    code_noise: float | None = None
    code_noise_kind: str | None = None
    # Not of the config.
    from_scratch: bool = False
    fit: FitSettings = field(default_factory=FitSettings)


@dataclass
class LevelSection:
    __doc__ = ProgressiveVAELevelConfig.__doc__

    # Left out: what the data set and the finer level decide; noise on codes, which needs trained
    # codes and so a refit; `tokenizer_config`, as tokenizers are converted and not trained.
    codebook_size: int = 64
    codebook_dim: int | None = None
    downsample: int = 2
    hidden_size: int = 64
    num_layers: int = 2
    dropout: float = 0.0
    condition_num_layers: int | None = None
    neighbor_inputs: bool | None = None
    attention_head_dim: int = 32
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 1
    block_kernel_size: int = 1
    value_embed_dim: int = 16
    pixel_distribution: str = "categorical"
    pixel_logit_rank: int = 64
    palette_size: int = 0
    bits_per_block: int = 0
    symbol_logit_rank: int | None = None
    decoder_type: str = "conv"
    ordering: str | None = None
    num_groups: int | None = None
    backbone_config: dict[str, Any] | None = None  # a recipe is JSON: no config objects
    quantizer: str = "vq"
    quantizer_gradient: str = "straight_through"
    commitment_weight: float = 0.25
    entropy_weight: float = 0.1
    codebook_decay: float = 0.99
    restart_threshold: float = 0.03
    dither: float = 0.0
    gumbel_temperature: list[float] | tuple[float, ...] = (1.0, 0.5)
    gumbel_temperature_decay: float = 0.999
    auxiliary_hidden_size: int | None = None
    auxiliary_num_layers: int = 1
    reconstruction_weight: float = 100.0
    class_dropout: float = 0.1
    # Not of the config.
    decoder_size: str | None = None  # of `DECODER_SIZES`; its values are defaults
    class_conditional: bool = False
    text_conditional: bool = False
    encoder_fit: FitSettings | None = None
    fit: FitSettings = field(default_factory=FitSettings)
    refit: RefitSection | None = None


@dataclass
class PriorSection:
    __doc__ = ProgressiveVAEPriorConfig.__doc__

    class_dropout: float = 0.1
    backbone_config: dict[str, Any] | None = None
    # Not of the config.
    class_conditional: bool = True
    text_conditional: bool = True
    fit: PriorFitSettings = field(default_factory=PriorFitSettings)


def add_sections(parser: ArgumentParser, levels: list[str]):
    """Add arguments for all fields of a recipe, as `--level_1.hidden_size`."""
    for name in levels:
        parser.add_class_arguments(LevelSection, name)
    parser.add_class_arguments(PriorSection, "prior")
    parser.add_class_arguments(DataSettings, "data")
    parser.add_class_arguments(RunSettings, "run")


def parse_sections(sections: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return all fields of all sections, with defaults, converted to their types.

    Args:
        count: N.

    Raises:
        ValueError: an unknown name, or a value of another type.
    """
    parser = _sections_parser(count)
    return parse_or_raise(lambda: parser.parse_object(dict(sections))).as_dict()


@cache  # a parser takes a third of a second, and a run needs it twice
def _sections_parser(count: int) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    add_sections(parser, [f"level_{i}" for i in range(1, count + 1)])
    return parser
