"""The finest level sees more images than there are: turned by quarters, in other colours.

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
class Forms:
    """How an image may look otherwise.

    Args:
        rotation: turned by quarters, and by halves where it is no square.
        colours: with its colours exchanged for each other.
    """

    rotation: bool = False
    colours: bool = False

    def of(self, shape: tuple[int, ...]) -> list[tuple[int, tuple[int, ...]]]:
        """Quarter turns and order of colours of each form of (C, H, W); the first changes
        nothing."""
        channels, height, width = shape
        turns = range(0, 4, 1 if height == width else 2) if self.rotation else range(1)
        colours = tuple(range(channels))
        return [*product(turns, permutations(colours) if self.colours else [colours])]


AS_THEY_ARE = Forms()


def in_form(grid: Tensor, form: tuple[int, tuple[int, ...]]) -> Tensor:
    """(C, H, W), turned and with its colours in another order."""
    turns, colours = form
    return torch.rot90(grid[list(colours)], turns, (1, 2))


class FormsDataset(torch.utils.data.Dataset):
    """All forms of all grids of a cache, which are made as they are asked for: those of grid `i`
    have the indices `i + n·k`."""

    def __init__(self, grids: GridDataset, forms: Forms):
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
            example |= {"grid": in_form(example["grid"], form), "index": i}
        return examples

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]
