"""The finest level sees more images than there are: turned by quarters, in other colors.

What is coarser learns of the images as they are, and so what is drawn is like them; how pixels lie
around codes, to which most of the bits go, is learned from many more (as distribution augmentation,
Jun et al. 2020, whose labels of the forms the codes make needless).
"""

from dataclasses import dataclass
from itertools import permutations, product

import torch
from torch import Tensor

from .code_cache import GridDataset


@dataclass(frozen=True)
class Augmentation:
    """How an image may look otherwise.

    Args:
        rotation: turned by quarters, and by halves where it is no square.
        colors: with its colors exchanged for each other.
    """

    rotation: bool = False
    colors: bool = False

    def of(self, shape: tuple[int, ...]) -> list[tuple[int, tuple[int, ...]]]:
        """Quarter turns and order of colors of each form of (C, H, W); the first changes
        nothing."""
        channels, height, width = shape
        turns = range(0, 4, 1 if height == width else 2) if self.rotation else range(1)
        colors = tuple(range(channels))
        return [*product(turns, permutations(colors) if self.colors else [colors])]


IDENTITY = Augmentation()


def augment(grid: Tensor, form: tuple[int, tuple[int, ...]]) -> Tensor:
    """(C, H, W), turned and with its colors in another order."""
    turns, colors = form
    return torch.rot90(grid[list(colors)], turns, (1, 2))


class AugmentedDataset(torch.utils.data.Dataset):
    """All forms of all grids of a cache, which are made as they are asked for: those of grid `i`
    have the indices `i + n·k`."""

    def __init__(self, grids: GridDataset, forms: Augmentation):
        self.grids, self.forms = grids, forms.of(grids.manifest.shape)
        self.manifest = grids.manifest
        self.num_examples = len(grids) * len(self.forms)

    def __len__(self) -> int:
        return self.num_examples

    def sample(self, count: int, seed: int) -> Tensor:
        """As they are."""
        return self.grids.sample(count, seed)

    def __getitems__(self, indices: list[int]) -> list[dict]:
        examples = self.grids.__getitems__([i % len(self.grids) for i in indices])
        for i, example in zip(indices, examples, strict=True):
            form = self.forms[i // len(self.grids)]
            example |= {"grid": augment(example["grid"], form), "index": i}
        return examples

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]
