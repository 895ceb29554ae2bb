"""Which positions of a finer grid are predicted together, and in which order.

A group knows how to take its values out of a grid and put them in, and where its positions lie in
a network's state. An order is a list of groups that covers the grid, each position once.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .configuration import ProgressiveVAELevelConfig


@dataclass(frozen=True)
class Lattice:
    """The positions `offset + stride · (y, x)` of the finer grid, predicted together.

    `grid` is (..., H, W). The network's state is (B, width, H/stride, W/stride): one place for
    each of the n positions.
    """

    stride: int
    offset: tuple[int, int] = (0, 0)

    def take(self, grid: Tensor) -> Tensor:
        """The entries at this group's positions, (..., n)."""
        return self._view(grid).flatten(-2)

    def near(self, grid: Tensor, size: tuple[int, int]) -> Tensor | None:
        """The four entries around each position that are known before this group, (4, ..., n),
        mirrored at the borders of the true `size` (H, W); `None` where nothing is known.

        Along a side of up to half the stride neither is there, and an entry may be a 0 for want of
        a better one."""
        step = self.stride // 2
        if self.offset == (0, 0):
            return None
        is_corner = min(self.offset) > 0
        rows, columns = (
            torch.arange(start, end, self.stride, device=grid.device)
            for start, end in zip(self.offset, grid.shape[-2:], strict=True)
        )
        entries = [
            grid[..., _mirrored(rows, y, size[0])[:, None], _mirrored(columns, x, size[1])]
            for y in (-step, 0, step)
            for x in (-step, 0, step)
            if (x and y if is_corner else bool(x) != bool(y))
        ]
        return torch.stack(entries).flatten(-2)

    def put(self, grid: Tensor, values: Tensor):
        """The reverse: write (..., n)."""
        view = self._view(grid)
        view.copy_(values.unflatten(-1, view.shape[-2:]))

    def gather(self, state: Tensor) -> Tensor:
        """The state at this group's positions, (B, n, width)."""
        return state.movedim(1, -1).flatten(1, 2)

    def spread(self, vectors: Tensor, size: tuple[int, int]) -> Tensor:
        """Vectors (B, n, E) at their places in a state of the given size, (B, E, h, w)."""
        return vectors.unflatten(1, size).movedim(-1, 1)

    def _view(self, grid: Tensor) -> Tensor:
        return grid[..., self.offset[0] :: self.stride, self.offset[1] :: self.stride]


def _mirrored(indices: Tensor, step: int, length: int) -> Tensor:
    """Indices moved by `step`, or as far back where that leaves [0, length)."""
    moved = indices + step
    moved = torch.where((moved < 0) | (moved >= length), indices - step, moved)
    return moved.clamp(0, length - 1)  # of positions that are outside themselves


@dataclass(frozen=True, eq=False)
class Scattered:
    """Any positions, as indices (n,) into the flattened finer grid; the state has one place for
    each position of that grid, and 0 where `spread` has nothing to put."""

    positions: Tensor
    stride: int = 1

    def take(self, grid: Tensor) -> Tensor:
        return grid.flatten(-2)[..., self.positions]

    def put(self, grid: Tensor, values: Tensor):
        grid.view(*grid.shape[:-2], -1)[..., self.positions] = values

    def gather(self, state: Tensor) -> Tensor:
        return state.movedim(1, -1).flatten(1, 2)[:, self.positions]

    def spread(self, vectors: Tensor, size: tuple[int, int]) -> Tensor:
        places = vectors.new_zeros(len(vectors), math.prod(size), vectors.shape[-1])
        places = places.index_copy(1, self.positions.to(places.device), vectors)
        return places.unflatten(1, size).movedim(-1, 1)


Group = Lattice | Scattered


def factorized_order(config: ProgressiveVAELevelConfig, size: tuple[int, int]) -> list[Group]:
    return [Lattice(stride=1)]


def lattice_order(config: ProgressiveVAELevelConfig, size: tuple[int, int]) -> list[Group]:
    """The coarsest lattice, then each halving of its stride: diagonal, horizontal, vertical."""
    assert config.num_groups is not None  # the config sees to it
    halvings = config.num_groups // 3
    groups: list[Group] = [Lattice(2**halvings)]
    for half in (2**k for k in reversed(range(halvings))):
        stride = 2 * half
        groups += [Lattice(stride, (half * y, half * x)) for y, x in ((1, 1), (0, 1), (1, 0))]
    return groups


def masked_order(config: ProgressiveVAELevelConfig, size: tuple[int, int]) -> list[Group]:
    """A random order that is the same for ever, few positions first.

    The share that is known after group t of T is 1 − cos(π t / 2T) (MaskGIT, Chang et al. 2022).
    Unlike there the order does not depend on what was drawn, so the likelihood is exact.
    """
    count, groups = math.prod(size), config.num_groups or 1
    order = torch.from_numpy(np.random.RandomState(0).permutation(count))  # a frozen stream
    ends = [round(count * (1 - math.cos(math.pi * t / (2 * groups)))) for t in range(groups + 1)]
    return [Scattered(order[a:b]) for a, b in zip(ends[:-1], ends[1:], strict=True)]


ORDERS = {"factorized": factorized_order, "lattice": lattice_order, "masked": masked_order}
