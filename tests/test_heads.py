import pytest
import torch
from conftest import tiny_level

from progressive_vae import ProgressiveVAELevelConfig
from progressive_vae.distributions import Categorical, PixelMixture
from progressive_vae.groups import Lattice
from progressive_vae.heads import FreeLogits, PixelLogistics, PixelLogits, make_head

KINDS = [
    (dict(num_symbols=5), FreeLogits, Categorical),
    (dict(num_channels=3, pixel_logit_rank=0), FreeLogits, Categorical),
    (dict(num_channels=3), PixelLogits, Categorical),
    (dict(num_channels=3, pixel_distribution="logistics"), PixelLogistics, PixelMixture),
]


@pytest.mark.parametrize(("config", "kind", "distribution"), KINDS)
def test_each_kind_of_value_has_its_head(config, kind, distribution):
    config = ProgressiveVAELevelConfig(hidden_size=8, **config)
    head, features = make_head(config), torch.randn(2, 6, 8)
    assert type(head) is kind
    grid = torch.randint(config.num_values, (2, config.value_channels, 4, 6))
    guesses = head.guesses(Lattice(2, (1, 1)), grid, (4, 6))
    is_seeing = kind is PixelLogistics
    assert guesses.shape == (8 * is_seeing, 2, config.value_channels, 6)
    said = head(features, guesses[:, :, 0], None)
    assert type(said) is distribution
    assert said.logits.shape == (2, 6, config.num_values)
    misses = grid[:, 0, 1::2, 1::2].flatten(1) - guesses[:, :, 0]
    assert head.seen(misses).shape == (2, 6, 3 * is_seeing)


@pytest.mark.parametrize(("config", "kind", "_"), KINDS)
def test_what_a_head_sees_has_weights_under_published_names(config, kind, _):
    level = tiny_level(**config)
    stages = level.decoder.stages
    looks = [k for k in range(4) if list(stages[k].look.parameters())]
    assert looks == ([1, 2, 3] if kind is PixelLogistics else [])
    names = level.decoder.state_dict()
    is_seeing, channels = kind is PixelLogistics, level.config.value_channels
    assert ("stages.1.look.weight" in names) == is_seeing
    assert names["stages.0.take_in.weight"].shape[1] == channels * (16 + 3 * is_seeing)


def test_guesses_are_the_neighbours_and_their_mean():
    head, grid = PixelLogistics(8, 256), torch.arange(16).view(1, 1, 4, 4) * 10
    guesses = head.guesses(Lattice(2, (1, 1)), grid, (4, 4))[:, 0, 0, 0]
    assert guesses.tolist() == [0, 20, 80, 100] + 4 * [50]
    without = head.guesses(Lattice(2), grid, (4, 4))
    assert without[:, 0, 0, 0].tolist() == list(range(16, 256, 32))
