"""Class labels: numbers or names, as ids; the last id is the null class."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..configuration.base import PartConfig
from .sampling import Generators, uniform

Labels: TypeAlias = "Tensor | np.ndarray | Sequence[int] | Sequence[str] | int | str | None"


def label_ids(class_labels: Labels, config: PartConfig, batch_size: int | None = None) -> Tensor:
    """Labels, or names of `config.id2label`, as int64 (B,); of `None` the null class, B times.

    The ids are 0 … num_classes − 1, and num_classes for the null class.

    Raises:
        ValueError: a number of labels other than `batch_size`, or a label that is no class.
    """
    null = config.num_classes
    if class_labels is not None and not null:
        raise ValueError(f"expected class_labels=None, as there are no classes, got {class_labels}")
    if class_labels is None:
        return torch.full((batch_size or 1,), null, device="cpu")
    if isinstance(class_labels, Tensor):
        ids: Tensor = class_labels if class_labels.ndim else class_labels[None]
    else:
        labels = _as_list(class_labels)
        names = {name: i for i, name in (config.id2label or {}).items()}
        unknown = [label for label in labels if isinstance(label, str) and label not in names]
        if unknown:
            raise ValueError(f"expected class_labels among {list(names)}, got {unknown}")
        numbers = [names[x] if isinstance(x, str) else x for x in labels]
        if not all(0 <= number <= null for number in numbers):
            raise _no_classes(numbers, null)
        ids = torch.tensor(numbers, dtype=torch.long, device="cpu")
    if ids.ndim != 1 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"expected class_labels to be integers of shape (B,), "
            f"got {ids.dtype} of shape {tuple(ids.shape)}"
        )
    if batch_size not in (None, len(ids)):
        raise ValueError(f"expected {batch_size} class_labels, got {len(ids)}")
    if not ids.numel() or int(ids.min()) < 0 or int(ids.max()) > null:
        raise _no_classes(ids.tolist(), null)
    return ids.long()


def _no_classes(numbers: list[int], null: int) -> ValueError:
    return ValueError(
        f"expected class_labels in 0 … {null - 1}, or {null} for the null class, got {numbers}"
    )


def _as_list(class_labels: Any) -> list[int | str]:
    """One label, or a sequence or an array of them, as a list."""
    if hasattr(class_labels, "__array__"):
        class_labels = np.atleast_1d(np.asarray(class_labels)).tolist()
    is_one = isinstance(class_labels, (str, bytes)) or not isinstance(class_labels, Sequence)
    labels = [class_labels] if is_one else [*class_labels]
    for label in labels:
        if isinstance(label, bool) or not isinstance(label, (str, Integral)):
            raise ValueError(
                f"expected class_labels of numbers or names of classes, one or a list, got "
                f"{label!r} in {class_labels!r}"
            )
    return labels  # type: ignore[return-value]


def known_labels(labels: Tensor, config: PartConfig) -> Tensor | None:
    """The labels for one part; `None` if it is not class-conditional."""
    return labels if config.num_classes else None


def drop_labels(labels: Tensor, config: PartConfig, generator: Generators = None) -> Tensor:
    """Each label (B,) replaced by the null class with probability `class_dropout`.

    One network learns P(· | class) and P(·), for classifier-free guidance (Ho & Salimans 2022).
    """
    is_dropped = uniform(labels.shape, generator, labels.device) < config.class_dropout
    return labels.masked_fill(is_dropped, config.num_classes)
