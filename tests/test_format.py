"""Saved names are a file format: `golden.json` holds them as they were published, and `golden/` a
pipeline with what it says of an image.

A change here breaks every repository saved before it. Write the files anew, by running this module
as a script, only together with code that still reads the old ones. `streams.json` and `recipe.yaml`
were written by the code of commit d1ba51e, and stay; those of "transformer" are of 0.2.0. Of
"mixture" there are streams of both formats, and `archive.pvae` has those of format 1 (1824386).
"""

import base64
import hashlib
import json
import tempfile
from pathlib import Path

import pytest
import torch

from helpers.archives import unpack_folder
from helpers.models import GUIDED, tiny_level, tiny_pipeline, tiny_prior
from progressive_vae import ProgressiveVAELevel, ProgressiveVAEPipeline
from progressive_vae.codec.archive import PNG, stored_files
from progressive_vae.codec.bitstream import FORMAT, Header
from progressive_vae.codec.container import ArchiveReader
from progressive_vae.models.fingerprint import fingerprint
from progressive_vae.training.recipe import read_recipe

GOLDEN = Path(__file__).with_name("golden.json")
SAVED = Path(__file__).with_name("golden")
FASHION_MNIST = Path(__file__).parents[1] / "examples" / "fashion_mnist"
PIPELINES = ["golden", "fashion_mnist", "transformer", "mixture"]
SIZES = {"hidden_size": 4, "value_embed_dim": 2, "pixel_logit_rank": 2, "codebook_dim": 2}
BACKBONE = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 1}  # fmt: skip


def saved_names() -> dict:
    pipe = tiny_pipeline()
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        index = json.loads((Path(folder) / "model_index.json").read_text())
        configs = {
            name: sorted(json.loads((Path(folder) / name / "config.json").read_text()))
            for name in ("prior", "level_1", "level_3")
        }
    versions = ("_diffusers_version", "_progressive_vae")
    return {
        "model_index": {k: v for k, v in index.items() if k not in versions},
        "configs": {
            name: [k for k in keys if k != "transformers_version"] for name, keys in configs.items()
        },
        # Saved parts remember fingerprints, so the way to compute them is a format too.
        "fingerprint": fingerprint([level_of_sines()]),
        "level_1": sorted(pipe.level_1.state_dict()),
        "level_3": sorted(pipe.level_3.state_dict()),
        # The names inside the backbone are those of transformers.
        "prior": sorted({name.split(".")[0] for name in pipe.prior.state_dict()}),
    }


def level_of_sines():
    level = tiny_level(num_channels=1)
    with torch.no_grad():
        for value in (*level.encoder.parameters(), level.quantizer.codebook):
            value.copy_(torch.sin(torch.arange(1.0, 1 + value.numel())).view_as(value))
    return level


def small_pipeline() -> ProgressiveVAEPipeline:
    prior = tiny_prior(num_classes=2, backbone_config=BACKBONE)
    coarsest = tiny_level(num_symbols=4, seed=1, **SIZES)
    finest = tiny_level(num_channels=1, codebook_size=4, seed=2, **SIZES)
    pipe = ProgressiveVAEPipeline.from_levels(prior, [coarsest, finest])
    prior.config.finer_fingerprint = fingerprint(pipe.levels)
    return pipe


def mixture_pipeline() -> ProgressiveVAEPipeline:
    """Images of 4×4, whose pixels are copies or of a mixture of logistics."""
    prior = tiny_prior(num_classes=2, backbone_config=BACKBONE)
    level = tiny_level(num_channels=3, palette_size=3, seed=1, **{**GUIDED, **SIZES})
    pipe = ProgressiveVAEPipeline.from_levels(prior, [level])
    prior.config.finer_fingerprint = fingerprint(pipe.levels)
    return pipe


def what_it_says(pipe: ProgressiveVAEPipeline) -> dict:
    image = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8) * 4
    return {
        "codes": [codes.tolist() for codes in pipe.encode(image)],
        "bits_per_dim": pipe.bits_per_dim(image, class_labels=["1"]),
    }


def test_a_pipeline_that_was_saved_says_what_it_said():
    published = json.loads((SAVED / "says.json").read_text())
    now = what_it_says(ProgressiveVAEPipeline.from_pretrained(SAVED))
    assert now["codes"] == published["codes"]
    assert now["bits_per_dim"] == pytest.approx(published["bits_per_dim"], rel=1e-4)


@pytest.fixture(scope="module")
def pipelines():
    # Of the former level 1 of examples/fashion_mnist, a language model.
    level_1 = ProgressiveVAELevel.from_pretrained(SAVED / "fashion_mnist" / "level_1")
    loaded = {
        "golden": ProgressiveVAEPipeline.from_pretrained(SAVED),
        "fashion_mnist": ProgressiveVAEPipeline.from_pretrained(FASHION_MNIST, level_1=level_1),
        "transformer": ProgressiveVAEPipeline.from_pretrained(FASHION_MNIST),
        "mixture": ProgressiveVAEPipeline.from_pretrained(SAVED / "mixture"),
    }
    for pipe in loaded.values():
        pipe.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def golden_streams():
    return json.loads((SAVED / "streams.json").read_text())


@pytest.mark.parametrize("arithmetic", ["float", "integer"])
@pytest.mark.parametrize("name", PIPELINES)
def test_streams_of_an_earlier_version_decode(name, arithmetic, pipelines, golden_streams):
    pipe = pipelines[name]
    entries = [
        entry
        for entry in golden_streams["streams"]
        if (entry["pipeline"], entry["arithmetic"]) == (name, arithmetic)
    ]
    assert {entry["class_label"] is None for entry in entries} == {True, False}
    streams = [base64.b64decode(entry["stream"]) for entry in entries]
    headers = [Header.from_bytes(stream, "stream") for stream in streams]
    assert [header.label for header in headers] == [entry["class_label"] for entry in entries]
    try:
        images = pipe.decompress(streams)
    except ValueError:
        # Only floats of another machine may be unreadable.
        local = bytes.fromhex(pipe.stream_id("float"))[2:]
        assert arithmetic == "float" and local not in [header.arithmetic for header in headers]
        return
    for entry, image in zip(entries, images, strict=True):
        assert hashlib.sha256(image.numpy().tobytes()).hexdigest() == entry["pixels_sha256"]


def test_streams_are_those_of_an_earlier_version(pipelines, golden_streams):
    """Fixed-point arithmetic is the same on every machine, and so are its streams."""
    for entry in golden_streams["streams"]:
        name = entry["pipeline"]
        stream = base64.b64decode(entry["stream"])
        format_number = Header.from_bytes(stream, "stream").format_number
        # Formats differ in the values of mixtures only.
        is_same = name == "golden" or name == "mixture" and format_number == FORMAT
        if is_same and entry["arithmetic"] == "integer":
            pipe = pipelines[name]
            label = entry["class_label"]
            labels = None if label is None else [label]
            [again] = pipe.compress(pipe.decompress(stream), labels, "integer")
            assert again[0] - FORMAT == stream[0] - format_number
            assert again[1:] == stream[1:]


def test_an_archive_of_an_earlier_version_is_unpacked(pipelines, tmp_path):
    stack = pipelines["mixture"].stack
    result = unpack_folder(stack, SAVED / "archive.pvae", tmp_path)
    assert (result.written, result.failed) == (2, [])
    with ArchiveReader(SAVED / "archive.pvae") as reader:
        assert reader.header["format"] == 1
        rows = [file.row for files in stored_files(reader) for file in files]
    assert [(row.name, row.method) for row in rows] == [("0.png", PNG), ("1.png", PNG)]


def test_prefixes_of_an_earlier_version_decode(pipelines, golden_streams):
    for entry in golden_streams["prefixes"]:
        pipe = pipelines[entry["pipeline"]]
        preview = pipe.decompress(base64.b64decode(entry["stream"]), entry["num_levels"])[0]
        expected = torch.frombuffer(
            bytearray(base64.b64decode(entry["preview"])), dtype=torch.uint8
        )
        # The codes are exact; the most probable pixels given them are computed in floats.
        is_same = preview.flatten() == expected
        assert is_same.float().mean() > 0.9


def test_a_recipe_of_an_earlier_version_is_read():
    with pytest.warns(FutureWarning, match="decoder_order"):
        recipe = read_recipe(SAVED / "recipe.yaml")
    raster, masked, mixture = recipe.levels
    assert (raster.config["decoder_type"], raster.config["ordering"]) == ("causal_lm", "raster")
    assert raster.config["reconstruction_weight"] == 5.0
    assert raster.config["gumbel_temperature_decay"] == 0.998
    assert raster.fit.max_train_steps == 7000
    assert masked.config["decoder_type"] == "auxiliary"
    assert masked.refit.changes["ordering"] == "masked"
    assert masked.refit.changes["code_noise"] == 0.1
    assert masked.refit.changes["code_noise_kind"] == "random"
    assert mixture.config["pixel_distribution"] == "logistic_mixture"
    assert mixture.refit.changes["pixel_distribution"] == "guided_logistic_mixture"
    assert recipe.data.random_channel_permutation


def test_saved_names_are_the_published_ones():
    published, now = json.loads(GOLDEN.read_text()), saved_names()
    assert now["model_index"] == published["model_index"]
    assert now["fingerprint"] == published["fingerprint"]
    for part in ("prior", "level_1", "level_3"):
        assert now[part] == published[part]
        # A newer transformers may write fields of its own; ours must all be there.
        assert set(published["configs"][part]) <= set(now["configs"][part])


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(saved_names(), indent=1) + "\n")
    small_pipeline().save_pretrained(SAVED)
    mixture_pipeline().save_pretrained(SAVED / "mixture")
    for folder in (SAVED, SAVED / "mixture"):
        (folder / "README.md").unlink()
    (SAVED / "says.json").write_text(json.dumps(what_it_says(small_pipeline()), indent=1) + "\n")
