"""What factors are conditioned on besides codes: classes, and embeddings of a text or another
condition. The last class id is the null class; the null condition has no embeddings.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..configuration.base import PartConfig
from ..configuration.validation import has_readable_values
from .sampling import Generators, Sampler, uniform

ClassLabels: TypeAlias = (
    "Conditioning | Tensor | np.ndarray | Sequence[int] | Sequence[str] | int | str | None"
)


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What each example of a batch is conditioned on besides codes.

    `from_labels` and `with_embeddings` check what a user passes. Nothing else reads values on an
    accelerator, which would wait for the device.

    Args:
        class_ids: int64 (B,) in 0 … num_classes − 1, or num_classes for the null class.
        num_classes: 0 for an unconditional factor, whose only class is the null class.
        is_null: whether all examples are known to be of the null class.
        embeddings: float (B, T, D); `None`: no example has any.
        mask: bool (B, T), which embeddings an example has; none for the null condition.
        negative: the condition from which guidance leads away; `None`: the null condition.
    """

    class_ids: Tensor
    num_classes: int
    is_null: bool = False
    embeddings: Tensor | None = None
    mask: Tensor | None = None
    negative: "Conditioning | None" = None

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
                class, `batch_size` times. A `Conditioning` is not checked again, and the range of
                a tensor only on the CPU.
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
        elif isinstance(class_labels, Tensor) and null and not has_readable_values(class_labels):
            _check_ids(class_labels)
            conditioning = cls(class_labels.reshape(-1).long().to(device), null)
        else:
            numbers = _as_class_ids(class_labels, config)
            class_ids = torch.tensor(numbers, dtype=torch.long, device=device)
            conditioning = cls(class_ids, null, is_null=set(numbers) == {null})
        if batch_size not in (None, len(conditioning)):
            raise ValueError(f"expected {batch_size} class_labels, got {len(conditioning)}")
        return conditioning

    def with_embeddings(self, embeddings: Tensor, mask: Tensor | None = None) -> "Conditioning":
        """The same classes with embeddings, of a text encoder or any other.

        Args:
            embeddings: float (B, T, D), or one vector for each example, (B, D).
            mask: bool or integers (B, T), nonzero for the embeddings that an example has; `None`:
                all.

        Raises:
            ValueError: another shape, dtype or batch size.
        """
        count = len(self)
        is_float = isinstance(embeddings, Tensor) and embeddings.is_floating_point()
        if not is_float or embeddings.ndim not in (2, 3) or len(embeddings) != count:
            raise ValueError(
                f"expected embeddings to be floats of shape ({count}, T, D) or ({count}, D), got "
                f"{_describe(embeddings)}"
            )
        if embeddings.ndim == 2:
            embeddings = embeddings[:, None]
        shape = embeddings.shape[:2]
        if mask is None:
            mask = torch.ones(shape, dtype=torch.bool, device=embeddings.device)
        is_mask = isinstance(mask, Tensor) and not mask.is_floating_point()
        if not is_mask or mask.shape != shape:
            raise ValueError(
                f"expected a mask of bool or integers of shape {tuple(shape)}, got "
                f"{_describe(mask)}"
            )
        device = self.class_ids.device
        return replace(self, embeddings=embeddings.to(device), mask=mask.to(device).bool())

    @property
    def is_unconditional(self) -> bool:
        """Whether all examples are known to have the null condition."""
        return self.is_null and self.embeddings is None

    def __len__(self) -> int:
        """B."""
        return len(self.class_ids)

    def __getitem__(self, rows: slice | Tensor) -> "Conditioning":
        """A part of the batch: a slice, or int64 indices (n,)."""
        part = self._map(lambda x: x[rows])
        if part.class_ids.device.type != "cpu":
            return part
        # A part of the null condition needs no guidance.
        if part.mask is not None and not part.mask.any():
            part = replace(part, embeddings=None, mask=None)
        if not part.is_null and (part.class_ids == self.num_classes).all():
            part = replace(part, is_null=True)
        return part

    def to(self, device: torch.device | str) -> "Conditioning":
        return self._map(lambda x: x.to(device))

    def repeat(self, repeats: int) -> "Conditioning":
        """Each example `repeats` times in succession."""
        return self._map(lambda x: x.repeat_interleave(repeats, 0))

    def null(self) -> "Conditioning":
        """A batch of the same size of the null condition."""
        class_ids = torch.full_like(self.class_ids, self.num_classes)
        return Conditioning(class_ids, self.num_classes, is_null=True)

    def drop(self, probability: float, generator: Generators = None) -> "Conditioning":
        """Each example replaced by a null one with a probability.

        One network learns P(· | condition) and P(·), for classifier-free guidance (Ho & Salimans
        2022). Of examples with a class and embeddings, each is also dropped alone, with the same
        probability, so that either can be the only condition.
        """
        noise = uniform(self.class_ids.shape, generator, self.class_ids.device)
        has_both = self.mask is not None and self.num_classes > 0
        is_class_dropped = noise < (2 * probability if has_both else probability)
        class_ids = self.class_ids.masked_fill(is_class_dropped, self.num_classes)
        if self.mask is None:
            return replace(self, class_ids=class_ids)
        is_text_dropped = noise < probability
        if has_both:
            is_text_dropped |= ~is_class_dropped & (noise < 3 * probability)
        return replace(self, class_ids=class_ids, mask=self.mask & ~is_text_dropped[:, None])

    def for_factor(self, config: PartConfig) -> "Conditioning":
        """What a factor with this config uses: nothing, if it is unconditional.

        Raises:
            ValueError: a factor with another number of classes, or of embeddings of another length.
        """
        conditioning = self
        if self.embeddings is not None and config.condition_dim is None:
            conditioning = replace(conditioning, embeddings=None, mask=None)
        elif self.embeddings is not None and config.condition_dim != self.embeddings.shape[-1]:
            raise ValueError(
                f"expected embeddings of length condition_dim={config.condition_dim}, got "
                f"{self.embeddings.shape[-1]}"
            )
        if config.num_classes not in (0, self.num_classes):
            raise ValueError(
                f"expected class_labels of {config.num_classes} classes, got a Conditioning of "
                f"{self.num_classes}"
            )
        if config.num_classes != self.num_classes:
            class_ids = torch.zeros_like(self.class_ids)
            conditioning = replace(conditioning, class_ids=class_ids, num_classes=0, is_null=True)
        if self.negative is not None:
            negative = self.negative.for_factor(config)
            conditioning = replace(
                conditioning, negative=None if negative.is_unconditional else negative
            )
        return conditioning

    def for_guidance(self, sampler: Sampler) -> "Conditioning":
        """The rows of a walk with this sampler: these, and if it is guided as many negative ones,
        which are null ones unless there is a `negative`.

        If all examples are null, guidance is turned off, as both of its terms are the same.
        """
        if self.is_unconditional and self.negative is None:
            sampler.guidance_scale = 1.0
        if not sampler.is_guided:
            return self
        negative = self.null() if self.negative is None else self.negative
        class_ids = torch.cat([self.class_ids, negative.class_ids])
        embeddings, mask = _concatenate(self, negative)
        return Conditioning(class_ids, self.num_classes, False, embeddings, mask)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Conditioning":
        return Conditioning(
            function(self.class_ids),
            self.num_classes,
            self.is_null,
            None if self.embeddings is None else function(self.embeddings),
            None if self.mask is None else function(self.mask),
            None if self.negative is None else self.negative._map(function),
        )


def _concatenate(*parts: Conditioning) -> tuple[Tensor | None, Tensor | None]:
    """The embeddings and the mask of all parts, padded to the longest sequence."""
    templates = [part.embeddings for part in parts if part.embeddings is not None]
    if not templates:
        return None, None
    length = max(embeddings.shape[1] for embeddings in templates)
    embeddings, masks = [], []
    for part in parts:
        if part.embeddings is None or part.mask is None:
            embeddings.append(templates[0].new_zeros(len(part), length, templates[0].shape[2]))
            masks.append(part.class_ids.new_zeros(len(part), length, dtype=torch.bool))
        else:
            padding = length - part.embeddings.shape[1]
            embeddings.append(F.pad(part.embeddings, (0, 0, 0, padding)))
            masks.append(F.pad(part.mask, (0, padding)))
    return torch.cat(embeddings), torch.cat(masks)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__


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


def _check_ids(class_labels: Tensor):
    is_integer = class_labels.dtype in (torch.int64, torch.int32)
    if not is_integer or class_labels.ndim > 1:
        raise ValueError(
            f"expected class_labels to be integers of shape (B,), "
            f"got {class_labels.dtype} of shape {tuple(class_labels.shape)}"
        )


def _as_list(class_labels: Any) -> list[Any]:
    """One label, or a sequence, an array or a tensor of them, as a list of integers and names."""
    if isinstance(class_labels, Tensor):
        _check_ids(class_labels)
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
