"""What factors are conditioned on besides codes: classes; the last class id is the null class."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..configuration.base import PartConfig
from .sampling import Generators, Sampler, uniform

ClassLabels: TypeAlias = (
    "Conditioning | Tensor | np.ndarray | Sequence[int] | Sequence[str] | int | str | None"
)


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What each example of a batch is conditioned on besides codes.

    `from_labels` checks what a user passes. Nothing else reads values on an accelerator, which
    would wait for the device.

    Args:
        class_ids: int64 (B,) in 0 … num_classes − 1, or num_classes for the null class.
        num_classes: 0 for an unconditional factor, whose only class is the null class.
        is_null: whether all examples are known to be of the null class.
    """

    class_ids: Tensor
    num_classes: int
    is_null: bool = False

    @classmethod
    def from_labels(
        cls,
        class_labels: ClassLabels,
        config: PartConfig,
        batch_size: int | None = None,
        device: torch.device | str = "cpu",
    ) -> "Conditioning":
        """The conditioning of a factor, or of a stack, with this config.

        Args:
            class_labels: class ids, or names of `config.id2label`, one or (B,); `None` is the null
                class, `batch_size` times. A `Conditioning` is not checked again.
            device: of the result.

        Raises:
            ValueError: a number of labels other than `batch_size`, or a label that is no class.
        """
        null = config.num_classes
        if isinstance(class_labels, Conditioning):
            conditioning = class_labels.for_factor(config).to(device)
        elif class_labels is None:
            count = 1 if batch_size is None else batch_size
            class_ids = torch.full((count,), null, device=device)
            conditioning = cls(class_ids, null, is_null=True)
        else:
            numbers = _as_class_ids(class_labels, config)
            class_ids = torch.tensor(numbers, dtype=torch.long, device=device)
            conditioning = cls(class_ids, null, is_null=set(numbers) == {null})
        if batch_size not in (None, len(conditioning)):
            raise ValueError(f"expected {batch_size} class_labels, got {len(conditioning)}")
        return conditioning

    def __len__(self) -> int:
        """B."""
        return len(self.class_ids)

    def __getitem__(self, rows: slice | Tensor) -> "Conditioning":
        """A part of the batch: a slice, or int64 indices (n,)."""
        part = self._map(lambda x: x[rows])
        if part.class_ids.device.type == "cpu" and (part.class_ids == self.num_classes).all():
            return part.null()  # such a part needs no guidance
        return part

    def to(self, device: torch.device | str) -> "Conditioning":
        return self._map(lambda x: x.to(device))

    def repeat(self, repeats: int) -> "Conditioning":
        """Each example `repeats` times in succession."""
        return self._map(lambda x: x.repeat_interleave(repeats, 0))

    def null(self) -> "Conditioning":
        """A batch of the same size of the null class."""
        class_ids = torch.full_like(self.class_ids, self.num_classes)
        return Conditioning(class_ids, self.num_classes, is_null=True)

    def drop(self, probability: float, generator: Generators = None) -> "Conditioning":
        """Each example replaced by a null one with a probability.

        One network learns P(· | class) and P(·), for classifier-free guidance (Ho & Salimans 2022).
        """
        is_dropped = uniform(self.class_ids.shape, generator, self.class_ids.device) < probability
        class_ids = self.class_ids.masked_fill(is_dropped, self.num_classes)
        return Conditioning(class_ids, self.num_classes, self.is_null)

    def for_factor(self, config: PartConfig) -> "Conditioning":
        """What a factor with this config uses: nothing, if it is unconditional.

        Raises:
            ValueError: a factor with another number of classes.
        """
        if config.num_classes == self.num_classes:
            return self
        if config.num_classes:
            raise ValueError(
                f"expected class_labels of {config.num_classes} classes, got a Conditioning of "
                f"{self.num_classes}"
            )
        return Conditioning(torch.zeros_like(self.class_ids), 0, is_null=True)

    def for_guidance(self, sampler: Sampler) -> "Conditioning":
        """The rows of a walk with this sampler: these, and if it is guided as many null ones.

        If all examples are null, guidance is turned off, as both of its terms are the same.
        """
        if self.is_null:
            sampler.guidance_scale = 1.0
        if not sampler.is_guided:
            return self
        return Conditioning(torch.cat([self.class_ids, self.null().class_ids]), self.num_classes)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Conditioning":
        return Conditioning(function(self.class_ids), self.num_classes, self.is_null)


def _as_class_ids(class_labels: Any, config: PartConfig) -> list[int]:
    """Class ids of ids or names, in 0 … num_classes."""
    null = config.num_classes
    if not null:
        raise ValueError(f"expected class_labels=None, as there are no classes, got {class_labels}")
    labels = _as_list(class_labels)
    names = {name: i for i, name in (config.id2label or {}).items()}
    unknown = [label for label in labels if isinstance(label, str) and label not in names]
    if unknown:
        raise ValueError(f"expected class_labels among {list(names)}, got {unknown}")
    numbers = [names[label] if isinstance(label, str) else label for label in labels]
    if not numbers or not all(0 <= number <= null for number in numbers):
        raise ValueError(
            f"expected class_labels in 0 … {null - 1}, or {null} for the null class, got {numbers}"
        )
    return numbers


def _as_list(class_labels: Any) -> list[Any]:
    """One label, or a sequence, an array or a tensor of them, as a list of integers and names."""
    if isinstance(class_labels, Tensor):
        is_integer = class_labels.dtype in (torch.int64, torch.int32)
        if not is_integer or class_labels.ndim > 1:
            raise ValueError(
                f"expected class_labels to be integers of shape (B,), "
                f"got {class_labels.dtype} of shape {tuple(class_labels.shape)}"
            )
        return class_labels.reshape(-1).tolist()
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
    return labels
