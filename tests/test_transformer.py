import pytest
import torch

from progressive_vae.models.orderings import group_positions
from progressive_vae.models.transformer import earlier_neighbors

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "ordering",
    [
        ("lattice", 7),
        ("lattice", 10),
        ("masked", 8),
        ("diagonal", 1),
        ("diagonal", 7),
        ("raster", 1),
    ],
)
def test_neighbors_are_adjacent_and_decoded_earlier(ordering):
    height, width = size = (5, 9)
    group_of = {}
    for i, positions in enumerate(group_positions(*ordering, size, CPU)):
        group_of |= dict.fromkeys(positions.tolist(), i)
    neighbors = earlier_neighbors(*ordering, size, CPU)
    for position, column in enumerate(neighbors.T.tolist()):
        earlier = [n for n in column if n < height * width]
        assert all(group_of[n] < group_of[position] for n in earlier)
        steps = [
            max(abs(n // width - position // width), abs(n % width - position % width))
            for n in earlier
        ]
        assert len({*steps}) <= 1 and len({*earlier}) == len(earlier)
        # Whatever is adjacent and decoded earlier is a neighbor.
        adjacent = [
            other
            for other in range(height * width)
            if other != position
            and abs(other // width - position // width) <= 1
            and abs(other % width - position % width) <= 1
            and group_of[other] < group_of[position]
        ]
        assert not adjacent or sorted(earlier) == adjacent
        assert earlier or group_of[position] == 0 or ordering[0] == "masked"


def test_neighbors_in_a_lattice():
    neighbors = earlier_neighbors("lattice", 7, (8, 8), CPU)
    assert set(neighbors[:, 2 * 8 + 2].tolist()) == {0, 4, 32, 36, 64}  # at the distance 2
    assert set(neighbors[:, 1 * 8 + 1].tolist()) == {0, 2, 16, 18, 64}
    assert set(neighbors[:, 0].tolist()) == {64}  # of the first group: none
