"""Orderings: which positions of a finer grid are predicted together, and in which sequence.

An ordering is a list of groups that covers the grid, each position once. Inside a group positions
are in row-major order. A group has two views of the grid:

- values: integers (..., H, W), of which it gathers and scatters its n positions, (..., n);
- features: a network's state (B, width, H / stride, W / stride), which contains its n positions.

Networks work on a padded grid, whose sides are multiples of the coarsest stride.
`ValidPositions` selects the positions that lie in the true grid.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .device_constant import device_constant


@dataclass(frozen=True)
class Lattice:
    """The positions `offset + stride · (y, x)` of the finer grid.

    The state (B, width, H / stride, W / stride) holds exactly this group's n positions.
    """

    stride: int
    offset: tuple[int, int] = (0, 0)

    def gather_values(self, grid: Tensor) -> Tensor:
        """Grid (..., H, W) -> its values at this group's positions, (..., n)."""
        return self._view(grid).flatten(-2)

    def scatter_values(self, grid: Tensor, values: Tensor):
        """Write values (..., n) into the grid (..., H, W) at this group's positions."""
        view = self._view(grid)
        view.copy_(values.unflatten(-1, view.shape[-2:]))

    def neighbors(self, grid: Tensor, size: tuple[int, int]) -> Tensor | None:
        """The four nearest values of earlier groups around each position, (4, ..., n).

        Diagonal neighbors for the diagonal lattice, else those above, left, right and below.
        Indices are reflected at the borders of the true `size` (H, W). Along a side of up to half
        the stride neither neighbor exists, and the value can be one that is still 0.

        Returns:
            `None` for the coarsest lattice, which has no earlier groups.
        """
        if self.offset == (0, 0):
            return None
        padded_size = (grid.shape[-2], grid.shape[-1])
        indices = _neighbor_indices(self.stride, self.offset, padded_size, size, grid.device)
        values = grid.flatten(-2).index_select(-1, indices.flatten())
        return values.unflatten(-1, indices.shape).movedim(-2, 0)

    def gather_features(self, state: Tensor) -> Tensor:
        """State (B, width, h, w) -> the features at this group's positions, (B, n, width)."""
        return state.movedim(1, -1).flatten(1, 2)

    def scatter_features(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """Features (B, n, E) -> a map of the state's size (h, w), (B, E, h, w)."""
        return features.unflatten(1, size).movedim(-1, 1)

    def _view(self, grid: Tensor) -> Tensor:
        return grid[..., self.offset[0] :: self.stride, self.offset[1] :: self.stride]


@device_constant
def _neighbor_indices(
    stride: int,
    offset: tuple[int, int],
    padded_size: tuple[int, int],
    size: tuple[int, int],
    device: torch.device,
) -> Tensor:
    """Row-major indices into the padded grid for `Lattice.neighbors`, int64 (4, n)."""
    half = stride // 2
    is_diagonal = min(offset) > 0
    rows, columns = (
        torch.arange(start, end, stride) for start, end in zip(offset, padded_size, strict=True)
    )
    indices = [
        _reflect(rows, y, size[0])[:, None] * padded_size[1] + _reflect(columns, x, size[1])
        for y in (-half, 0, half)
        for x in (-half, 0, half)
        if (x and y if is_diagonal else bool(x) != bool(y))
    ]
    return torch.stack(indices).flatten(1).to(device)


def _reflect(indices: Tensor, shift: int, length: int) -> Tensor:
    """`indices + shift`, or `indices − shift` where the sum leaves [0, length)."""
    shifted = indices + shift
    shifted = torch.where((shifted < 0) | (shifted >= length), indices - shift, shifted)
    return shifted.clamp(0, length - 1)  # for positions in the padding


@dataclass(frozen=True, eq=False)
class IndexGroup:
    """Any set of positions, as row-major indices into the finer grid.

    The state has stride 1 and covers the whole grid, (B, width, H, W).

    Args:
        positions: int64 (n,), ascending.
    """

    positions: Tensor
    stride: int = 1

    def gather_values(self, grid: Tensor) -> Tensor:
        """As `Lattice.gather_values`."""
        return grid.flatten(-2)[..., self.positions]

    def scatter_values(self, grid: Tensor, values: Tensor):
        """As `Lattice.scatter_values`."""
        grid.view(*grid.shape[:-2], -1)[..., self.positions] = values

    def neighbors(self, grid: Tensor, size: tuple[int, int]) -> None:
        """`None`: earlier values have no fixed arrangement around a position."""

    def gather_features(self, state: Tensor) -> Tensor:
        """As `Lattice.gather_features`."""
        return state.movedim(1, -1).flatten(1, 2)[:, self.positions]

    def scatter_features(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """As `Lattice.scatter_features`, with 0 at the positions of other groups."""
        zeros = features.new_zeros(len(features), math.prod(size), features.shape[-1])
        scattered = zeros.index_copy(1, self.positions.to(features.device), features)
        return scattered.unflatten(1, size).movedim(-1, 1)


Group = Lattice | IndexGroup


def index_grid(size: tuple[int, int], padded_size: tuple[int, int]) -> Tensor:
    """The row-major index of each position of the true grid, −1 in the padding: int64 (H', W')."""
    index = torch.arange(math.prod(size)).view(size)
    return F.pad(index, (0, padded_size[1] - size[1], 0, padded_size[0] - size[0]), value=-1)


@dataclass(frozen=True, eq=False)
class ValidPositions:
    """Which of a group's n' positions in the padded grid lie in the true grid: n of them.

    Args:
        num_padded: n'.
        positions: row-major indices in the true grid, int64 (n,).
        slots: their indices among the n' positions, int64 (n,); `None` if all are valid, so that
            `select` and `scatter` copy nothing.
    """

    num_padded: int
    positions: Tensor
    slots: Tensor | None

    def select(self, x: Tensor, dim: int = -1) -> Tensor:
        """Drop padded positions along a dimension: n' -> n."""
        return x if self.slots is None else x.index_select(dim, self.slots)

    def scatter(self, values: Tensor) -> Tensor:
        """Values (B, n) -> (B, n'), 0 at padded positions."""
        if self.slots is None:
            return values
        zeros = values.new_zeros(len(values), self.num_padded)
        return zeros.index_copy_(1, self.slots, values)


def factorized_ordering(
    num_groups: int, size: tuple[int, int], device: torch.device
) -> list[Group]:
    """All positions in one group."""
    return [Lattice(stride=1)]


def lattice_ordering(num_groups: int, size: tuple[int, int], device: torch.device) -> list[Group]:
    """The coarsest lattice, then each halving of its stride: diagonal, horizontal, vertical."""
    halvings = num_groups // 3
    groups: list[Group] = [Lattice(2**halvings)]
    for half in (2**k for k in reversed(range(halvings))):
        stride = 2 * half
        groups += [Lattice(stride, (half * y, half * x)) for y, x in ((1, 1), (0, 1), (1, 0))]
    return groups


def masked_ordering(num_groups: int, size: tuple[int, int], device: torch.device) -> list[Group]:
    """A fixed random ordering whose first groups are small.

    After group t of T a fraction 1 − cos(π t / 2T) of the grid has been predicted: the cosine
    schedule of MaskGIT (Chang et al. 2022). MaskGIT orders positions by sampled confidences; here
    the ordering is independent of the values, which makes the likelihood exact.
    """
    return [*map(IndexGroup, _masked_positions(num_groups, math.prod(size), device))]


@device_constant
def _masked_positions(num_groups: int, count: int, device: torch.device) -> tuple[Tensor, ...]:
    # The stream of `RandomState` never changes, so saved models keep their ordering.
    permutation = np.random.RandomState(0).permutation(count)
    ends = [
        round(count * (1 - math.cos(math.pi * t / (2 * num_groups)))) for t in range(num_groups + 1)
    ]
    chunks = (
        np.sort(permutation[start:end]) for start, end in zip(ends[:-1], ends[1:], strict=True)
    )
    return tuple(torch.from_numpy(chunk).to(device) for chunk in chunks)


def raster_ordering(num_groups: int, size: tuple[int, int], device: torch.device) -> list[Group]:
    """Each position is a group, in row-major order."""
    return [*map(IndexGroup, torch.arange(math.prod(size), device=device).split(1))]


def diagonal_ordering(num_groups: int, size: tuple[int, int], device: torch.device) -> list[Group]:
    """The anti-diagonals, from the first position to the last: H + W − 1 groups.

    A position's left and upper neighbors are in the group before its own, as they are earlier in a
    raster. With 2c − 1 groups the grid is split into cells of c×c positions, and the anti-diagonals
    of all cells are predicted in parallel.
    """
    return [*map(IndexGroup, _diagonals(num_groups, size, device))]


@device_constant
def _diagonals(num_groups: int, size: tuple[int, int], device: torch.device) -> tuple[Tensor, ...]:
    height, width = size
    side = (num_groups + 1) // 2 if num_groups > 1 else max(size)
    diagonal = (torch.arange(height) % side)[:, None] + torch.arange(width) % side
    count = int(diagonal.max()) + 1
    return tuple((diagonal.flatten() == i).nonzero()[:, 0].to(device) for i in range(count))


# (num_groups, padded size (H, W), device) -> the groups in sequence. Strides are powers of two and
# never increase. The config lists the same names, with the numbers of groups that each can have.
ORDERINGS: dict[str, Callable[[int, tuple[int, int], torch.device], list[Group]]] = {
    "factorized": factorized_ordering,
    "lattice": lattice_ordering,
    "masked": masked_ordering,
    "raster": raster_ordering,
    "diagonal": diagonal_ordering,
}


def group_schedule(
    ordering: str,
    num_groups: int,
    size: tuple[int, int],
    padded_size: tuple[int, int],
    device: torch.device,
) -> list[tuple[Group, ValidPositions]]:
    """The groups of a padded grid in sequence, each with its positions in the true grid."""
    groups = ORDERINGS[ordering](num_groups, padded_size, device)
    valid = _valid_positions(ordering, num_groups, size, padded_size, device)
    return [(group, ValidPositions(*x)) for group, x in zip(groups, valid, strict=True)]


def group_positions(
    ordering: str, num_groups: int, size: tuple[int, int], device: torch.device
) -> list[Tensor]:
    """The positions of each group in a grid without padding: row-major indices, int64 (n,)."""
    valid = _valid_positions(ordering, num_groups, size, size, device)
    return [positions for _, positions, _ in valid]


@device_constant
def _valid_positions(
    ordering: str,
    num_groups: int,
    size: tuple[int, int],
    padded_size: tuple[int, int],
    device: torch.device,
) -> tuple[tuple[int, Tensor, Tensor | None], ...]:
    """The arguments of `ValidPositions` of each group."""
    valid = []
    for group in ORDERINGS[ordering](num_groups, padded_size, torch.device("cpu")):
        indices = group.gather_values(index_grid(size, padded_size))
        is_valid = indices >= 0
        slots = None if is_valid.all() else is_valid.nonzero()[:, 0].to(device)
        valid.append((len(indices), indices[is_valid].to(device), slots))
    return tuple(valid)


@dataclass(frozen=True, eq=False)
class PositionsOfAllGroups:
    """The positions of all groups, one group after the other: N in the padded grid.

    With teacher forcing it gathers for all groups at once what each group gathers by itself.

    Args:
        positions: row-major indices in the padded grid, int64 (N,).
        counts: the number of positions of each group.
        is_valid: which positions lie in the true grid, bool (N,); `None` if all do.
        neighbors: indices of `Lattice.neighbors` of all groups but the first, int64 (4 · N',);
            `None` if the groups have no neighbors.
        is_decoded: which neighbors belong to earlier groups, bool (4, N'); `None` if all do.
    """

    positions: Tensor
    counts: tuple[int, ...]
    is_valid: Tensor | None
    neighbors: Tensor | None
    is_decoded: Tensor | None

    def gather_values(self, grid: Tensor) -> Tensor:
        """Grid (..., H, W) -> (..., N)."""
        return grid.flatten(-2).index_select(-1, self.positions)

    def gather_neighbors(self, grid: Tensor) -> Tensor:
        """Grid (..., H, W) -> neighbors outside the first group, (4, ..., N')."""
        assert self.neighbors is not None
        values = grid.flatten(-2).index_select(-1, self.neighbors)
        return values.unflatten(-1, (4, -1)).movedim(-2, 0)

    def mask_undecoded(self, neighbors: Tensor) -> Tensor:
        """Neighbors (4, B, C, N') with 0 in place of those that a walk does not know yet."""
        if self.is_decoded is None:
            return neighbors
        return neighbors * self.is_decoded[:, None, None]

    def runs(self, first_group: int = 0) -> list[tuple[slice, slice]]:
        """Runs of consecutive groups with equal numbers of positions: the groups and their
        positions, counted from those of the first group."""
        runs = []
        start, position = first_group, 0
        for count, groups in groupby(self.counts[first_group:]):
            stop = start + len([*groups])
            end = position + count * (stop - start)
            runs.append((slice(start, stop), slice(position, end)))
            start = stop
            position = end
        return runs


def positions_of_all_groups(
    ordering: str,
    num_groups: int,
    size: tuple[int, int],
    padded_size: tuple[int, int],
    device: torch.device,
) -> PositionsOfAllGroups:
    """The groups of `group_schedule`, joined."""
    return PositionsOfAllGroups(*_joined(ordering, num_groups, size, padded_size, device))


@device_constant
def _joined(
    ordering: str,
    num_groups: int,
    size: tuple[int, int],
    padded_size: tuple[int, int],
    device: torch.device,
) -> tuple[Any, ...]:
    """The arguments of `PositionsOfAllGroups`."""
    cpu = torch.device("cpu")
    groups = ORDERINGS[ordering](num_groups, padded_size, cpu)
    index = torch.arange(math.prod(padded_size)).view(padded_size)
    positions = [group.gather_values(index) for group in groups]
    inside = index_grid(size, padded_size) >= 0
    is_valid = torch.cat([group.gather_values(inside) for group in groups])
    neighbors = is_decoded = None
    lattices = [group for group in groups[1:] if isinstance(group, Lattice)]
    if lattices:
        group_of = torch.empty(index.numel(), dtype=torch.long)  # of each position
        for i, group_positions in enumerate(positions):
            group_of[group_positions] = i
        parts = [_neighbor_indices(x.stride, x.offset, padded_size, size, cpu) for x in lattices]
        is_decoded = torch.cat([group_of[part] < i for i, part in enumerate(parts, 1)], 1)
        neighbors = torch.cat(parts, 1).flatten().to(device)
        is_decoded = None if is_decoded.all() else is_decoded.to(device)
    return (
        torch.cat(positions).to(device),
        tuple(len(group_positions) for group_positions in positions),
        None if is_valid.all() else is_valid.to(device),
        neighbors,
        is_decoded,
    )
