import pytest
import torch

from helpers.models import tiny_level
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
    Neighborhood,
    OrdinalPixelHead,
    make_head,
)
from progressive_vae.models.orderings import Lattice

HEADS = [  # config, head, distribution
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
NUM_COMPONENTS = {LogisticMixtureHead: 8, GuidedLogisticMixtureHead: 10}
DIAGONAL = Lattice(2, (1, 1))
CPU = torch.device("cpu")


@pytest.mark.parametrize(("config", "head_type", "distribution_type"), HEADS)
def test_make_head(config, head_type, distribution_type):
    config = ProgressiveVAELevelConfig(hidden_size=8, **config)
    head = make_head(config)
    assert type(head) is head_type
    grid = torch.randint(config.num_values, (2, config.value_channels, 4, 6))
    preview = torch.rand(2, config.value_channels, 4, 6) * 255
    means = head.component_means(Neighborhood.gather(DIAGONAL, 6, grid, (4, 6), preview), CPU)
    assert means.shape == (NUM_COMPONENTS.get(head_type, 0), 2, config.value_channels, 6)
    distribution = head(torch.randn(2, 6, 8), means[:, :, 0], None)
    assert type(distribution) is distribution_type
    assert distribution.logits.shape == (2, 6, config.num_values)
    residuals = DIAGONAL.gather_values(grid)[:, 0] - means[:, :, 0]
    residual_dim = 3 if head_type in NUM_COMPONENTS else 0
    assert head.embed_residuals(residuals).shape == (2, 6, residual_dim)


@pytest.mark.parametrize(("config", "head_type", "_"), HEADS)
def test_neighbor_conditioning_has_its_state_dict_keys(config, head_type, _):
    level = tiny_level(**config)
    has_means = head_type in NUM_COMPONENTS
    stages = [i for i in range(4) if level.decoder.stages[i].look is not None]
    assert stages == ([1, 2, 3] if has_means else [])
    state_dict = level.decoder.state_dict()
    assert ("stages.1.look.weight" in state_dict) == has_means
    embed_dim = 16 + (3 if has_means else 0)
    in_channels = level.config.value_channels * embed_dim
    assert state_dict["stages.0.take_in.weight"].shape[1] == in_channels


def test_component_means_are_the_neighbors_and_their_mean():
    head = LogisticMixtureHead(8, 256)
    grid = torch.arange(16).view(1, 1, 4, 4) * 10
    means = head.component_means(Neighborhood.gather(DIAGONAL, 4, grid, (4, 4)), CPU)
    assert means[:, 0, 0, 0].tolist() == [0, 20, 80, 100] + 4 * [50]
    first_means = head.component_means(
        Neighborhood.gather(Lattice(2), 4, grid, (4, 4)), CPU
    )  # without neighbors
    assert first_means[:, 0, 0, 0].tolist() == list(range(16, 256, 32))


def test_guided_component_means_add_the_preview_and_its_correction():
    head = GuidedLogisticMixtureHead(8, 256)
    grid = torch.arange(16).view(1, 1, 4, 4) * 10
    # The preview's error is +5 in even columns and −5 in odd ones.
    preview = grid + torch.tensor([5.0, -5.0]).repeat(2).view(1, 1, 1, 4)
    means = head.component_means(Neighborhood.gather(DIAGONAL, 4, grid, (4, 4), preview), CPU)
    assert means[:, 0, 0, 0].tolist() == [0, 20, 80, 100] + 4 * [50] + [45, 40]
    first = Neighborhood.gather(Lattice(2), 4, grid, (4, 4), preview)
    first_means = head.component_means(first, CPU)
    assert (first_means - Lattice(2).gather_values(preview)).abs().max() <= 36
    # No two components start with equal parameters, or they would stay equal.
    distribution = head(torch.zeros(1, 4, 8), first_means[:, :, 0])
    params = torch.stack([distribution.means, distribution.precisions], -1)[:, 0, 0]
    assert len(params.unique(dim=0)) == len(first_means)


def test_a_guided_level_requires_an_auxiliary_decoder():
    with pytest.raises(ValueError, match="auxiliary_hidden_size .*None"):
        ProgressiveVAELevelConfig(num_channels=3, pixel_distribution="guided_logistic_mixture")


def test_a_low_rank_head_starts_uniform_and_has_gradients():
    level = ProgressiveVAELevel(
        ProgressiveVAELevelConfig(num_symbols=2049, hidden_size=8, ordering="factorized")
    )
    head = level.decoder.stages[0].logits[0]
    log_prob = head(torch.randn(2, 3, 8)).log_prob(torch.randint(2049, (2, 3)))
    assert torch.allclose(log_prob, -torch.tensor(2049.0).log().expand(2, 3), atol=1e-5)
    log_prob.sum().backward()
    assert head.project.weight.grad.abs().max() > 0 and head.bias.grad.abs().max() > 0
    assert sorted(head.state_dict()) == ["bias", "project.bias", "project.weight", "values.weight"]
    assert head.values.weight.shape == (2049, 64)
