import math

import pytest
import torch
from conftest import (
    ORDER_NAMES,
    PIXEL_ORDERS,
    all_grids,
    level_of,
    tiny_level,
    total_variation,
)

from progressive_vae import ProgressiveVAELevel, ProgressiveVAELevelConfig

SYMBOL_ORDERS = [*PIXEL_ORDERS, ("raster", 2, None), ("raster", 4, None)]


def bits_before_training(values, **config):
    """Of pixels (3, 32, 32) by a level with logistics, each."""
    config = ProgressiveVAELevelConfig(
        num_channels=3, downsample=4, hidden_size=8, pixel_distribution="logistic_mixture", **config
    )
    level, codes = ProgressiveVAELevel(config).eval(), torch.zeros(1, 8, 8, dtype=torch.long)
    with torch.no_grad():
        nats = -level.log_prob(values[None] / 127.5 - 1, codes).item()
    return nats / (math.log(2) * values.numel())


def test_smooth_colors_cost_little_before_anything_is_learned():
    """Logistics begin at the neighbors of a pixel, and at the color before; where the first
    lattice is coarser, fewer pixels have no neighbor yet."""
    noise = torch.randint(256, (3, 32, 32), generator=torch.Generator().manual_seed(0))
    slope = (50 + 2 * torch.arange(32) + torch.tensor([0, 40, 80]).view(3, 1, 1)).expand(3, 32, 32)
    assert bits_before_training(slope) < 5 < 8 < bits_before_training(noise)
    plain = torch.full((3, 32, 32), 200)
    bits = [bits_before_training(plain, num_groups=n) for n in (7, 10, 13, 16)]
    assert bits == sorted(bits, reverse=True)


@pytest.mark.parametrize("size", [(2, 2), (1, 3)])
@pytest.mark.parametrize(ORDER_NAMES, SYMBOL_ORDERS)
def test_symbols_sum_to_one_and_samples_follow(order, downsample, num_groups, size):
    level = level_of(order, downsample, num_groups, num_symbols=3)
    grids = all_grids(3, *size)
    codes = torch.ones(1, *level.codes_size(size), dtype=torch.long)
    with torch.no_grad():
        log_prob = level.log_prob(grids, codes.expand(len(grids), -1, -1))
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-4)
    assert log_prob.std() > 0.1  # not the uniform distribution
    generator = torch.Generator().manual_seed(0)
    drawn = level.sample(codes.expand(40_000, -1, -1), generator=generator, finer_size=size)
    assert total_variation(log_prob, grids, drawn) < 0.03


LOGISTICS = dict(pixel_distribution="logistic_mixture")
GUIDED = dict(pixel_distribution="guided_logistic_mixture", auxiliary_hidden_size=8)


@pytest.mark.parametrize(
    "pixels", [dict(pixel_logit_rank=0), dict(pixel_logit_rank=64), LOGISTICS, GUIDED]
)
@pytest.mark.parametrize(ORDER_NAMES, PIXEL_ORDERS)
def test_a_pixel_sums_to_one_over_256_values(order, downsample, num_groups, pixels):
    if pixels in (LOGISTICS, GUIDED) and order != "lattice":
        with pytest.raises(ValueError, match="expected ordering='lattice'"):
            level_of(order, downsample, num_groups, num_channels=1, **pixels)
        return
    level = level_of(order, downsample, num_groups, num_channels=1, **pixels)
    pixels = (torch.arange(256) / 127.5 - 1).view(256, 1, 1, 1)
    with torch.no_grad():
        log_prob = level.log_prob(pixels, torch.zeros(256, 1, 1, dtype=torch.long))
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-4)
    drawn = level.sample(torch.zeros(40_000, 1, 1, dtype=torch.long), finer_size=(1, 1))
    values = ((drawn + 1) * 127.5).round().long()
    assert torch.equal(values / 127.5 - 1, drawn)
    frequency_table = torch.bincount(values.flatten(), minlength=256) / len(drawn)
    assert (frequency_table - log_prob.exp()).abs().sum() / 2 < 0.04


@pytest.mark.parametrize("distribution", ["categorical", "logistic_mixture"])
def test_colors_are_conditioned_on_each_other(distribution):
    """Σ_{g,b} P(r, g, b) = P(r), which the walk shows first, and colors are not independent."""
    level = tiny_level(num_channels=3, downsample=2, pixel_distribution=distribution)
    code, red = torch.zeros(1, 1, 1, dtype=torch.long), 100
    green, blue = torch.cartesian_prod(torch.arange(256), torch.arange(256)).T
    values = torch.stack([torch.full_like(green, red), green, blue], 1).view(-1, 3, 1, 1)
    with torch.no_grad():
        log_prob = torch.cat(
            [level.log_prob(v / 127.5 - 1, code.expand(len(v), 1, 1)) for v in values.split(8192)]
        ).view(256, 256)
        first = []

        def choose(distribution, place):
            first.append(distribution.logits)
            return first[-1].argmax(-1)

        level.walk(code, choose, finer_size=(1, 1))
    expected = first[0].log_softmax(-1)[0, 0, red]
    assert log_prob.logsumexp((0, 1)).item() == pytest.approx(expected.item(), abs=1e-3)
    given_green = log_prob.log_softmax(1)
    assert (given_green[0] - given_green[200]).abs().max() > 0.1


def test_a_raster_decoder_refuses_large_grids():
    level = tiny_level(num_symbols=3, decoder_type="causal_lm")
    codes = torch.zeros(1, 9, 9, dtype=torch.long)
    with pytest.raises(ValueError, match="at most 256 positions .*got 18×18"):
        level.sample(codes)


def test_a_factorized_decoder_knows_only_the_codes():
    level = tiny_level(num_symbols=3, ordering="factorized")
    codes = torch.zeros(9, 1, 1, dtype=torch.long)
    grids = all_grids(3, 1, 2)
    with torch.no_grad():
        joint = level.log_prob(grids, codes).view(3, 3).exp()
    assert torch.allclose(joint, joint.sum(1, keepdim=True) * joint.sum(0), atol=1e-5)


def test_a_fresh_decoder_is_uniform():
    level = ProgressiveVAELevel(ProgressiveVAELevelConfig(num_symbols=3, hidden_size=8))
    with torch.no_grad():
        log_prob = level.log_prob(all_grids(3, 2, 2), torch.zeros(81, 1, 1, dtype=torch.long))
    assert torch.allclose(log_prob, torch.full((81,), -4 * math.log(3)))


@pytest.mark.parametrize("rank", [0, 64])
def test_a_fresh_decoder_of_pixels_is_uniform(rank):
    config = ProgressiveVAELevelConfig(num_channels=1, hidden_size=8, pixel_logit_rank=rank)
    pixels, codes = torch.rand(2, 1, 3, 3) * 2 - 1, torch.zeros(2, 2, 2, dtype=torch.long)
    with torch.no_grad():
        log_prob = ProgressiveVAELevel(config).log_prob(pixels, codes)
    assert torch.allclose(log_prob, torch.full((2,), -9 * math.log(256)))
