"""Configs whose every complaint is a `ValueError` in one line: names, types, ranges, formats."""

import math
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from ..serialization import pop_version, read_json, version_fields

MAX_CLASSES = 100_000  # more is a damaged or a hostile file

# Names that `PreTrainedConfig` accepts and consumes although it declares no attribute for them, and
# what others leave there: the `Trainer` of transformers `use_cache`, its quantizers their config.
_INHERITED_NAMES = {"name_or_path", "num_labels", "torch_dtype", "attn_implementation",
                    "experts_implementation", "output_attentions", "per_layer_config",
                    "use_cache", "quantization_config", "_commit_hash",
                    "_attn_implementation_internal",
                    "_experts_implementation_internal"}  # fmt: skip


def strict_config(cls):
    """A strict dataclass whose every complaint, also on assignment, is a `ValueError`; what it
    saves has version fields, and a format that it cannot read is refused before anything else.

    A class may have `upgrade_config(format, fields) -> fields`, which reads older formats.
    """
    cls = strict(cls)
    strict_init, strict_setattr, to_dict = cls.__init__, cls.__setattr__, cls.to_dict
    from_file = cls._dict_from_json_file.__func__

    def __init__(self, **kwargs):
        found = pop_version(kwargs, cls.__name__)
        kwargs.pop("auto_map", None)  # of a repository that holds code, to which it belongs
        if hasattr(cls, "upgrade_config"):
            kwargs = cls.upgrade_config(found, kwargs)
        dtype = kwargs.get("dtype")
        if not isinstance(dtype, (str, torch.dtype, type(None))):
            raise ValueError(f"{cls.__name__}: expected dtype like 'float32', got {dtype!r}")
        try:
            strict_init(self, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(f"{cls.__name__}: {_said(error)}") from error

    def __setattr__(self, name: str, value: Any):
        try:
            strict_setattr(self, name, value)
        except StrictDataclassError as error:
            raise ValueError(f"{cls.__name__}: {_said(error)}") from error

    def _dict_from_json_file(cls, json_file):
        contents = read_json(json_file, "save the model again, or download it anew")
        model_type = contents.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"expected model_type={cls.model_type!r} in {json_file}, got {model_type!r}"
            )
        return from_file(cls, json_file)

    cls.__init__, cls.__setattr__ = __init__, __setattr__
    cls._dict_from_json_file = classmethod(_dict_from_json_file)
    cls.to_dict = lambda self: _without_half(to_dict(self)) | version_fields()
    return cls


def _said(error: Exception) -> str:
    """In one line, and without the validators' names where the words are ours."""
    said = error.__cause__ if isinstance(error.__cause__, ValueError) else error
    return " ".join(str(said).split())


def _without_half(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields without a dtype of half precision: such weights may lie beside others (`variant`),
    and all share this config. Where it is silent, the weights say themselves what they are."""
    if fields.get("backbone_config"):
        fields = fields | {"backbone_config": _without_half(fields["backbone_config"])}
    return {k: v for k, v in fields.items() if k != "dtype" or v == "float32"}


def check_names(config: PreTrainedConfig, names):
    unknown = sorted(n for n in names if n not in _INHERITED_NAMES and not hasattr(config, n))
    if unknown:
        raise ValueError(
            f"{type(config).__name__} got unknown names {unknown}, expected some of "
            f"{list(type(config).__annotations__)}"
        )


def check_range(config: PreTrainedConfig, **minima):
    for name, minimum in minima.items():
        value = getattr(config, name)
        if value is not None and not minimum <= value < math.inf:  # also catches NaN
            raise ValueError(f"expected {name} >= {minimum}, got {value}")


def check_limits(fields: dict[str, Any], **maxima):
    for name, maximum in maxima.items():
        value = fields.get(name)
        if isinstance(value, int) and value > maximum:
            raise ValueError(f"expected {name} <= {maximum}, got {value}")


def name_classes(config: PreTrainedConfig):
    """Classes without names are called by their numbers."""
    if not config.num_classes <= MAX_CLASSES:
        raise ValueError(f"expected num_classes <= {MAX_CLASSES}, got {config.num_classes}")
    if config.num_classes and config.id2label is None:
        config.id2label = {i: str(i) for i in range(config.num_classes)}


def check_classes(config: PreTrainedConfig):
    check_range(config, num_classes=0)
    if not 0 <= config.class_dropout <= 1:
        raise ValueError(f"expected class_dropout in [0, 1], got {config.class_dropout}")
    if config.num_classes and len(config.id2label) != config.num_classes:
        raise ValueError(
            f"expected id2label with num_classes={config.num_classes} entries, "
            f"got {len(config.id2label)}"
        )
