"""Distances between two sets of images: in features of a network, and between patches."""

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
    """What `distances` needs of a set of images.

    Args:
        patches: (n, C, 7, 7) of each scale, the finest first.
        features: (n, F) of a network, or `None` without one.
    """

    patches: list[Tensor]
    features: Tensor | None


def unit_batches(images: GridDataset) -> Iterator[Tensor]:
    """Yield batches of a cache's images as floats in [0, 1], (B, C, H, W)."""
    return (uint8_to_unit(grids) for grids, _ in images.batches(BATCH_SIZE))


def compute_stats(
    batches: Iterable[Tensor], num_images: int, extractor: nn.Module | None
) -> ImageStats:
    """Return the statistics of the first `num_images` images.

    Args:
        batches: (`BATCH_SIZE`, C, H, W) in [0, 1].
        extractor: of features (B, F); without one only patches are extracted.
    """
    features: list[Tensor] = []
    patches: list[list[Tensor]] = []
    remaining = num_images
    for batch in islice(batches, math.ceil(num_images / BATCH_SIZE)):
        seed = remaining - len(batch)  # another one for each batch
        batch = batch[:remaining]
        remaining = seed
        if extractor is not None:
            features.append(features_of(extractor, [batch]))
        patches.append(patches_of([batch], num_images, seed))
    scales = [torch.cat(scale) for scale in zip(*patches, strict=True)]
    return ImageStats(scales, torch.cat(features) if features else None)


def distances(real: ImageStats, samples: ImageStats) -> dict[str, Any]:
    """Return `sliced_wasserstein` of each scale and, if both sets have features,
    `frechet_distance`, `precision` and `recall`."""
    metrics: dict[str, Any] = {
        "sliced_wasserstein": sliced_wasserstein(real.patches, samples.patches)
    }
    if real.features is not None and samples.features is not None:
        metrics["frechet_distance"] = frechet_distance(real.features, samples.features)
        metrics |= precision_recall(real.features, samples.features)
    return metrics
