"""Pixels that copy colors: the palette, the mixture, and a decoder with them."""

import itertools
import math

import pytest
import torch

from helpers.codec import codec_pipeline
from helpers.models import GUIDED, LOGISTICS, tiny_level
from progressive_vae import ProgressiveVAELevelConfig
from progressive_vae.models.distributions import Categorical, CopyMixture
from progressive_vae.models.palette import NO_COLOR, Palette, pack_colors, unpack_colors
from progressive_vae.models.walk import TeacherForcing


def flat_images(count: int, size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Three colors an image, int64 (B, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    colors = torch.randint(256, (count, 3, 3), generator=generator)
    choice = torch.randint(3, (count, 1, size[0] * size[1]), generator=generator)
    return colors.gather(2, choice.expand(-1, 3, -1)).unflatten(2, size)


def random_mixture() -> CopyMixture:
    """Of 5 sources at 2×7 positions, with values 0 … 15: some sources copy the same value."""
    generator = torch.Generator().manual_seed(0)
    log_weights = torch.randn(2, 7, 6, generator=generator) * 2
    log_weights[:, :3, 1] = -math.inf
    copies = torch.randint(4, (2, 7, 5), generator=generator)
    logits = torch.randn(2, 7, 16, generator=generator)
    return CopyMixture(log_weights.log_softmax(-1), copies, Categorical(logits))


def test_packed_colors():
    values = torch.randint(256, (2, 3, 4, 5))
    packed = pack_colors(values)
    assert packed[0, 0, 0] == int("".join(f"{v:02x}" for v in values[0, :, 0, 0].tolist()), 16)
    assert torch.equal(unpack_colors(packed, 3), values)


def test_a_palette_has_the_most_frequent_colors_first():
    packed = torch.tensor([[7, 7, 0, 300, 7, 300, NO_COLOR, NO_COLOR], [5] * 8])
    palette = Palette.of_pixels(packed, num_channels=2, size=3)
    assert pack_colors(palette.colors)[0].tolist() == [7, 300, 0]
    expected = torch.tensor([[3 / 6, 2 / 6, 1 / 6], [1, 0, 0]]).log()
    assert torch.allclose(palette.log_frequencies, expected)
    assert pack_colors(palette.colors)[1, 0] == 5
    small = Palette.of_pixels(packed, num_channels=2, size=2)
    assert torch.equal(small.colors, palette.colors[..., :2])
    assert Palette.of_pixels(packed[:, :1], 2, size=4).colors.shape == (2, 2, 4)


def test_probabilities_of_a_copy_mixture():
    mixture = random_mixture()
    probs = mixture.probs()
    assert torch.allclose(probs.sum(-1), torch.ones(2, 7), atol=1e-6)
    for value in range(16):
        values = torch.full((2, 7), value)
        log_prob = mixture.log_prob(values)
        assert torch.allclose(log_prob.exp(), probs[..., value], atol=1e-6)
        posterior = mixture.posterior(values).exp()
        weights = mixture.log_weights.exp()
        likelihoods = (mixture.copies == value).float()
        base = mixture.base.log_prob(values).exp()[..., None]
        joint = weights * torch.cat([likelihoods, base], -1)
        assert torch.allclose(posterior, joint / joint.sum(-1, keepdim=True), atol=1e-6)
    assert torch.allclose(mixture.logits.softmax(-1), probs, atol=1e-6)


def test_samples_of_a_copy_mixture_have_its_frequencies():
    mixture = random_mixture()
    one = CopyMixture(
        mixture.log_weights[:1, :1].expand(1, 20_000, -1),
        mixture.copies[:1, :1].expand(1, 20_000, -1),
        Categorical(mixture.base.logits[:1, :1].expand(1, 20_000, -1)),
    )
    u = (torch.arange(20_000) + 0.5)[None] / 20_000
    frequencies = torch.bincount(one.icdf(u).flatten(), minlength=16) / 20_000
    assert torch.allclose(frequencies, mixture.probs()[0, 0], atol=2e-4)


def test_the_channels_of_a_color_follow_one_mixture_of_colors():
    """∏_c P(x_c | earlier channels) = Σ_k w_k [x = color k] + w_0 ∏_c P_0(x_c)."""
    generator = torch.Generator().manual_seed(0)
    log_weights = torch.randn(1, 1, 5, generator=generator).log_softmax(-1)
    copies = torch.tensor([[0, 1, 2], [0, 1, 2], [0, 2, 1], [2, 2, 2]]).T  # (C, K)
    bases = [Categorical(torch.randn(1, 1, 3, generator=generator)) for _ in range(3)]
    total = 0.0
    for color in itertools.product(range(3), repeat=3):
        weights, channels = log_weights, 0.0
        for channel, value in enumerate(color):
            mixture = CopyMixture(weights, copies[channel].view(1, 1, 4), bases[channel])
            values = torch.tensor([[value]])
            channels += mixture.log_prob(values).item()
            weights = mixture.posterior(values)
        is_copy = (copies.T == torch.tensor(color)).all(1).float()
        base = sum(x.log_prob(torch.tensor([[v]])) for x, v in zip(bases, color, strict=True))
        weights = log_weights.exp()[0, 0]
        direct = weights[:-1] @ is_copy + weights[-1] * base.exp()[0, 0]
        assert math.exp(channels) == pytest.approx(direct.item(), rel=1e-5)
        total += math.exp(channels)
    assert total == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", [{}, LOGISTICS, GUIDED])
def test_a_decoder_copies_the_colors_of_earlier_groups(kind):
    """A pointer that never takes the base gives images of the colors of the first group."""
    level = tiny_level(num_channels=3, palette_size=4, num_groups=7, downsample=4, **kind)
    with torch.no_grad():
        for stage in level.decoder.stages[1:]:
            stage.pointer.scores.weight.zero_()
            stage.pointer.scores.bias.copy_(torch.tensor([0, 0, 0, 0, -1e4, 0, 0]))
    codes = torch.zeros(2, 2, 3, dtype=torch.long)
    samples = level.value_type.to_indices(level.sample(codes, generator=torch.Generator()))
    first = pack_colors(samples[..., ::4, ::4]).flatten(1)
    for image, colors in zip(pack_colors(samples), first, strict=True):
        assert torch.isin(image, colors).all()


def test_a_copied_color_is_cheap_and_any_color_possible():
    fields = {"num_channels": 3, "downsample": 4, "codebook_size": 3, **LOGISTICS}
    images = flat_images(4, (12, 16))
    nats = []
    for palette_size in (0, 4):
        level = tiny_level(**fields, palette_size=palette_size)
        for parameter in level.decoder.stages.parameters():
            torch.nn.init.zeros_(parameter)  # nothing is learned yet
        finer = level.value_type.from_indices(images)
        with torch.no_grad():
            nats.append(level.log_prob(finer, level.encode(finer)))
    assert (nats[1] > 0.6 * nats[0]).all() and (nats[1] < 0).all()


def test_flat_images_through_the_codec():
    size = (5, 7)
    pipe = codec_pipeline(size, palette_size=3, pixel_distribution="logistic_mixture")
    images = flat_images(3, size).to(torch.uint8)
    for arithmetic in ("float", "integer"):
        streams = pipe.compress(images, arithmetic=arithmetic)
        assert torch.equal(pipe.decompress(streams), images)


@pytest.mark.slow
def test_training_and_a_step_of_sampling_compile_without_graph_breaks():
    level = tiny_level(num_channels=3, palette_size=3, **LOGISTICS)
    finer = level.value_type.from_indices(flat_images(2, (4, 4)))
    expected = level(finer).loss
    compiled = torch.compile(level, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(finer).loss, expected, atol=1e-5)
    codes = level.encode(finer)

    def log_prob(codes):
        teacher = TeacherForcing(level.value_type.to_indices(finer))
        level.walk(codes, teacher)
        return teacher.log_prob()

    compiled_walk = torch.compile(log_prob, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled_walk(codes), log_prob(codes), rtol=1e-5)


def test_configs_that_cannot_copy_are_refused():
    for fields in ({"ordering": "masked"}, {"num_channels": 4}, {"palette_size": -1}):
        with pytest.raises(ValueError, match="palette_size|num_channels"):
            ProgressiveVAELevelConfig(**{"num_channels": 3, "palette_size": 4, **fields})
