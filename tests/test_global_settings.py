"""Results do not depend on what other code has set for all of torch."""

import contextlib
import warnings

import numpy as np
import pytest
import torch

from helpers.models import generators, tiny_level, tiny_prior
from progressive_vae import (
    ProgressiveVAELevel,
    ProgressiveVAELevelConfig,
    ProgressiveVAEPipeline,
    ProgressiveVAEPrior,
)
from progressive_vae.models.layers import PixelEmbedding
from progressive_vae.models.quantizers import FiniteScalarQuantizer

LEVELS = [
    dict(num_channels=3, codebook_size=4, num_classes=2, ordering="lattice",
         pixel_distribution="guided_logistic_mixture", auxiliary_hidden_size=8, dither=0.5),
    dict(num_channels=3, codebook_size=4, pixel_distribution="logistic_mixture", quantizer="gumbel",
         ordering="lattice", auxiliary_hidden_size=8),
    dict(num_channels=3, codebook_size=4, quantizer="fsq", codebook_dim=1, ordering="masked",
         auxiliary_hidden_size=8, code_noise=0.5, code_noise_kind="near"),
]  # fmt: skip
DTYPES = [torch.float64, torch.float16, torch.bfloat16]


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def flush_denormal():
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def warnings_as_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# Together, as each takes seconds.
SETTINGS = [
    [
        lambda: default_dtype(torch.float64),
        lambda: torch.device("meta"),
        torch.no_grad,
        lambda: np.errstate(all="raise"),
    ],
    [lambda: default_dtype(torch.float16), torch.inference_mode, flush_denormal],
    [lambda: default_dtype(torch.bfloat16), deterministic, warnings_as_errors],
]


def pipeline_of(level) -> ProgressiveVAEPipeline:
    """N = 2, images of 5×7."""
    pipe = ProgressiveVAEPipeline(
        tiny_prior(grid_size=[2, 2], num_classes=2),
        tiny_level(1, num_symbols=4, decoder_type="causal_lm", auxiliary_hidden_size=8),
        tiny_level(2, **level),
        image_size=[5, 7],
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def results_of(pipe, images, mask) -> list[torch.Tensor]:
    def draw(**given):
        return pipe([0, 1], generator=generators(2), output_type="pt", **given).images

    one, strength = generators(1)[0], pipe.level_2.config.code_noise
    found = [
        *pipe.log_prob(images, [0, 1, 2, 1], generator=one).values(),
        draw(),
        draw(top_k=3, top_p=0.9, temperature=1.2, guidance_scale=2.0, code_noise=strength),
        pipe.preview(images, output_type="pt"),
        pipe.inpaint(images, mask, generator=one, num_particles=2, output_type="pt").images,
        pipe.interpolate(images[:1], images[1:2], generator=one, output_type="pt").images,
    ]
    for arithmetic in ("float", "integer"):
        streams = pipe.compress(images, [0, 1, 2, 1], arithmetic=arithmetic)
        assert torch.equal(pipe.decompress(streams), images)
        found.append(torch.frombuffer(bytearray(b"".join(streams)), dtype=torch.uint8))
    return found


@pytest.mark.parametrize(
    "level",
    [LEVELS[0], *(pytest.param(level, marks=pytest.mark.slow) for level in LEVELS[1:])],
    ids=lambda level: level.get("quantizer", "vq"),
)
def test_inference_does_not_depend_on_settings(level, images):
    pytest.importorskip("constriction")
    pipe, mask = pipeline_of(level), torch.ones(5, 7)
    mask[:, :3] = 0
    expected = results_of(pipe, images, mask)
    for number, settings in enumerate(SETTINGS):
        with contextlib.ExitStack() as stack:
            for setting in settings:
                stack.enter_context(setting())
            found = results_of(pipe, images, mask)
        for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), (number, i)


def test_streams_are_read_with_other_settings_than_they_were_made_with(images):
    pytest.importorskip("constriction")
    pipe = pipeline_of(LEVELS[0])
    for arithmetic in ("float", "integer"):
        with default_dtype(torch.bfloat16):
            streams = pipe.compress(images, arithmetic=arithmetic)
        assert torch.equal(pipe.decompress(streams), images)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.get("quantizer", "vq"))
def test_training_does_not_depend_on_the_default_dtype(level, dtype):
    pixels = torch.randint(256, (4, 3, 5, 7), generator=generators(1)[0]) / 127.5 - 1
    models = [tiny_level(**level).train() for _ in range(2)]
    vectors = torch.randn(50, models[0].config.codebook_dim, generator=generators(1)[0])
    given = {"class_labels": [0, 1, 0, 1]} if models[0].config.num_classes else {}

    def train(model) -> list[torch.Tensor]:
        model.quantizer.initialize(vectors, generators(1)[0])
        output = model(pixels, generator=generators(4), **given)
        output.loss.backward()
        model.after_step(output, lambda tensor: tensor)
        refit = model(pixels, output.codes, generator=generators(4), **given)
        return [output.loss, refit.loss, *model.state_dict().values()]

    expected = train(models[0])
    with default_dtype(dtype):
        found = train(models[1])
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_loading_does_not_depend_on_the_default_dtype(dtype, images, tmp_path):
    pipe = pipeline_of(LEVELS[0])
    pipe.save_pretrained(tmp_path)
    expected = pipe.log_prob(images)
    with default_dtype(dtype):
        loaded = ProgressiveVAEPipeline.from_pretrained(tmp_path)
        assert loaded.level_2.dtype == torch.float32
        for name, nats in loaded.log_prob(images).items():
            torch.testing.assert_close(nats, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.get("quantizer", "vq"))
def test_models_made_in_float64_compute_in_it(level, images):
    pipe = pipeline_of(level)
    expected = pipe.log_prob(images)
    with default_dtype(torch.float64):
        parts = [ProgressiveVAEPrior(pipe.prior.config)]
        parts += [ProgressiveVAELevel(part.config) for part in pipe.levels]
        for part, original in zip(parts, [pipe.prior, *pipe.levels], strict=True):
            part.load_state_dict(original.state_dict())
            assert part.dtype == torch.float64
        other = ProgressiveVAEPipeline(*[part.eval() for part in parts], image_size=[5, 7])
    for name, nats in other.log_prob(images).items():
        torch.testing.assert_close(nats, expected[name], rtol=1e-4, atol=1e-4)


def test_tables_are_computed_in_float32():
    grid, table = FiniteScalarQuantizer([7, 5]).codebook, PixelEmbedding(256, 8).ordinal_features()
    with default_dtype(torch.bfloat16):
        assert torch.equal(FiniteScalarQuantizer([7, 5]).codebook, grid.bfloat16())
        assert torch.equal(PixelEmbedding(256, 8).ordinal_features(), table)
    config = ProgressiveVAELevelConfig(num_symbols=35, hidden_size=8)
    levels = [ProgressiveVAELevel(config) for _ in range(2)]
    levels[0].encoder.embed_like(grid, generators(1)[0])
    with default_dtype(torch.float64), torch.device("meta"):
        levels[1].encoder.embed_like(grid, generators(1)[0])
    assert torch.equal(*(level.encoder.embed.weight for level in levels))
