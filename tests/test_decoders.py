import math

import pytest
import torch

from helpers.models import (
    CODE_ORDERS,
    GUIDED,
    LOGISTICS,
    ORDER_NAMES,
    PIXEL_ORDERS,
    level_of,
    tiny_level,
)
from helpers.probabilities import all_grids, total_variation
from progressive_vae import ProgressiveVAELevel, ProgressiveVAELevelConfig

TRANSFORMER_ORDERS = [
    ("factorized", 2, None), ("lattice", 2, 7), ("masked", 2, 3), ("raster", 2, None),
]  # fmt: skip


def initial_bits_per_dim(pixels, **config):
    """Bits per dimension of pixels (3, 32, 32) under an untrained logistic mixture."""
    config = ProgressiveVAELevelConfig(
        num_channels=3, downsample=4, hidden_size=8, **LOGISTICS, **config
    )
    level = ProgressiveVAELevel(config).eval()
    codes = torch.zeros(1, 8, 8, dtype=torch.long)
    with torch.no_grad():
        log_prob = level.log_prob(pixels[None] / 127.5 - 1, codes).item()
    return -log_prob / (math.log(2) * pixels.numel())


def test_an_untrained_logistic_mixture_predicts_smooth_images():
    """Means start at the decoded neighbors and move with the residuals of the previous channel.

    With a coarser first lattice fewer pixels have no neighbors.
    """
    noise = torch.randint(256, (3, 32, 32), generator=torch.Generator().manual_seed(0))
    ramp = (50 + 2 * torch.arange(32) + torch.tensor([0, 40, 80]).view(3, 1, 1)).expand(3, 32, 32)
    assert initial_bits_per_dim(ramp) < 5 < 8 < initial_bits_per_dim(noise)
    constant = torch.full((3, 32, 32), 200)
    bits = [initial_bits_per_dim(constant, num_groups=n) for n in (7, 10, 13, 16)]
    assert bits == sorted(bits, reverse=True)


@pytest.mark.parametrize("size", [(2, 2), (1, 3)])
@pytest.mark.parametrize(
    (*ORDER_NAMES.split(", "), "kind"),
    [(*order, {}) for order in CODE_ORDERS]
    + [(*order, {"decoder_type": "transformer"}) for order in TRANSFORMER_ORDERS],
)
def test_probabilities_of_all_code_grids_sum_to_one_and_samples_follow(
    order, downsample, num_groups, kind, size
):
    level = level_of(order, downsample, num_groups, num_symbols=3, **kind)
    grids = all_grids(3, *size)
    codes = torch.ones(1, *level.codes_size(size), dtype=torch.long)
    with torch.no_grad():
        log_prob = level.log_prob(grids, codes.expand(len(grids), -1, -1))
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-4)
    assert log_prob.std() > 0.1  # not the uniform distribution
    generator = torch.Generator().manual_seed(0)
    samples = level.sample(codes.expand(10_000, -1, -1), generator=generator, finer_size=size)
    assert total_variation(log_prob, grids, samples) < 0.06


@pytest.mark.parametrize(
    "head", [dict(pixel_logit_rank=0), dict(pixel_logit_rank=64), LOGISTICS, GUIDED]
)
@pytest.mark.parametrize(ORDER_NAMES, PIXEL_ORDERS)
def test_probabilities_of_all_pixel_values_sum_to_one(order, downsample, num_groups, head):
    if head in (LOGISTICS, GUIDED) and order != "lattice":
        with pytest.raises(ValueError, match="expected ordering='lattice'"):
            level_of(order, downsample, num_groups, num_channels=1, **head)
        return
    level = level_of(order, downsample, num_groups, num_channels=1, **head)
    pixels = (torch.arange(256) / 127.5 - 1).view(256, 1, 1, 1)
    with torch.no_grad():
        log_prob = level.log_prob(pixels, torch.zeros(256, 1, 1, dtype=torch.long))
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-4)
    samples = level.sample(torch.zeros(10_000, 1, 1, dtype=torch.long), finer_size=(1, 1))
    values = ((samples + 1) * 127.5).round().long()
    assert torch.equal(values / 127.5 - 1, samples)
    frequencies = torch.bincount(values.flatten(), minlength=256) / len(samples)
    assert (frequencies - log_prob.exp()).abs().sum() / 2 < 0.08


@pytest.mark.parametrize("distribution", ["categorical", "logistic_mixture"])
def test_channels_are_conditioned_on_each_other(distribution):
    """Σ_{g,b} P(r, g, b) = P(r), the walk's first distribution, and P(b | r, g) depends on g."""
    level = tiny_level(num_channels=3, downsample=2, pixel_distribution=distribution)
    code = torch.zeros(1, 1, 1, dtype=torch.long)
    red = 100
    green, blue = torch.cartesian_prod(torch.arange(256), torch.arange(256)).T
    values = torch.stack([torch.full_like(green, red), green, blue], 1).view(-1, 3, 1, 1)
    with torch.no_grad():
        log_prob = torch.cat(
            [level.log_prob(v / 127.5 - 1, code.expand(len(v), 1, 1)) for v in values.split(8192)]
        ).view(256, 256)
        logits = []

        def step_fn(distribution, step):
            logits.append(distribution.logits)
            return logits[-1].argmax(-1)

        level.walk(code, step_fn, finer_size=(1, 1))
    expected = logits[0].log_softmax(-1)[0, 0, red]
    assert log_prob.logsumexp((0, 1)).item() == pytest.approx(expected.item(), abs=1e-3)
    blue_log_prob = log_prob.log_softmax(1)  # log P(b | r, g)
    assert (blue_log_prob[0] - blue_log_prob[200]).abs().max() > 0.1


def test_a_raster_decoder_refuses_large_grids():
    level = tiny_level(num_symbols=3, decoder_type="causal_lm")
    codes = torch.zeros(1, 9, 9, dtype=torch.long)
    with pytest.raises(ValueError, match="at most 256 positions .*got 18×18"):
        level.sample(codes)


def test_a_transformer_refuses_large_grids():
    level = tiny_level(num_symbols=3, decoder_type="transformer", downsample=8)
    with pytest.raises(ValueError, match="at most 64 rows and columns .*got 8×72"):
        level.sample(torch.zeros(1, 1, 9, dtype=torch.long))


@pytest.mark.parametrize("decoder_type", ["conv", "transformer"])
def test_a_factorized_decoder_is_conditioned_on_codes_only(decoder_type):
    level = tiny_level(num_symbols=3, ordering="factorized", decoder_type=decoder_type)
    codes = torch.zeros(9, 1, 1, dtype=torch.long)
    grids = all_grids(3, 1, 2)
    with torch.no_grad():
        joint = level.log_prob(grids, codes).view(3, 3).exp()
    assert torch.allclose(joint, joint.sum(1, keepdim=True) * joint.sum(0), atol=1e-5)


@pytest.mark.parametrize("decoder_type", ["conv", "causal_lm", "transformer"])
def test_an_untrained_decoder_is_uniform(decoder_type):
    config = ProgressiveVAELevelConfig(num_symbols=3, hidden_size=8, decoder_type=decoder_type)
    level = ProgressiveVAELevel(config)
    with torch.no_grad():
        log_prob = level.log_prob(all_grids(3, 2, 2), torch.zeros(81, 1, 1, dtype=torch.long))
    assert torch.allclose(log_prob, torch.full((81,), -4 * math.log(3)))


@pytest.mark.parametrize("decoder_type", ["causal_lm", "transformer"])
def test_dropout_is_of_training_only(decoder_type):
    level = tiny_level(num_symbols=3, decoder_type=decoder_type, hidden_size=16, dropout=0.5)
    codes = torch.zeros(81, 1, 1, dtype=torch.long)

    def log_prob():
        with torch.no_grad():
            return level.log_prob(all_grids(3, 2, 2), codes)

    assert torch.equal(log_prob(), log_prob())
    level.train()
    assert not torch.equal(log_prob(), log_prob())


@pytest.mark.parametrize("decoder_type", ["causal_lm", "transformer"])
def test_a_refit_with_dropout_starts_as_the_same_function(decoder_type):
    level = tiny_level(num_symbols=3, decoder_type=decoder_type, hidden_size=16)
    refitted = level.with_decoder(dropout=0.5)
    codes = torch.zeros(81, 1, 1, dtype=torch.long)
    with torch.no_grad():
        expected, actual = (x.eval().log_prob(all_grids(3, 2, 2), codes) for x in (level, refitted))
    assert torch.allclose(expected, actual) and refitted.config.dropout == 0.5


def test_convolutional_decoders_have_no_dropout():
    with pytest.raises(ValueError, match="expected dropout=0"):
        tiny_level(num_symbols=5, dropout=0.5)


@pytest.mark.parametrize("rank", [0, 64])
def test_an_untrained_pixel_decoder_is_uniform(rank):
    config = ProgressiveVAELevelConfig(num_channels=1, hidden_size=8, pixel_logit_rank=rank)
    pixels = torch.rand(2, 1, 3, 3) * 2 - 1
    codes = torch.zeros(2, 2, 2, dtype=torch.long)
    with torch.no_grad():
        log_prob = ProgressiveVAELevel(config).log_prob(pixels, codes)
    assert torch.allclose(log_prob, torch.full((2,), -9 * math.log(256)))
