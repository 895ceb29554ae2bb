"""What two sets of images have in common: by features of a network, and by patches alone."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..data.code_cache import GridDataset
from ..models.value_types import uint8_to_unit
from .image_metrics import features_of, frechet_distance, precision_recall
from .sliced_wasserstein import patches_of, sliced_wasserstein

BATCH_SIZE = 250


@dataclass
class ImageStats:
    """What distances know of a set of images.

    Args:
        patches: (n, C, 7, 7) of each scale, the finest first.
        features: (n, F) of a network; `None` where there is none.
    """

    patches: list[Tensor]
    features: Tensor | None


def stored(images: GridDataset) -> Iterator[Tensor]:
    """Batches of images in [0, 1]."""
    return (uint8_to_unit(grids) for grids, _ in images.batches(BATCH_SIZE))


def see(batches: Iterable[Tensor], num_images: int, extractor: nn.Module | None) -> ImageStats:
    """The first images of batches of `BATCH_SIZE` in [0, 1]."""
    features, patches, left = [], [], num_images
    for batch in islice(batches, math.ceil(num_images / BATCH_SIZE)):
        batch, left = batch[:left], left - len(batch)
        features += [] if extractor is None else [features_of(extractor, [batch])]
        patches.append(patches_of([batch], num_images, left))
    columns = [torch.cat(scale) for scale in zip(*patches, strict=True)]
    return ImageStats(columns, torch.cat(features) if features else None)


def distances(real: ImageStats, drawn: ImageStats) -> dict[str, Any]:
    """`sliced_wasserstein` of each scale and, where there are features, `frechet_distance`,
    `precision` and `recall`."""
    found: dict[str, Any] = {"sliced_wasserstein": sliced_wasserstein(real.patches, drawn.patches)}
    if real.features is not None and drawn.features is not None:
        found["frechet_distance"] = frechet_distance(real.features, drawn.features)
        found |= precision_recall(real.features, drawn.features)
    return found
