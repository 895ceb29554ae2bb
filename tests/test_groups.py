import pytest
import torch
from conftest import ORDER_NAMES, PIXEL_ORDERS, level_of

from progressive_vae.models.orderings import ORDERS, lattice_order


@pytest.mark.parametrize(ORDER_NAMES, PIXEL_ORDERS)
def test_an_order_visits_every_position_once(order, downsample, num_groups):
    config = level_of(order, downsample, num_groups, num_channels=1).config
    visits, strides = torch.zeros(8, 16, dtype=torch.long), []
    groups = ORDERS[order](config.num_groups, (8, 16))
    for group in groups:
        group.scatter_values(visits, group.gather_values(visits) + 1)
        strides.append(group.stride)
    assert (visits == 1).all()
    assert strides == sorted(strides, reverse=True)
    assert len(groups) == config.num_groups
    assert len(ORDERS[order](config.num_groups, (16, 16))) == config.num_groups  # whatever the size


@pytest.mark.parametrize(ORDER_NAMES, PIXEL_ORDERS)
def test_what_a_group_gathers_it_spreads_to_the_same_places(order, downsample, num_groups):
    config = level_of(order, downsample, num_groups, num_channels=1).config
    for group in ORDERS[order](config.num_groups, (8, 16)):
        size = (8 // group.stride, 16 // group.stride)
        state = torch.randn(2, 3, *size)
        scatter_features = group.scatter_features(group.gather_features(state), size)
        assert torch.equal(group.gather_features(scatter_features), group.gather_features(state))
        assert (scatter_features != 0).sum() == group.gather_features(state).numel()


@pytest.mark.parametrize(
    "size, num_groups", [((8, 8), 7), ((5, 7), 7), ((3, 8), 7), ((8, 8), 10), ((5, 7), 10)]
)
def test_the_neighbors_of_a_position_are_known_before_it(size, num_groups):
    unknown, inside = torch.full((8, 8), -1), torch.zeros(8, 8)
    inside[: size[0], : size[1]] = 1
    values = torch.arange(64).view(8, 8)
    for group in lattice_order(num_groups, (8, 8)):
        neighbors, is_inside = group.neighbors(unknown, size), group.gather_values(inside).bool()
        if group.offset != (0, 0):
            apart = neighbors - group.gather_values(values)  # rows are 8 apart
            assert (neighbors[:, is_inside] >= 0).all()
            step = group.stride // 2
            distances = {abs(y * 8 + x) for y in (-step, 0, step) for x in (-step, 0, step)}
            assert set(apart[:, is_inside].abs().flatten().tolist()) <= distances - {0}
        group.scatter_values(unknown, torch.where(is_inside, group.gather_values(values), -1))


def test_the_random_order_is_the_same_for_ever():
    groups = ORDERS["masked"](3, (2, 4))
    assert [group.positions.tolist() for group in groups] == [[6], [1, 2, 7], [0, 3, 4, 5]]
