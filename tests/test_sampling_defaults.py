"""Sampling settings in a pipeline's config: calls without arguments use them."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging

from helpers.hub import HUB
from helpers.models import generators, tiny_level, tiny_pipeline, tiny_prior
from progressive_vae import ProgressiveVAEPipeline

SETTINGS = {"temperature": [1.0, 0.8, 0.9, 0.5], "top_p": 0.9, "guidance_scale": 1.5}


@pytest.fixture
def tuned():
    """The pipeline of `pipe`, with settings."""
    pipe = tiny_pipeline()
    pipe.register_to_config(sampling=SETTINGS)
    return pipe


def calls(pipe, images, **arguments):
    """Images of each method that samples."""
    mask = torch.ones(5, 7)
    for method, inputs, count in (
        (pipe, ([0, 1] * 2,), 4),
        (pipe.decode, (pipe.encode(images),), 4),
        (pipe.reconstruct, (images, 1), 4),
        (pipe.variations, (images, 1), 4),
        (pipe.interpolate, (images[:2], images[2:], 1), 2),
        (pipe.inpaint, (images, mask, [0, 1, 0, 1]), 4),
    ):
        result = method(*inputs, output_type="pt", generator=generators(count), **arguments)
        yield getattr(result, "images", result)


def test_calls_without_arguments_use_the_settings(pipe, tuned, images):
    controls = {name: SETTINGS[name] for name in ("temperature", "top_p")}
    for by_settings, exact in zip(calls(tuned, images), calls(pipe, images), strict=True):
        assert not torch.equal(by_settings, exact)
    # Guidance needs labels: calls that start from codes have none here.
    explicit = [
        pipe([0, 1] * 2, output_type="pt", generator=generators(4), **SETTINGS).images,
        *list(calls(pipe, images, **controls))[1:5],
    ]
    for by_settings, expected in zip(calls(tuned, images), explicit, strict=False):
        assert torch.equal(by_settings, expected)
    mask = torch.ones(5, 7)
    labels = [0, 1, 0, 1]
    inpainted, expected = (
        one.inpaint(images, mask, labels, generator=generators(4), output_type="pt", **given).images
        for one, given in ((tuned, {}), (pipe, SETTINGS))
    )
    assert torch.equal(inpainted, expected)


def test_temperature_1_is_the_exact_distribution(pipe, tuned, images):
    exact = calls(tuned, images, temperature=1.0)
    for ours, expected in zip(exact, calls(pipe, images), strict=True):
        assert torch.equal(ours, expected)


def test_other_arguments_replace_their_own_setting(pipe, tuned):
    arguments = {"class_labels": [0, 1], "output_type": "pt"}
    ours = tuned(**arguments, guidance_scale=1.0, generator=generators(2)).images
    expected = pipe(**arguments, **SETTINGS | {"guidance_scale": 1.0}, generator=generators(2))
    assert torch.equal(ours, expected.images) and tuned.guidance_scale == 1.0
    ours = tuned(**arguments, top_p=0.5, generator=generators(2)).images
    expected = pipe(**arguments, **SETTINGS | {"top_p": 0.5}, generator=generators(2))
    assert torch.equal(ours, expected.images) and tuned.guidance_scale == 1.5


def test_likelihood_and_streams_do_not_depend_on_the_settings(pipe, tuned, images):
    assert tuned.bits_per_dim(images) == pipe.bits_per_dim(images)
    assert tuned.stream_id() == pipe.stream_id()
    streams = pipe.compress(images)
    assert tuned.compress(images) == streams
    assert torch.equal(tuned.decompress(streams), images)
    assert torch.equal(tuned.decompress(streams, 1), pipe.decompress(streams, 1))


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (0.8, "expected sampling to be a dict with some of .*, got 0.8"),
        ({"top_k": 5}, "expected sampling to be a dict with some of .*'top_k'"),
        ({"temperature": -1}, "sampling: expected temperature >= 0, got -1"),
        ({"temperature": [1.0, 0.5]}, "sampling: expected temperature to be one or a list for"),
        ({"temperature": None}, "sampling: expected temperature a number, got None"),
        ({"top_p": 0}, r"sampling: expected top_p in \(0, 1\], got 0"),
        ({"top_p": [1, 1, 1, "0.5"]}, "sampling: expected top_p a number, got '0.5'"),
        ({"guidance_scale": float("nan")}, "sampling: expected guidance_scale a number, got nan"),
    ],
)
def test_bad_settings(sampling, message, tmp_path):
    pipe = tiny_pipeline()
    with pytest.raises(ValueError, match=message):
        pipe.register_to_config(sampling=sampling)
    with pytest.raises(ValueError, match=message):
        ProgressiveVAEPipeline.from_levels(pipe.prior, pipe.levels, [5, 7], sampling)
    pipe.save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sampling": sampling}))
    with pytest.raises(ValueError, match=message):
        ProgressiveVAEPipeline.from_pretrained(tmp_path)


def test_settings_are_saved_and_loaded(tuned, tmp_path, caplog):
    tuned.save_pretrained(tmp_path)
    logging.enable_propagation()
    with caplog.at_level("WARNING"):
        ProgressiveVAEPipeline.from_pretrained(tmp_path)
    logging.disable_propagation()
    assert "sampling" not in caplog.text
    assert json.loads((tmp_path / "model_index.json").read_text())["sampling"] == SETTINGS
    loaded = ProgressiveVAEPipeline.from_pretrained(tmp_path)
    assert loaded.config.sampling == SETTINGS
    assert loaded.config["image_size"] == [5, 7]
    other = ProgressiveVAEPipeline.from_pretrained(tmp_path, sampling={"temperature": 0.5})
    assert other.config.sampling == {"temperature": 0.5}
    assert ProgressiveVAEPipeline.from_pretrained(tmp_path, sampling=None).config.sampling is None
    # Pipelines of earlier versions have no such field.
    path = tmp_path / "model_index.json"
    fields = json.loads(path.read_text())
    del fields["sampling"]
    path.write_text(json.dumps(fields))
    assert ProgressiveVAEPipeline.from_pretrained(tmp_path).config.sampling is None


def test_settings_of_numpy_and_torch_become_numbers():
    level = tiny_level(num_channels=1)
    sampling = {"temperature": torch.tensor([1.0, 0.5]), "top_p": 1}
    pipe = ProgressiveVAEPipeline.from_levels(tiny_prior(), [level], [4, 4], sampling)
    assert pipe.config.sampling == {"temperature": [1.0, 0.5], "top_p": 1.0}
    json.dumps(pipe.config.sampling)


@pytest.mark.parametrize("with_code", [False, True])
def test_settings_are_pushed(tuned, with_code):
    name = f"org/tuned-{with_code}"
    tuned.push_to_hub(name, with_code=with_code)
    assert json.loads(HUB.files(name)["model_index.json"])["sampling"] == SETTINGS
    assert "temperature" in HUB.files(name)["README.md"].decode()
    for pipe in (ProgressiveVAEPipeline, DiffusionPipeline):
        loaded = pipe.from_pretrained(name, trust_remote_code=True)
        assert loaded.config.sampling == SETTINGS
