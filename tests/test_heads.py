import pytest
import torch
from conftest import tiny_level

from progressive_vae import ProgressiveVAELevel, ProgressiveVAELevelConfig
from progressive_vae.models.distributions import (
    Categorical,
    DiscretizedLogisticMixture,
    LowRankCategorical,
)
from progressive_vae.models.heads import (
    GuidedLogisticMixtureHead,
    LinearHead,
    LogisticMixtureHead,
    LowRankHead,
    OrdinalPixelHead,
    make_head,
)
from progressive_vae.models.orderings import Lattice

KINDS = [
    (dict(num_symbols=5), LinearHead, Categorical),
    (dict(num_symbols=5, symbol_logit_rank=2), LowRankHead, Categorical),
    (dict(num_symbols=2049), LowRankHead, LowRankCategorical),
    (dict(num_symbols=2049, symbol_logit_rank=0), LinearHead, LowRankCategorical),
    (dict(num_channels=3, pixel_logit_rank=0), LinearHead, Categorical),
    (dict(num_channels=3), OrdinalPixelHead, Categorical),
    (
        dict(num_channels=3, pixel_distribution="logistic_mixture"),
        LogisticMixtureHead,
        DiscretizedLogisticMixture,
    ),
    (
        dict(num_channels=3, pixel_distribution="guided_logistic_mixture", auxiliary_hidden_size=8),
        GuidedLogisticMixtureHead,
        DiscretizedLogisticMixture,
    ),
]
NUM_GUESSES = {LogisticMixtureHead: 8, GuidedLogisticMixtureHead: 10}


@pytest.mark.parametrize(("config", "kind", "distribution"), KINDS)
def test_each_kind_of_value_has_its_head(config, kind, distribution):
    config = ProgressiveVAELevelConfig(hidden_size=8, **config)
    head, features = make_head(config), torch.randn(2, 6, 8)
    assert type(head) is kind
    grid = torch.randint(config.num_values, (2, config.value_channels, 4, 6))
    picture = torch.rand(2, config.value_channels, 4, 6) * 255
    guesses = head.guesses(Lattice(2, (1, 1)), grid, (4, 6), picture)
    is_seeing, count = kind in NUM_GUESSES, NUM_GUESSES.get(kind, 0)
    assert guesses.shape == (count, 2, config.value_channels, 6)
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
    is_seeing = kind in NUM_GUESSES
    assert looks == ([1, 2, 3] if is_seeing else [])
    names = level.decoder.state_dict()
    channels = level.config.value_channels
    assert ("stages.1.look.weight" in names) == is_seeing
    assert names["stages.0.take_in.weight"].shape[1] == channels * (16 + 3 * is_seeing)


def test_guesses_are_the_neighbors_and_their_mean():
    head, grid = LogisticMixtureHead(8, 256), torch.arange(16).view(1, 1, 4, 4) * 10
    guesses = head.guesses(Lattice(2, (1, 1)), grid, (4, 4))[:, 0, 0, 0]
    assert guesses.tolist() == [0, 20, 80, 100] + 4 * [50]
    without = head.guesses(Lattice(2), grid, (4, 4))
    assert without[:, 0, 0, 0].tolist() == list(range(16, 256, 32))


def test_guided_guesses_are_the_picture_and_what_neighbors_correct_of_it():
    head, grid = GuidedLogisticMixtureHead(8, 256), torch.arange(16).view(1, 1, 4, 4) * 10
    picture = grid + torch.tensor([5.0, -5.0]).repeat(2).view(1, 1, 1, 4)  # in turn, by columns
    guesses = head.guesses(Lattice(2, (1, 1)), grid, (4, 4), picture)[:, 0, 0, 0]
    assert guesses.tolist() == [0, 20, 80, 100] + 4 * [50] + [45, 40]
    first = head.guesses(Lattice(2), grid, (4, 4), picture)
    assert (first - picture[0, :, ::2, ::2].flatten(1)).abs().max() <= 36
    said = head(torch.zeros(1, 4, 8), first[:, :, 0])  # no two components are the same ones
    components = torch.stack([said.means, said.precisions], -1)[:, 0, 0]
    assert len(components.unique(dim=0)) == len(first)


def test_a_guided_level_wants_an_auxiliary_decoder():
    with pytest.raises(ValueError, match="expected auxiliary_hidden_size .*got None"):
        ProgressiveVAELevelConfig(num_channels=3, pixel_distribution="guided_logistic_mixture")


def test_a_head_of_many_symbols_is_uniform_at_first_and_learns():
    level = ProgressiveVAELevel(
        ProgressiveVAELevelConfig(num_symbols=2049, hidden_size=8, ordering="factorized")
    )
    head, features = level.decoder.stages[0].logits[0], torch.randn(2, 3, 8)
    nats = head(features).log_prob(torch.randint(2049, (2, 3)))
    assert torch.allclose(nats, -torch.tensor(2049.0).log().expand(2, 3), atol=1e-5)
    nats.sum().backward()
    assert head.project.weight.grad.abs().max() > 0 and head.bias.grad.abs().max() > 0
    assert sorted(head.state_dict()) == ["bias", "project.bias", "project.weight", "values.weight"]
    assert head.values.weight.shape == (2049, 64)
