"""Strict configs: a wrong name, type, range or format raises a `ValueError` of one line."""

import math
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from ..serialization import pop_version, read_json, version_fields

# Larger numbers are a damaged or a hostile file.
MAX_CLASSES = 100_000
MAX_CONDITION_DIM = 65_536

# Names that `PreTrainedConfig` accepts without declaring an attribute, and those that transformers
# adds: its `Trainer` sets `use_cache`, its quantizers `quantization_config`, its
# tests `tie_word_embeddings`.
_INHERITED_NAMES = {"name_or_path", "num_labels", "torch_dtype", "attn_implementation",
                    "experts_implementation", "output_attentions", "per_layer_config",
                    "use_cache", "quantization_config", "tie_word_embeddings", "_commit_hash",
                    "_attn_implementation_internal",
                    "_experts_implementation_internal"}  # fmt: skip


if TYPE_CHECKING:

    class PartConfig(PreTrainedConfig):
        """What configs of levels and the prior share.

        To a type checker any attribute of a `PreTrainedConfig` exists; of this class only fields.
        """

        num_classes: int
        class_dropout: float
        condition_dim: int | None
        id2label: dict[int, str] | None

        def __getattribute__(self, name: str) -> object: ...

else:
    PartConfig = PreTrainedConfig


def strict_config(cls):
    """A class decorator: a strict dataclass that raises only `ValueError`s, also on assignment.

    Saved files contain the version and format; a newer format is refused before its fields are
    read. A class may have `upgrade_config(format_version, fields) -> fields` for older formats.
    """
    cls = strict(cls)
    strict_init, strict_setattr, to_dict = cls.__init__, cls.__setattr__, cls.to_dict
    from_file = cls._dict_from_json_file.__func__

    def __init__(self, **kwargs):
        format_version = pop_version(kwargs, cls.__name__)
        kwargs.pop("auto_map", None)  # belongs to a repository with remote code, not to the config
        if hasattr(cls, "upgrade_config"):
            kwargs = cls.upgrade_config(format_version, kwargs)
        dtype = kwargs.get("dtype")
        if not isinstance(dtype, (str, torch.dtype, type(None))):
            raise ValueError(f"{cls.__name__}: expected dtype like 'float32', got {dtype!r}")
        try:
            strict_init(self, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(f"{cls.__name__}: {_message(error)}") from error

    def __setattr__(self, name: str, value: Any):
        try:
            strict_setattr(self, name, value)
        except StrictDataclassError as error:
            raise ValueError(f"{cls.__name__}: {_message(error)}") from error

    def _dict_from_json_file(cls, json_file):
        contents = read_json(json_file, "save the model again, or download it again")
        model_type = contents.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"expected model_type={cls.model_type!r} in {json_file}, got {model_type!r}"
            )
        return from_file(cls, json_file)

    cls.__init__, cls.__setattr__ = __init__, __setattr__
    cls._dict_from_json_file = classmethod(_dict_from_json_file)
    cls.to_dict = lambda self: _without_half_precision(to_dict(self)) | version_fields()
    return cls


def _message(error: Exception) -> str:
    """In one line, and for a `ValueError` of our validators without their names."""
    source = error.__cause__ if isinstance(error.__cause__, ValueError) else error
    return " ".join(str(source).split())


def _without_half_precision(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields without a dtype of half precision.

    Weights of several precisions (`variant`) share one config. Without the field, the dtype is
    that of the weights.
    """
    if fields.get("backbone_config"):
        fields = fields | {"backbone_config": _without_half_precision(fields["backbone_config"])}
    return {k: v for k, v in fields.items() if k != "dtype" or v == "float32"}


def check_names(config: PartConfig, names):
    unknown = sorted(n for n in names if n not in _INHERITED_NAMES and not hasattr(config, n))
    if unknown:
        raise ValueError(
            f"{type(config).__name__} got unknown names {unknown}, expected some of "
            f"{list(type(config).__annotations__)}"
        )


def check_range(config: PartConfig, **minima):
    for name, minimum in minima.items():
        value = getattr(config, name)
        if value is not None and not minimum <= value < math.inf:  # also catches NaN
            raise ValueError(f"expected {name} >= {minimum}, got {value}")


def check_limits(fields: dict[str, Any], **maxima):
    for name, maximum in maxima.items():
        value = fields.get(name)
        if isinstance(value, int) and value > maximum:
            raise ValueError(f"expected {name} <= {maximum}, got {value}")


def name_classes(config: PartConfig):
    """Set the names of classes to their numbers, where there are none; check limits."""
    if not config.num_classes <= MAX_CLASSES:
        raise ValueError(f"expected num_classes <= {MAX_CLASSES}, got {config.num_classes}")
    check_limits(vars(config), condition_dim=MAX_CONDITION_DIM)
    if config.num_classes and config.id2label is None:
        config.id2label = {i: str(i) for i in range(config.num_classes)}


def check_classes(config: PartConfig):
    check_range(config, num_classes=0, condition_dim=1)
    if not 0 <= config.class_dropout <= 1:
        raise ValueError(f"expected class_dropout in [0, 1], got {config.class_dropout}")
    num_names = len(config.id2label or {})
    if config.num_classes and num_names != config.num_classes:
        raise ValueError(
            f"expected id2label with num_classes={config.num_classes} entries, got {num_names}"
        )
