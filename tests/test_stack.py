"""`LevelStack`: the model without a diffusers pipeline."""

import ast
import inspect
import math

import pytest
import torch

from helpers.models import generators, tiny_level, tiny_pipeline, tiny_prior
from progressive_vae import ProgressiveVAEPipeline, stack
from progressive_vae.codec.bitstream import Header
from progressive_vae.codec.codec import compress, decompress
from progressive_vae.codec.progressive import minimal_prefix, progressive_previews
from progressive_vae.inpainting import inpaint, interpolate
from progressive_vae.models.value_types import signed_to_indices, uint8_to_signed
from progressive_vae.models.walk import TeacherForcing
from progressive_vae.stack import LevelStack


@pytest.fixture
def level_stack(pipe):
    return LevelStack(pipe.prior, pipe.levels, [5, 7])


def test_no_diffusers_in_its_module():
    imports = [node for node in ast.walk(ast.parse(inspect.getsource(stack)))
               if isinstance(node, (ast.Import, ast.ImportFrom))]  # fmt: skip
    names = [getattr(node, "module", None) or node.names[0].name for node in imports]
    assert not any("diffusers" in name or "pipeline" in name for name in names)


def test_shapes_and_names_are_those_of_the_pipeline(pipe, level_stack):
    assert level_stack.num_levels == pipe.num_levels == 3
    assert level_stack.factor_names == pipe.factor_names
    assert level_stack.image_shape == pipe.image_shape == (3, 5, 7)
    assert level_stack.grid_sizes == pipe.grid_sizes
    assert level_stack.device == torch.device("cpu") and not level_stack.has_previews
    assert [level_stack.factor(i) for i in range(4)] == [pipe.prior, *pipe.levels]


def test_codes_are_those_of_the_pipeline(pipe, level_stack, images):
    codes = level_stack.encode(uint8_to_signed(images))
    batches = level_stack.encode_images(images, batch_size=3)
    for z, batched, expected in zip(codes, batches, pipe.encode(images), strict=True):
        assert torch.equal(z, expected) and torch.equal(batched, expected)


@pytest.mark.parametrize("class_labels", [None, [0, 1, 2, 0]])
def test_log_prob_is_that_of_the_pipeline(pipe, level_stack, images, class_labels):
    expected = pipe.log_prob(images, class_labels)
    nats = level_stack.log_prob(uint8_to_signed(images), class_labels)
    assert list(nats) == list(expected) == pipe.factor_names
    for name, values in nats.items():
        torch.testing.assert_close(values, expected[name])
    bound = level_stack.log_prob(uint8_to_signed(images), class_labels, generators(4))
    assert list(bound) == [*pipe.factor_names, "encoders"]


def test_walks_over_all_factors_add_up_to_log_prob(level_stack, images):
    pixel_values = uint8_to_signed(images)
    grids = [*level_stack.encode(pixel_values), pixel_values]
    expected = level_stack.log_prob(pixel_values, [1] * 4)
    labels = level_stack.as_conditioning([1] * 4)
    for factor, name in enumerate(level_stack.factor_names):
        grid = grids[factor]
        values = signed_to_indices(grid) if grid.ndim == 4 else grid[:, None]
        teacher = TeacherForcing(values)
        coarser = grids[factor - 1] if factor else None
        with torch.no_grad():
            result = level_stack.walk(factor, coarser, teacher, labels)
        torch.testing.assert_close(teacher.log_prob(), expected[name], atol=1e-3, rtol=1e-4)
        assert torch.equal(result, grid)


def test_ancestral_sampling_is_that_of_the_pipeline(pipe, level_stack):
    expected = pipe([0, 1], generator=generators(2), output_type="pt", guidance_scale=2.0)
    noise = generators(2)
    labels = level_stack.as_conditioning([0, 1])
    grids = []
    for factor in range(4):
        coarser = grids[-1] if grids else None
        grids.append(level_stack.sample(factor, coarser, labels, noise, guidance_scale=2.0))
    for z, other in zip(grids[:-1], expected.codes, strict=True):
        assert torch.equal(z, other)
    torch.testing.assert_close(grids[-1] / 2 + 0.5, expected.images)


@pytest.mark.parametrize("arithmetic", ["float", "integer"])
def test_compression_round_trip(pipe, level_stack, images, arithmetic):
    streams = compress(level_stack, images, [0, 1, 2, 0], arithmetic)
    assert torch.equal(decompress(level_stack, streams), images)
    assert streams == pipe.compress(images, [0, 1, 2, 0], arithmetic)


def test_progressive_decoding(level_stack, images):
    stream = compress(level_stack, images[:1])[0]
    prefixes = list(progressive_previews(level_stack, images[:1], stream))
    lengths = [length for length, _ in prefixes]
    assert lengths == sorted(lengths) and lengths[-1] <= len(stream)
    for level, (length, preview) in enumerate(prefixes, 1):
        assert preview.shape == (3, 5, 7) and preview.dtype == torch.uint8
        # The search from the header on finds no shorter prefix.
        assert minimal_prefix(level_stack, stream, level)[0] == length
        assert length >= Header.from_bytes(stream, "stream 0").length
    with pytest.raises(ValueError, match="stream 0"):
        decompress(level_stack, stream[: lengths[-1] - 1], num_levels=3)


def test_inpainting_and_interpolation_are_functions_of_a_stack(pipe, level_stack, images):
    mask = torch.zeros(5, 7)
    mask[:, 3:] = 1
    *codes, pixel_values = inpaint(level_stack, images, mask, generator=generators(4))
    expected = pipe.inpaint(images, mask, generator=generators(4), output_type="pt")
    torch.testing.assert_close(pixel_values / 2 + 0.5, expected.images)
    for z, other in zip(codes, expected.codes, strict=True):
        assert torch.equal(z, other)
    between = interpolate(level_stack, images[:2], images[2:], level=2, steps=3)
    assert [len(z) for z in between] == [6, 6]


def test_preview_of_codes():
    levels = [
        tiny_level(num_symbols=4, auxiliary_hidden_size=8, seed=1),
        tiny_level(num_channels=3, codebook_size=4, auxiliary_hidden_size=8, seed=2),
    ]
    pipe = ProgressiveVAEPipeline.from_levels(tiny_prior(), levels)
    codes = pipe(num_images_per_prompt=4, output_type="latent").codes
    for level in (1, 2):
        expected = pipe.preview(codes, level, output_type="pt")
        pixel_values = pipe.stack.preview(codes[level - 1], level, batch_size=3)
        torch.testing.assert_close(pixel_values / 2 + 0.5, expected)
    assert pipe.stack.has_previews


def test_a_stack_without_a_prior_encodes(pipe, images):
    level_stack = LevelStack(None, pipe.levels, (5, 7))
    assert len(level_stack.encode(uint8_to_signed(images))) == 3
    for call in (level_stack.require_prior, lambda: compress(level_stack, images),
                 lambda: level_stack.log_prob(uint8_to_signed(images))):  # fmt: skip
        with pytest.raises(ValueError, match="prior"):
            call()


def test_parts_that_do_not_fit_are_refused(pipe):
    with pytest.raises(ValueError, match="num_symbols"):
        LevelStack(pipe.prior, [pipe.level_1, pipe.level_3], (5, 7))
    with pytest.raises(ValueError, match="image_size"):
        LevelStack(None, pipe.levels)


def test_bits_per_dim_is_the_sum_of_the_factors(pipe, level_stack, images):
    nats = sum(level_stack.log_prob(uint8_to_signed(images)).values()).double().mean()
    bits = -nats.item() / math.log(2) / math.prod(level_stack.image_shape)
    assert pipe.bits_per_dim(images)["total"] == pytest.approx(bits, rel=1e-5)


def test_the_old_keyword_of_inpaint_warns_once(images):
    pipe = tiny_pipeline()
    mask = torch.ones(5, 7)
    with pytest.warns(DeprecationWarning, match="num_particles") as warnings:
        old = pipe.inpaint(images, mask, generator=generators(4), num_candidates=2)
    new = pipe.inpaint(images, mask, generator=generators(4), num_particles=2)
    assert len([w for w in warnings if w.category is DeprecationWarning]) == 1
    for z, other in zip(old.codes, new.codes, strict=True):
        assert torch.equal(z, other)
