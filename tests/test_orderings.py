import pytest
import torch

from helpers.models import ORDER_NAMES, PIXEL_ORDERS, level_of
from progressive_vae.models.orderings import (
    ORDERINGS,
    group_positions,
    group_schedule,
    index_grid,
    lattice_ordering,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(ORDER_NAMES, PIXEL_ORDERS)
def test_an_ordering_covers_each_position_once(order, downsample, num_groups):
    config = level_of(order, downsample, num_groups, num_channels=1).config
    counts = torch.zeros(8, 16, dtype=torch.long)
    groups = ORDERINGS[order](config.num_groups, (8, 16), CPU)
    for group in groups:
        group.scatter_values(counts, group.gather_values(counts) + 1)
    assert (counts == 1).all()
    strides = [group.stride for group in groups]
    assert strides == sorted(strides, reverse=True)
    # The number of groups does not depend on the grid's size.
    assert (
        len(groups) == len(ORDERINGS[order](config.num_groups, (16, 16), CPU)) == config.num_groups
    )


@pytest.mark.parametrize("size", [(1, 1), (5, 7)])
@pytest.mark.parametrize(
    ("ordering", "num_groups"),
    [
        ("factorized", 1),
        ("lattice", 10),
        ("masked", 3),
        ("masked", 200),
        ("raster", 1),
        ("diagonal", 1),
    ],
)
def test_groups_without_padding_cover_each_position_once(ordering, num_groups, size):
    groups = group_positions(ordering, num_groups, size, CPU)
    assert torch.equal(torch.cat(groups).sort().values, torch.arange(size[0] * size[1]))
    num_expected = {"raster": size[0] * size[1], "diagonal": size[0] + size[1] - 1}
    assert len(groups) == num_expected.get(ordering, num_groups)
    assert all(torch.equal(group, group.sort().values) for group in groups)


@pytest.mark.parametrize(ORDER_NAMES, PIXEL_ORDERS)
def test_scatter_features_inverts_gather_features(order, downsample, num_groups):
    config = level_of(order, downsample, num_groups, num_channels=1).config
    for group in ORDERINGS[order](config.num_groups, (8, 16), CPU):
        size = (8 // group.stride, 16 // group.stride)
        features = group.gather_features(torch.randn(2, 3, *size))
        scattered = group.scatter_features(features, size)
        assert torch.equal(group.gather_features(scattered), features)
        assert (scattered != 0).sum() == features.numel()


@pytest.mark.parametrize(
    "size, num_groups", [((8, 8), 7), ((5, 7), 7), ((3, 8), 7), ((8, 8), 10), ((5, 7), 10)]
)
def test_neighbors_belong_to_earlier_groups(size, num_groups):
    decoded = torch.full((8, 8), -1)  # −1 where no value has been written yet
    is_valid = torch.zeros(8, 8)
    is_valid[: size[0], : size[1]] = 1
    indices = torch.arange(64).view(8, 8)
    for group in lattice_ordering(num_groups, (8, 8), CPU):
        positions = group.gather_values(indices)
        mask = group.gather_values(is_valid).bool()
        neighbors = group.neighbors(decoded, size)
        if group.offset != (0, 0):
            assert (neighbors[:, mask] >= 0).all()
            half = group.stride // 2
            distances = {abs(y * 8 + x) for y in (-half, 0, half) for x in (-half, 0, half)}
            shifts = (neighbors - positions)[:, mask].abs()
            assert set(shifts.flatten().tolist()) <= distances - {0}
        group.scatter_values(decoded, torch.where(mask, positions, -1))


def test_valid_positions_select_those_of_the_true_grid():
    indices = index_grid((2, 3), (4, 4)).flatten()
    ((_, valid),) = group_schedule("factorized", 1, (2, 3), (4, 4), CPU)
    assert valid.positions.tolist() == [0, 1, 2, 3, 4, 5]
    x = torch.arange(16)[None]
    assert valid.select(x).tolist() == [[0, 1, 2, 4, 5, 6]]
    assert torch.equal(valid.scatter(valid.select(x)), torch.where(indices >= 0, x, 0))


def test_the_masked_ordering_never_changes():
    groups = ORDERINGS["masked"](3, (2, 4), CPU)
    assert [group.positions.tolist() for group in groups] == [[6], [1, 2, 7], [0, 3, 4, 5]]
