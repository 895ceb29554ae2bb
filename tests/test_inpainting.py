"""Inpainting, variations, interpolation: observed pixels stay, samples follow the posterior."""

import numpy as np
import PIL.Image
import pytest
import torch

from helpers.models import decoder_fields, generators, level_of, tiny_level, tiny_prior
from helpers.probabilities import all_grids, total_variation
from progressive_vae import ProgressiveVAEPipeline
from progressive_vae.inpainting import fill_masked_region, observe

KINDS = [
    ("lattice", dict(ordering="lattice", num_channels=3)),
    ("raster", dict(ordering="masked", num_groups=3, num_channels=1)),
    ("transformer", dict(num_channels=1)),
    ("masked", dict(ordering="factorized", num_channels=3)),
    ("factorized", dict(num_channels=1, pixel_distribution="logistic_mixture")),
    ("auxiliary", dict(decoder_type="auxiliary", auxiliary_hidden_size=8, num_channels=3)),
]


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def two_levels(order, finest, **prior):
    """Images of 7×10: grids of 4×5 and 2×3 codes."""
    coarse = {"auxiliary_hidden_size": 8} if order == "auxiliary" else {}
    levels = [tiny_level(num_symbols=4, **decoder_fields(order), seed=1, **coarse)]
    levels.append(tiny_level(codebook_size=4, seed=2, **finest))
    prior = tiny_prior(grid_size=[2, 3], **prior)
    return quiet(ProgressiveVAEPipeline.from_levels(prior, levels, [7, 10]))


def some_images(pipe, count, seed=0):
    noise = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, *pipe.image_shape), generator=noise, dtype=torch.uint8)


def some_masks(pipe, count, seed=0):
    """Rectangles, bool (count, H, W)."""
    noise, masks = np.random.default_rng(seed), torch.zeros(count, *pipe.image_shape[1:])
    for mask in masks:
        y, x = (sorted(noise.integers(0, n + 1, 2)) for n in mask.shape)
        mask[y[0] : y[1], x[0] : x[1]] = 1
    return masks.bool()


def bytes_of(images):
    return (images * 255).round().to(torch.uint8)


@pytest.mark.parametrize(("order", "finest"), KINDS)
def test_observed_pixels_are_unchanged(order, finest):
    pipe = two_levels(order, finest)
    images, masks = some_images(pipe, 100), some_masks(pipe, 100)
    output = pipe.inpaint(images, masks, num_particles=2, output_type="pt")
    samples = bytes_of(output.images)
    is_known = ~masks[:, None].expand_as(images)
    assert torch.equal(samples[is_known], images[is_known])
    assert (samples[~is_known] != images[~is_known]).float().mean() > 0.5
    # Codes of fully observed patches are fixed: those of the image with a smooth filling.
    pixels = images / 127.5 - 1
    smooth = (fill_masked_region(pixels, masks[:, None]) + 1) * 127.5
    unknown = masks[:, None].float()
    codes = pipe.encode(smooth.round().to(torch.uint8))
    for z, codes_after in reversed(list(zip(codes, output.codes, strict=True))):
        padded = torch.nn.functional.pad(
            unknown, (0, unknown.shape[-1] % 2, 0, unknown.shape[-2] % 2)
        )
        unknown = torch.nn.functional.max_pool2d(padded, 2)
        assert torch.equal(codes_after[unknown[:, 0] == 0], z[unknown[:, 0] == 0])
        assert not torch.equal(codes_after, z)


def test_empty_and_full_masks(pipe, images):
    none, every = np.zeros((5, 7), bool), PIL.Image.new("L", (7, 5), 255)
    same = pipe.inpaint(images, none, output_type="pt")
    assert torch.equal(bytes_of(same.images), images)
    for actual, expected_codes in zip(same.codes, pipe.encode(images), strict=True):
        assert torch.equal(actual, expected_codes)
    for noise in (generators(4), generators(1)[0]), (generators(4, 9), generators(1, 9)[0]):
        for generator in noise:
            again = [g.clone_state() for g in noise[0]] if isinstance(generator, list) else (
                generator.clone_state())  # fmt: skip
            controls = dict(guidance_scale=2.0, temperature=0.9, output_type="pt")
            samples = pipe([0, 1, 0, 1], generator=generator, **controls)
            filled_in = pipe.inpaint(images, every, [0, 1, 0, 1], generator=again, **controls)
            assert torch.equal(samples.images, filled_in.images)


def test_an_image_does_not_depend_on_its_batch(pipe, images):
    masks = torch.zeros(4, 1, 5, 7)
    masks[0], masks[1, :, 2:, 3:], masks[2, :, 4:, 6:] = 1, 1, 1
    together = pipe.inpaint(images, masks, generator=generators(4), output_type="pt")
    parts = pipe.inpaint(images, masks, generator=generators(4), output_type="pt", batch_size=1)
    assert torch.equal(together.images, parts.images)
    alone = pipe.inpaint(images[1:2], masks[1], generator=generators(1, 1), output_type="pt")
    assert torch.equal(together.images[1:2], alone.images)
    twice = pipe.inpaint(images[:2], masks[1], num_images_per_prompt=2, output_type="latent")
    assert torch.equal(twice.images, twice.codes[-1]) and len(twice.images) == 4
    pil_images, codes = pipe.inpaint(images[:1], masks[1], return_dict=False)
    assert pil_images[0].size == (7, 5) and len(codes) == 3


def posterior_of(pipe, image, mask, observations):
    """log P(z | observations) over all z_1, z_2, and those; pixels are independent given z_2."""
    z_1, z_2 = all_grids(2, 1, 2), all_grids(2, 2, 3)
    pairs = torch.cartesian_prod(torch.arange(len(z_1)), torch.arange(len(z_2)))
    z_1, z_2 = z_1[pairs[:, 0]], z_2[pairs[:, 1]]
    nats = pipe.prior.log_prob(z_1) + pipe.level_1.log_prob(z_2, z_1)

    def step_fn(distribution, step):
        values = image.flatten()[step.positions].expand(len(z_2), -1)
        nats_of_values = distribution.log_prob(values)
        nats.add_(nats_of_values.masked_fill(mask.flatten()[step.positions], 0).sum(1))
        return values

    with torch.no_grad():
        pipe.level_2.walk(z_2, step_fn, finer_size=tuple(image.shape))
    for z, (values, trust) in zip((z_1, z_2), observations, strict=True):
        is_known = trust.flatten() == 1
        differs = (z.flatten(1) != values.flatten()) & is_known
        nats = nats.masked_fill(differs.any(1), -torch.inf)
    return nats.log_softmax(0), torch.cat([z_1.flatten(1), z_2.flatten(1)], 1)


def test_many_particles_sample_from_the_posterior():
    """Two levels whose codes are enumerable; the mask leaves codes observed, guessed and free."""
    levels = [tiny_level(num_symbols=2, codebook_size=2, seed=5),
              level_of("factorized", 2, None, num_channels=1, codebook_size=2, seed=6)]  # fmt: skip
    prior = tiny_prior(grid_size=[1, 2], codebook_size=2)
    pipe = quiet(ProgressiveVAEPipeline.from_levels(prior, levels, [4, 6]))
    image, mask = some_images(pipe, 1, 3), torch.zeros(4, 6, dtype=torch.bool)
    mask[2:, 1:4] = True
    observations = [(x.values[0], x.confidence[0]) for x in observe(pipe.stack, image, mask, 1)]
    shares = observations[0][1].unique().tolist()
    assert any(0 < share < 1 for share in shares) and 1 in observations[1][1]
    with torch.no_grad():
        log_prob, grids = posterior_of(pipe, image[0, 0].long(), mask, observations[:2])
    distances = {}
    for number in (1, 24):
        codes = pipe.inpaint(
            image, mask, num_images_per_prompt=1000, num_particles=number,
            generator=torch.Generator().manual_seed(0), output_type="pt", batch_size=2**13,
        ).codes  # fmt: skip
        samples = torch.cat([z.flatten(1) for z in codes], 1)
        distances[number] = total_variation(log_prob, grids[:, None], samples[:, None])
    assert distances[1] > 0.3 and distances[24] < 0.05


def test_without_a_prior(pipe, images):
    levels = [pipe.level_2, pipe.level_3]
    view = quiet(ProgressiveVAEPipeline.from_levels(None, levels, [5, 7]))
    mask = torch.zeros(5, 7)
    mask[4:, 6:] = 1
    with pytest.raises(ValueError, match="a pipeline with a prior"):
        view.inpaint(images, mask)
    wide = quiet(ProgressiveVAEPipeline(None, tiny_level(num_channels=3), image_size=[5, 7]))
    with pytest.raises(ValueError, match="a pipeline with a prior"):
        wide.inpaint(images, torch.ones(5, 7))
    assert torch.equal(bytes_of(view.inpaint(images, mask * 0, output_type="pt").images), images)
    assert len(view.variations(images).images) == len(images)
    assert len(view.interpolate(images[:2], images[2:]).images) == 10


def test_masks_of_all_types_are_equivalent(pipe, images):
    mask = some_masks(pipe, 4, seed=5)
    rgb = [PIL.Image.fromarray(m.numpy()).convert("RGB") for m in mask]
    expected = pipe.inpaint(images, mask, generator=generators(4), output_type="pt").images
    for form in (mask[:, None], mask.float(), mask.to(torch.uint8) * 255, mask.numpy(), rgb,
                 mask[..., None].numpy(), mask.numpy() * 0.75, list(mask),
                 list(mask.numpy())):  # fmt: skip
        samples = pipe.inpaint(images, form, generator=generators(4), output_type="pt").images
        assert torch.equal(samples, expected)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_variations_share_coarser_codes(pipe, images, level):
    output = pipe.variations(images, level, num_images_per_prompt=3, output_type="pt")
    codes = pipe.encode(images)
    for i, (actual, expected_codes) in enumerate(zip(output.codes, codes, strict=True), 1):
        assert torch.equal(actual, expected_codes.repeat_interleave(3, 0)) == (i <= level)
    assert len(output.images) == 12 and not torch.equal(output.images[0], output.images[1])


@pytest.mark.parametrize("level", [1, 2, None])
def test_interpolation_starts_and_ends_with_the_images(pipe, images, level):
    output = pipe.interpolate(images[:2], images[2:], level, steps=4, output_type="pt",
                              generator=generators(2))  # fmt: skip
    level = level or 3
    codes, codes_after = pipe.encode(images), [z.unflatten(0, (2, 4)) for z in output.codes]
    for actual, expected_codes in zip(codes_after[:level], codes, strict=False):
        assert torch.equal(actual[:, 0], expected_codes[:2]) and torch.equal(
            actual[:, -1], expected_codes[2:]
        )
    codebook = getattr(pipe, f"level_{level}").quantizer.codebook
    a, b = codebook[codes[level - 1][:2]], codebook[codes[level - 1][2:]]
    middle = codebook[codes_after[level - 1][:, 1]]
    mixed = 2 / 3 * a + 1 / 3 * b
    distance = (mixed[..., None, :] - codebook).square().sum(-1).min(-1).values
    torch.testing.assert_close((middle - mixed).square().sum(-1), distance, atol=1e-5, rtol=1e-4)
    # All steps share their noise: between an image and itself nothing changes.
    still = pipe.interpolate(images[:1], images[:1], level, output_type="pt").images
    assert torch.equal(still, still[:1].expand_as(still))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, x: p.inpaint(x, torch.ones(7, 5)), "mask_image: expected images of"),
        (lambda p, x: p.inpaint(x, PIL.Image.new("L", (5, 7))), "mask_image: .* width 5"),
        (lambda p, x: p.inpaint(x, torch.ones(5, 7).long()), "mask_image: .* dtype uint8 or float"),
        (lambda p, x: p.inpaint(x, torch.ones(5, 7) * 2), r"mask_image: .* in \[0, 1\]"),
        (lambda p, x: p.inpaint(x, torch.ones(5, 7).byte()), "of uint8 in 0 … 255, got one in 0"),
        (lambda p, x: p.inpaint(x, torch.ones(2, 5, 7)), "one mask_image or 4, got 2"),
        (lambda p, x: p.inpaint(x, "mask.png"), "mask_image: .* got .'str'"),
        (lambda p, x: p.inpaint(x[..., 1:], torch.ones(5, 7)), "expected images of"),
        (lambda p, x: p.inpaint(x, torch.ones(5, 7), [1]), "expected 4 class_labels, got 1"),
        (lambda p, x: p.inpaint(x, torch.ones(5, 7), guidance_scale=2.0), "without class_labels"),
        (lambda p, x: p.inpaint(x, torch.ones(5, 7), num_particles=0), "num_particles >= 1"),
        (lambda p, x: p.inpaint(x, torch.ones(5, 7), num_particles=[1, 2]), "num_particles to"),
        (lambda p, x: p.inpaint(x, torch.ones(5, 7), num_images_per_prompt=0), "per_prompt >= 1"),
        (lambda p, x: p.inpaint(x, torch.ones(5, 7), temperature=-1), "temperature >= 0"),
        (lambda p, x: p.inpaint(x, torch.ones(5, 7), output_type="x"), "output_type in"),
        (lambda p, x: p.inpaint(x, torch.ones(5, 7), batch_size=0), "batch_size >= 1"),
        (
            lambda p, x: p.inpaint(x, torch.ones(5, 7), generator=generators(3)),
            "generator to be one or a list of 4, got 3",
        ),
        (lambda p, x: p.variations(x, 0), "level in 1 … 3, got 0"),
        (lambda p, x: p.variations(x, 4), "level in 1 … 3, got 4"),
        (lambda p, x: p.variations(x, 1, class_labels=[0]), "expected class_labels=None"),
        (lambda p, x: p.interpolate(x, x[:1]), "other to be 4 images, got 1"),
        (lambda p, x: p.interpolate(x, x, steps=1), "steps >= 2, got 1"),
        (lambda p, x: p.interpolate(x, x, 9), "level in 1 … 3, got 9"),
        (lambda p, x: p.interpolate(x, x, generator=generators(2)), "a list of 4, got 2"),
    ],
)  # fmt: skip
def test_bad_input(pipe, images, call, message):
    with pytest.raises(ValueError, match=message):
        call(pipe, images)
