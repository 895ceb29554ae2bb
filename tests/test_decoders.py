import math

import pytest
import torch
from conftest import all_grids, tiny_level, total_variation

from progressive_vae.decoders import ORDERS


@pytest.mark.parametrize("downsample", [2, 4])
@pytest.mark.parametrize("order", ORDERS)
def test_an_order_visits_every_position_once(order, downsample):
    visits = torch.zeros(8, 8, dtype=torch.long)
    strides = [downsample]
    for group in ORDERS[order](downsample):
        group.of(visits).add_(1)
        strides.append(group.stride)
    assert (visits == 1).all()
    assert strides == sorted(strides, reverse=True)


@pytest.mark.parametrize("size", [(2, 2), (1, 3)])
@pytest.mark.parametrize("downsample", [2, 4])
@pytest.mark.parametrize("order", ORDERS)
def test_symbols_sum_to_one_and_samples_follow(order, downsample, size):
    level = tiny_level(num_symbols=3, downsample=downsample, decoder_order=order)
    grids = all_grids(3, *size)
    codes = torch.ones(1, *level.codes_size(size), dtype=torch.long)
    with torch.no_grad():
        log_prob = level.log_prob(grids, codes.expand(len(grids), -1, -1))
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-4)
    assert log_prob.std() > 0.1  # not the uniform distribution
    generator = torch.Generator().manual_seed(0)
    drawn = level.sample(codes.expand(40_000, -1, -1), generator, finer_size=size)
    assert total_variation(log_prob, grids, drawn) < 0.03


@pytest.mark.parametrize("order", ORDERS)
def test_a_pixel_sums_to_one_over_256_values(order):
    level = tiny_level(num_channels=1, downsample=4, decoder_order=order)
    pixels = (torch.arange(256) / 127.5 - 1).view(256, 1, 1, 1)
    with torch.no_grad():
        log_prob = level.log_prob(pixels, torch.zeros(256, 1, 1, dtype=torch.long))
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-4)
    drawn = level.sample(torch.zeros(40_000, 1, 1, dtype=torch.long), finer_size=(1, 1))
    values = ((drawn + 1) * 127.5).round().long()
    assert torch.equal(values / 127.5 - 1, drawn)
    frequencies = torch.bincount(values.flatten(), minlength=256) / len(drawn)
    assert (frequencies - log_prob.exp()).abs().sum() / 2 < 0.04


def test_colours_are_conditioned_on_each_other():
    """Σ_{g,b} P(r, g, b) = P(r), which the walk shows first, and colours are not independent."""
    level = tiny_level(num_channels=3, downsample=2)
    code, red = torch.zeros(1, 1, 1, dtype=torch.long), 100
    green, blue = torch.cartesian_prod(torch.arange(256), torch.arange(256)).T
    values = torch.stack([torch.full_like(green, red), green, blue], 1).view(-1, 3, 1, 1)
    with torch.no_grad():
        log_prob = torch.cat(
            [level.log_prob(v / 127.5 - 1, code.expand(len(v), 1, 1)) for v in values.split(8192)]
        ).view(256, 256)
        first = []

        def choose(group, colour, logits):
            first.append(logits)
            return logits.argmax(-1)

        level.decoder.walk(level.quantizer.lookup(code), (1, 1), choose)
    expected = first[0].log_softmax(-1)[0, 0, 0, red]
    assert log_prob.logsumexp((0, 1)).item() == pytest.approx(expected.item(), abs=1e-3)
    given_green = log_prob.log_softmax(1)
    assert (given_green[0] - given_green[200]).abs().max() > 0.1


@pytest.mark.parametrize("order", ORDERS)
def test_sampling_and_likelihood_see_the_same_logits(order):
    """Stepwise and teacher-forced log-probabilities agree, on a size that does not divide."""
    level = tiny_level(num_channels=3, downsample=4, decoder_order=order)
    codes = torch.randint(3, (2, 2, 2))
    total = torch.zeros(2)
    quantized, size = level.quantizer.lookup(codes), (5, 7)
    inside = level.decoder.inside(quantized, size)

    def choose(group, colour, logits):
        values = torch.distributions.Categorical(logits=logits).sample()
        nats = logits.log_softmax(-1).gather(-1, values[..., None])[..., 0]
        total.add_((nats * group.of(inside)).sum((1, 2)))
        return values

    with torch.no_grad():
        values = level.decoder.walk(quantized, size, choose)
        log_prob = level.log_prob(values / 127.5 - 1, codes)
    assert values.shape == (2, 3, 5, 7)
    assert torch.allclose(total, log_prob, rtol=1e-4)


def test_a_factorized_decoder_knows_only_the_codes():
    level = tiny_level(num_symbols=3, decoder_order="factorized")
    codes = torch.zeros(9, 1, 1, dtype=torch.long)
    grids = all_grids(3, 1, 2)
    with torch.no_grad():
        joint = level.log_prob(grids, codes).view(3, 3).exp()
    assert torch.allclose(joint, joint.sum(1, keepdim=True) * joint.sum(0), atol=1e-5)


def test_a_fresh_decoder_is_uniform():
    from progressive_vae import ProgressiveVAELevel, ProgressiveVAELevelConfig

    level = ProgressiveVAELevel(ProgressiveVAELevelConfig(num_symbols=3, hidden_size=8))
    with torch.no_grad():
        log_prob = level.log_prob(all_grids(3, 2, 2), torch.zeros(81, 1, 1, dtype=torch.long))
    assert torch.allclose(log_prob, torch.full((81,), -4 * math.log(3)))
