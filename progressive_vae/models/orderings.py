"""Which positions of a finer grid are predicted together, and in which order.

A group knows how to take its values out of a grid and put them in, and where its positions lie in
a network's state. An order is a list of groups that covers the grid, each position once; a group's
positions are in row-major order. That grid may be larger than the true one, whose positions alone
are asked for when a decoder walks over the groups.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .distributions import Distribution


class WalkStep(NamedTuple):
    """Where a walk stands.

    Args:
        group: its number, from 0.
        color: its number, from 0; of symbols always 0.
        positions: row-major indices of positions in the true grid (H, W), ascending, int64 (n,).
    """

    group: int
    color: int
    positions: Tensor


# What to do at one step of a walk: it returns the values at the place, int64 (B, n).
StepFn = Callable[[Distribution, WalkStep], Tensor]


def call_step_fn(
    choose: StepFn, distribution: Distribution, place: WalkStep, batch_size: int
) -> Tensor:
    """What `choose` returns, or a `ValueError` if it is not int64 (B, n)."""
    values, expected = choose(distribution, place), (batch_size, len(place.positions))
    if values.dtype != torch.long or values.shape != expected:
        raise ValueError(
            f"expected choose to return int64 of shape {expected}, got {values.dtype} of shape "
            f"{tuple(values.shape)}"
        )
    return values


class TeacherForcing:
    """A `StepFn` that follows a known grid: `terms` are the nats of its values, (B,), step by step.

    Args:
        values: int64 (B, C, H, W).
    """

    def __init__(self, values: Tensor):
        self.entries, self.terms = values.flatten(2), list[Tensor]()

    def __call__(self, distribution: Distribution, place: WalkStep) -> Tensor:
        values = self.entries[:, place.color].index_select(1, place.positions)
        self.terms.append(distribution.log_prob(values).sum(1))
        return values


@dataclass(frozen=True)
class Lattice:
    """The positions `offset + stride · (y, x)` of the finer grid, predicted together.

    `grid` is (..., H, W). The network's state is (B, width, H/stride, W/stride): one place for
    each of the n positions.
    """

    stride: int
    offset: tuple[int, int] = (0, 0)

    def gather_values(self, grid: Tensor) -> Tensor:
        """The entries at this group's positions, (..., n)."""
        return self._view(grid).flatten(-2)

    def neighbors(self, grid: Tensor, size: tuple[int, int]) -> Tensor | None:
        """The four entries around each position that are known before this group, (4, ..., n),
        mirrored at the borders of the true `size` (H, W); `None` where nothing is known.

        Along a side of up to half the stride neither is there, and an entry may be a 0 for want of
        a better one."""
        if self.offset == (0, 0):
            return None
        indices = _near(self, tuple(grid.shape[-2:]), tuple(size), grid.device)
        found = grid.flatten(-2).index_select(-1, indices.flatten())
        return found.unflatten(-1, indices.shape).movedim(-2, 0)

    def scatter_values(self, grid: Tensor, values: Tensor):
        """The reverse: write (..., n)."""
        view = self._view(grid)
        view.copy_(values.unflatten(-1, view.shape[-2:]))

    def gather_features(self, state: Tensor) -> Tensor:
        """The state at this group's positions, (B, n, width)."""
        return state.movedim(1, -1).flatten(1, 2)

    def scatter_features(self, vectors: Tensor, size: tuple[int, int]) -> Tensor:
        """Vectors (B, n, E) at their places in a state of the given size, (B, E, h, w)."""
        return vectors.unflatten(1, size).movedim(-1, 1)

    def _view(self, grid: Tensor) -> Tensor:
        return grid[..., self.offset[0] :: self.stride, self.offset[1] :: self.stride]


@lru_cache(maxsize=256)  # a fifth of the operations that a walk would ask of a device
@torch.inference_mode(False)  # of which a gradient may be asked later
def _near(
    lattice: Lattice, padded: tuple[int, int], size: tuple[int, int], device: torch.device
) -> Tensor:
    """Row-major indices in the padded grid of the entries of `Lattice.neighbors`, (4, n)."""
    step, is_corner = lattice.stride // 2, min(lattice.offset) > 0
    rows, columns = (
        torch.arange(start, end, lattice.stride, device="cpu")
        for start, end in zip(lattice.offset, padded, strict=True)
    )
    indices = [
        _mirrored(rows, y, size[0])[:, None] * padded[1] + _mirrored(columns, x, size[1])
        for y in (-step, 0, step)
        for x in (-step, 0, step)
        if (x and y if is_corner else bool(x) != bool(y))
    ]
    return torch.stack(indices).flatten(1).to(device)


def _mirrored(indices: Tensor, step: int, length: int) -> Tensor:
    """Indices moved by `step`, or as far back where that leaves [0, length)."""
    moved = indices + step
    moved = torch.where((moved < 0) | (moved >= length), indices - step, moved)
    return moved.clamp(0, length - 1)  # of positions that are outside themselves


@dataclass(frozen=True, eq=False)
class IndexGroup:
    """Any positions, as indices (n,) into the flattened finer grid; the state has one place for
    each position of that grid, and 0 where `scatter_features` has nothing to put."""

    positions: Tensor
    stride: int = 1

    def gather_values(self, grid: Tensor) -> Tensor:
        return grid.flatten(-2)[..., self.positions]

    def neighbors(self, grid: Tensor, size: tuple[int, int]) -> None:
        """No entries, as `Lattice.neighbors` finds: what is known lies anywhere."""

    def scatter_values(self, grid: Tensor, values: Tensor):
        grid.view(*grid.shape[:-2], -1)[..., self.positions] = values

    def gather_features(self, state: Tensor) -> Tensor:
        return state.movedim(1, -1).flatten(1, 2)[:, self.positions]

    def scatter_features(self, vectors: Tensor, size: tuple[int, int]) -> Tensor:
        places = vectors.new_zeros(len(vectors), math.prod(size), vectors.shape[-1])
        places = places.index_copy(1, self.positions.to(places.device), vectors)
        return places.unflatten(1, size).movedim(-1, 1)


Group = Lattice | IndexGroup


def index_grid(size: tuple[int, int], padded: tuple[int, int]) -> Tensor:
    """The row-major index of each position of the true grid, and −1 where it is padded: int64."""
    index = torch.arange(math.prod(size)).view(size)
    return F.pad(index, (0, padded[1] - size[1], 0, padded[0] - size[0]), value=-1)


class ValidPositions:
    """Which of a group's places lie in the true grid: all, some or none.

    Args:
        found: `group.gather_values(index_grid(…))`, int64 (n,).
    """

    def __init__(self, found: Tensor, device: torch.device):
        is_inside = found >= 0
        self.num_places = len(found)
        self.positions = found[is_inside].to(device)
        # `None`: all of them, and nothing has to be moved.
        self.places = None if is_inside.all() else is_inside.nonzero()[:, 0].to(device)

    def select(self, x: Tensor, dim: int = -1) -> Tensor:
        """What x has at the places inside."""
        return x if self.places is None else x.index_select(dim, self.places)

    def scatter_features(self, values: Tensor) -> Tensor:
        """The reverse, of values (B, n): 0 at the places that are not inside."""
        if self.places is None:
            return values
        zeros = values.new_zeros(len(values), self.num_places)
        return zeros.index_copy_(1, self.places, values)


def factorized_order(num_groups: int, size: tuple[int, int]) -> list[Group]:
    return [Lattice(stride=1)]


def lattice_order(num_groups: int, size: tuple[int, int]) -> list[Group]:
    """The coarsest lattice, then each halving of its stride: diagonal, horizontal, vertical."""
    halvings = num_groups // 3
    groups: list[Group] = [Lattice(2**halvings)]
    for half in (2**k for k in reversed(range(halvings))):
        stride = 2 * half
        groups += [Lattice(stride, (half * y, half * x)) for y, x in ((1, 1), (0, 1), (1, 0))]
    return groups


def masked_order(num_groups: int, size: tuple[int, int]) -> list[Group]:
    """A random order that is the same for ever, few positions first.

    The share that is known after group t of T is 1 − cos(π t / 2T) (MaskGIT, Chang et al. 2022).
    Unlike there the order does not depend on what was drawn, so the likelihood is exact.
    """
    count = math.prod(size)
    order = np.random.RandomState(0).permutation(count)  # a frozen stream
    ends = [
        round(count * (1 - math.cos(math.pi * t / (2 * num_groups)))) for t in range(num_groups + 1)
    ]
    parts = (np.sort(order[a:b]) for a, b in zip(ends[:-1], ends[1:], strict=True))
    return [IndexGroup(torch.from_numpy(part)) for part in parts]


# Of so many groups, and a padded grid's size (H, W), the groups in their order, whose strides are
# powers of two and never rise.
ORDERS = {"factorized": factorized_order, "lattice": lattice_order, "masked": masked_order}


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # of what is walked a gradient may be asked later
def group_schedule(
    order: str,
    num_groups: int,
    size: tuple[int, int],
    padded: tuple[int, int],
    device: torch.device,
) -> list[tuple[Group, ValidPositions]]:
    """The groups of a padded grid in their order, and which places of each lie in the true one."""
    with torch.device("cpu"):
        index, groups = index_grid(size, padded), ORDERS[order](num_groups, padded)
        return [(group, ValidPositions(group.gather_values(index), device)) for group in groups]
