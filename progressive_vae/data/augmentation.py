"""Augmentation of the finest level's images: rotations and permutations of the color channels.

Coarser levels and the prior train on the original images, and samples follow their distribution.
The finest level models pixels conditioned on codes, where most of the bits are; augmented images
multiply its training data. Distribution augmentation (Jun et al. 2020) conditions on the transform;
here the codes of an augmented image determine it.
"""

from dataclasses import dataclass
from itertools import permutations, product
from typing import TypeAlias

import torch
from torch import Tensor

from .code_cache import GridDataset

Transform: TypeAlias = tuple[int, tuple[int, ...]]  # quarter turns, and an order of the channels


@dataclass(frozen=True)
class Augmentation:
    """The transforms of an image.

    Args:
        rotation: by multiples of 90°, or of 180° if it is not square.
        colors: by permutations of its channels.
    """

    rotation: bool = False
    colors: bool = False

    def transforms(self, shape: tuple[int, ...]) -> list[Transform]:
        """Return all transforms of images (C, H, W); the first one is the identity."""
        channels, height, width = shape
        turns = range(0, 4, 1 if height == width else 2) if self.rotation else range(1)
        identity = tuple(range(channels))
        return [*product(turns, permutations(identity) if self.colors else [identity])]


IDENTITY = Augmentation()


def augment(grid: Tensor, transform: Transform) -> Tensor:
    """Permute the channels of an image (C, H, W), and rotate it."""
    turns, channels = transform
    return torch.rot90(grid[list(channels)], turns, (1, 2))


class AugmentedDataset(torch.utils.data.Dataset):
    """All transforms of all grids of a cache, computed on access.

    Transform `k` of grid `i` has the index `i + n·k`, where `n` is the number of grids.
    """

    def __init__(self, grids: GridDataset, augmentation: Augmentation):
        self.grids = grids
        self.transforms = augmentation.transforms(grids.manifest.shape)
        self.manifest = grids.manifest
        self.num_examples = len(grids) * len(self.transforms)

    def __len__(self) -> int:
        return self.num_examples

    def sample(self, count: int, seed: int) -> Tensor:
        """Return random grids, not transformed: int64 (b, C, H, W)."""
        return self.grids.sample(count, seed)

    def __getitems__(self, indices: list[int]) -> list[dict]:
        examples = self.grids.__getitems__([i % len(self.grids) for i in indices])
        for i, example in zip(indices, examples, strict=True):
            transform = self.transforms[i // len(self.grids)]
            example |= {"grid": augment(example["grid"], transform), "index": i}
        return examples

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]
