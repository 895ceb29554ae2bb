"""The rules by which a quantizer's class checks a level's config."""

from typing import Any, ClassVar, Protocol


class QuantizerRules(Protocol):
    """The part of `models.quantizer_base.Quantizer` that configs use."""

    is_stochastic: ClassVar[bool]
    supports_dither: ClassVar[bool]

    @classmethod
    def default_codebook_dim(cls, config: Any) -> int: ...

    @classmethod
    def validate(cls, config: Any) -> None: ...


# Imports go from models to configs, so configs cannot import the classes that own the rules:
# `models/quantizers.py` fills this dict, and the package always imports that module.
QUANTIZER_RULES: dict[str, Any] = {}  # of QuantizerRules
