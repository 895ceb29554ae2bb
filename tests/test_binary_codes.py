"""Large codebooks: binary quantizers, and codes that are split into blocks of bits."""

import math

import pytest
import torch
import torch.nn.functional as F

from helpers.images import noise_images
from helpers.models import tiny_level, tiny_prior
from progressive_vae import ProgressiveVAELevelConfig, ProgressiveVAEPipeline
from progressive_vae.models.binary_quantizers import (
    ENTROPY_TEMPERATURE,
    BinarySphericalQuantizer,
    LookupFreeQuantizer,
)
from progressive_vae.models.quantizers import VectorQuantizer
from progressive_vae.models.value_types import BlocksOfCodes

KINDS = [
    {"decoder_type": "conv"},
    {"decoder_type": "transformer"},
    {"decoder_type": "transformer", "ordering": "diagonal"},
]


@pytest.mark.parametrize("make", [LookupFreeQuantizer, BinarySphericalQuantizer])
def test_the_nearest_of_all_codes_is_that_of_the_signs(make):
    quantizer = make(num_bits=5)
    latents = torch.randn(4, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    codes = quantizer.encode(latents)
    codebook = quantizer.codebook
    assert codebook.unique(dim=0).shape == (32, 5)
    vectors = quantizer.project(latents).movedim(1, -1)
    assert torch.equal(torch.cdist(vectors.reshape(-1, 5), codebook).argmin(1), codes.flatten())
    assert torch.equal(quantizer.encode(quantizer.lookup(codes)), codes)
    assert torch.equal(quantizer.lookup(codes), F.embedding(codes, codebook).movedim(-1, 1))


def test_latents_and_codes_of_a_spherical_quantizer_are_unit_vectors():
    quantizer = BinarySphericalQuantizer(num_bits=6)
    torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(64))
    quantized, codes, _ = quantizer(10 * torch.randn(2, 6, 3))
    torch.testing.assert_close(quantized.norm(dim=1), torch.ones(2, 3))
    assert torch.allclose(quantizer.normalize(quantizer.lookup(codes)).abs(), torch.tensor(1.0))


def test_entropies_are_those_of_independent_bits():
    quantizer = LookupFreeQuantizer(num_bits=3, commitment_weight=0.0, entropy_weight=1.0)
    latents = 0.003 * torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    codes = torch.arange(8)
    corners = 2.0 * torch.stack([codes >> 2 & 1, codes >> 1 & 1, codes & 1], 1) - 1  # all codes
    distances = torch.cdist(latents.movedim(1, -1).reshape(-1, 3).double(), corners.double())
    joint = (-distances.square() / ENTROPY_TEMPERATURE).softmax(1)  # of the code of each latent
    of_each = torch.special.entr(joint).sum(1).mean()
    mean_bits = joint.mean(0) @ (corners.double() + 1) / 2
    of_mean = torch.special.entr(mean_bits) + torch.special.entr(1 - mean_bits)
    loss = quantizer(latents).loss
    assert loss.item() == pytest.approx((of_each - of_mean.sum()).item(), rel=1e-4)
    # The best case: certain bits, each 1 half of the time.
    best = quantizer(torch.cat([torch.ones(1, 3, 1), -torch.ones(1, 3, 1)])).loss
    assert best.item() == pytest.approx(-3 * math.log(2), rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_gradients_are_finite_where_all_codes_agree_on_a_bit(scale):
    """Probabilities are then 0 and 1 in floating point."""
    latents = (scale * torch.tensor([[1.0, -1.0, 0.5]] * 4)).requires_grad_()
    LookupFreeQuantizer(num_bits=3)(latents).loss.backward()
    assert latents.grad.isfinite().all()


def test_noise_near_a_code_changes_one_bit():
    quantizer = LookupFreeQuantizer(num_bits=18)
    codes = torch.arange(0, 2**18, 1001).view(1, -1)
    noisy = quantizer.add_noise(codes, torch.ones(1), 8, torch.Generator().manual_seed(0))
    changed = (noisy ^ codes).flatten().tolist()
    assert all(value.bit_count() == 1 for value in changed) and len(set(changed)) == 18


def quantizer_and_latents(gradient):
    """A quantizer, latents (9, 4), and a gradient of their codes."""
    generator = torch.Generator().manual_seed(0)
    quantizer = VectorQuantizer(codebook_size=7, dim=4, gradient=gradient).eval()
    quantizer.codebook.copy_(torch.randn(7, 4, generator=generator))
    latents, of_codes = torch.randn(2, 9, 4, generator=generator)
    return quantizer, latents.requires_grad_(), of_codes


def test_a_rotated_gradient_keeps_its_angle_and_the_value_is_the_code():
    quantizer, latents, gradient = quantizer_and_latents("rotation")
    quantized, codes, _ = quantizer(latents)
    vectors = quantizer.codebook[codes]
    torch.testing.assert_close(quantized, vectors)
    quantized.backward(gradient)
    scale = vectors.norm(dim=1) / latents.detach().norm(dim=1)
    torch.testing.assert_close(latents.grad.norm(dim=1), scale * gradient.norm(dim=1))
    angles = F.cosine_similarity(latents.grad, latents.detach())
    torch.testing.assert_close(angles, F.cosine_similarity(gradient, vectors))


def test_a_gradient_of_diveq_has_no_part_along_the_error():
    quantizer, latents, gradient = quantizer_and_latents("diveq")
    quantized, codes, _ = quantizer(latents)
    torch.testing.assert_close(quantized, quantizer.codebook[codes])
    quantized.backward(gradient)
    error = F.normalize(quantized - latents).detach()
    along = (gradient * error).sum(1, keepdim=True)
    torch.testing.assert_close(latents.grad, gradient - along * error)
    # Also where a latent is its code.
    exact = quantizer.codebook.clone().requires_grad_()
    quantizer(exact).quantized.sum().backward()
    assert exact.grad.isfinite().all()


def test_blocks_of_codes():
    blocks = BlocksOfCodes(num_blocks=3, bits=2)
    codes = torch.tensor([[[0b110100, 0b000111]]])
    assert blocks.to_indices(codes).flatten(2).tolist() == [[[3, 0], [1, 1], [0, 3]]]
    everything = torch.arange(64).view(1, 8, 8)
    assert torch.equal(blocks.from_indices(blocks.to_indices(everything)), everything)
    with pytest.raises(ValueError, match="expected finer"):
        blocks.to_indices(everything + 1)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_probabilities_of_all_codes_sum_to_one(kind):
    level = tiny_level(num_symbols=64, bits_per_block=2, **kind)
    pairs = torch.cartesian_prod(torch.arange(64), torch.arange(64)).view(-1, 1, 2)
    with torch.no_grad():
        log_probs = level.log_prob(pairs, torch.zeros(len(pairs), 1, 1, dtype=torch.long))
    assert log_probs.exp().sum().item() == pytest.approx(1, abs=1e-4)
    assert log_probs.std() > 0.1  # blocks depend on one another and on the first code


def test_weights_grow_with_the_number_of_bits():
    counts = [
        sum(p.numel() for p in tiny_level(num_symbols=2**n, bits_per_block=6).parameters())
        for n in (6, 12, 18)
    ]
    assert counts[2] - counts[1] == pytest.approx(counts[1] - counts[0], rel=0.05)


@pytest.mark.parametrize("kind", KINDS[:2], ids=str)
def test_streams_of_codes_that_are_split(kind):
    finest = tiny_level(num_channels=1, quantizer="lfq", codebook_size=16, codebook_dim=None)
    level = tiny_level(num_symbols=16, bits_per_block=2, seed=1, **kind)
    pipe = ProgressiveVAEPipeline.from_levels(tiny_prior(), [level, finest], [5, 7])
    pipe.set_progress_bar_config(disable=True)
    images = noise_images(3, (5, 7))[:, :1]
    streams = pipe.compress(images)
    assert torch.equal(pipe.decompress(streams), images)
    bits = -sum(pipe.log_prob(images).values()) / math.log(2)
    assert (torch.tensor([8 * len(stream) for stream in streams]) <= 1.01 * bits + 8 * 12).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_symbols=32, bits_per_block=2), r"power of 2\*\*2 .*got 32"),
        (dict(num_channels=1, bits_per_block=2), r"power of 2\*\*2 .*got None"),
        (dict(num_symbols=16, bits_per_block=2, decoder_type="causal_lm"), "'causal_lm'"),
        (dict(num_symbols=16, bits_per_block=2, auxiliary_hidden_size=8), "no auxiliary decoder"),
        (dict(num_channels=1, quantizer="lfq", codebook_size=12), "power of two .*got 12"),
        (dict(num_channels=1, quantizer="bsq", codebook_dim=8), "codebook_dim=6, .*got 8"),
        (dict(num_channels=1, quantizer_gradient="x"), "quantizer_gradient in .*got 'x'"),
    ],
)
def test_invalid_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        ProgressiveVAELevelConfig(**fields)
