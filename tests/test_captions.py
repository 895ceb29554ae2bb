"""Captions of a data set: found, aligned with images, encoded once, and learned from."""

import json

import datasets
import PIL.Image
import pytest
import torch

from helpers.captions import COLORS, images_with_captions
from helpers.recipes import BACKBONE, FEW
from helpers.texts import tiny_clip, tiny_tokenizer
from progressive_vae import HashedTextEncoder, ProgressiveVAEPipeline
from progressive_vae.data.args import DataSettings
from progressive_vae.data.captions import (
    CaptionEmbeddings,
    CaptionManifest,
    Captions,
    caption_manifest,
    find_captions,
    is_caption_cache,
    text_encoder_digest,
    write_caption_embeddings,
)
from progressive_vae.data.code_cache import GridDataset
from progressive_vae.data.source import open_dataset
from progressive_vae.models.text_encoding import encode_texts, load_text_encoder
from progressive_vae.training import train
from progressive_vae.training.checkpoints import Checkpoints
from progressive_vae.training.recipe import read_recipe

RECIPE = {
    "num_levels": 1,
    "levels": {"hidden_size": 8, "num_layers": 1, "codebook_size": 8, "fit": FEW},
    "level_1": {"text_conditional": True},
    "prior": {"backbone_config": BACKBONE, "fit": FEW},
    "data": {"caption_column": "text", "eval_fraction": 0.3},
    "run": {"report_to": "none", "num_validation_images": 2, "checkpointing_steps": None},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on flipped images, one of which cannot be read."""
    folder = tmp_path_factory.mktemp("captions")
    table = images_with_captions().cast_column("image", datasets.Image(decode=False))
    rows = table.to_list()
    rows[7]["image"] = {"bytes": b"no image", "path": None}
    table = datasets.Dataset.from_list(rows, features=table.features)
    table = table.cast_column("image", datasets.Image())
    recipe = {**RECIPE, "data": {**RECIPE["data"], "random_flip": True}}
    with pytest.warns(UserWarning, match="left out 1 images"):
        train(recipe, table, folder)
    return folder, recipe, table


def test_captions_belong_to_their_images(trained):
    folder = trained[0]
    pixels = GridDataset(folder / "cache" / "pixels" / "train")
    texts = ["blue", "green", "red"]
    grids = pixels.batch(slice(None))[0]
    found = [texts[i] if i >= 0 else None for i in pixels.captions.tolist()]
    assert found == [COLORS[int(value)] or None for value in grids[:, 0, 0, 0]]
    manifest = json.loads((folder / "cache" / "captions" / "manifest.json").read_text())
    assert manifest["count"] == 3 and manifest["length"] == 1 and manifest["dim"] == 128


def test_a_run_is_conditioned_on_captions(trained):
    pipe = ProgressiveVAEPipeline.from_pretrained(str(trained[0]))
    assert [part.config.condition_dim for part in (pipe.prior, *pipe.levels)] == [128, 128]
    assert type(pipe.text_encoder) is HashedTextEncoder
    assert pipe.prior.condition_attention.output.weight.any()  # was trained
    assert pipe.level_1.decoder.condition_attention.output.weight.any()
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(prompt=["red", "green"], guidance_scale=2.0).images) == 2


def test_a_finished_run_is_resumed_and_another_text_encoder_refused(trained, tmp_path):
    folder, recipe, table = trained
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*/model.safetensors")}
    train(recipe, table, folder)
    assert {path: path.stat().st_mtime_ns for path in times if "text" not in str(path)} == {
        path: time for path, time in times.items() if "text" not in str(path)
    }
    tiny_clip().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    other = {**recipe, "data": {**recipe["data"], "text_encoder": str(tmp_path)}}
    with pytest.raises(ValueError, match="config.condition_dim=128.*got .*condition_dim=8"):
        train(other, table, folder)


def test_a_refit_needs_the_captions_of_its_level(trained, tmp_path):
    fields = {**RECIPE["level_1"], "text_conditional": False, "refit": {"fit": FEW}}
    run = {**RECIPE["run"], "finest_level": str(trained[0] / "level_1")}
    recipe = {**RECIPE, "num_levels": 1, "level_1": fields, "data": {}, "run": run}
    with pytest.raises(ValueError, match="level_1: expected captions .* condition_dim=128, got No"):
        train(recipe, trained[2], tmp_path)


def test_a_stopped_run_ends_with_the_same_weights(trained, tmp_path, monkeypatch):
    _, recipe, table = trained
    recipe = {**recipe, "run": {**recipe["run"], "checkpointing_steps": 2}}
    save = Checkpoints.save

    def stop(checkpoints, identity, *args):
        save(checkpoints, identity, *args)
        if identity["phase"] == "prior":
            raise SystemExit(0)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stop)
        with pytest.raises(SystemExit), pytest.warns(UserWarning, match="left out"):
            train(recipe, table, tmp_path)
    train(recipe, table, tmp_path)
    for part in ("level_1", "prior"):
        weights = (tmp_path / part / "model.safetensors").read_bytes()
        assert weights == (trained[0] / part / "model.safetensors").read_bytes()


def test_a_text_encoder_by_reference(tmp_path):
    tiny_clip().save_pretrained(tmp_path / "clip")
    tiny_tokenizer().save_pretrained(tmp_path / "clip")
    data = {**RECIPE["data"], "text_encoder": str(tmp_path / "clip")}
    run = {**RECIPE["run"], "save_text_encoder": False}
    recipe = {**RECIPE, "data": data, "run": run}
    pipe = train(recipe, images_with_captions(12), tmp_path / "run")
    assert pipe.prior.config.condition_dim == 8
    assert pipe.config.text_encoder_id == str(tmp_path / "clip")
    assert not (tmp_path / "run" / "text_encoder").exists()
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(prompt="a red square").images) == 1


def test_embeddings_are_cached_without_padding(tmp_path):
    texts = ["a red square", "blue"]
    captions = Captions("text", texts)
    parts = tiny_clip(), tiny_tokenizer()
    manifest = caption_manifest(captions, *parts)
    write_caption_embeddings(tmp_path / "cache", manifest, captions, *parts, batch_size=1)
    cache = CaptionEmbeddings(tmp_path / "cache", manifest)
    embeddings, mask = cache.batch([1, -1, 0, 1])
    assert embeddings.shape == (4, 5, 8) and mask.sum(1).tolist() == [3, 0, 5, 3]
    expected, expected_mask = encode_texts(*parts, texts)
    assert torch.equal(embeddings[2], expected[0, :5].half())
    assert torch.equal(embeddings[0][mask[0]], expected[1][expected_mask[1]].half())
    assert torch.equal(embeddings[0], embeddings[3]) and not embeddings[1].any()
    for other in (CaptionManifest("other", manifest.texts),
                  caption_manifest(Captions("text", ["blue"]), *parts)):  # fmt: skip
        assert not is_caption_cache(tmp_path / "cache", other)
    (tmp_path / "cache" / "embeddings.arrow").write_bytes(b"damaged")
    assert not is_caption_cache(tmp_path / "cache", manifest)


def test_digests_of_text_encoders():
    parts = tiny_clip(), tiny_tokenizer()
    digest = text_encoder_digest(*parts)
    assert text_encoder_digest(parts[0].half(), parts[1]) == digest
    assert text_encoder_digest(*load_text_encoder(None)) != digest


def test_captions_of_an_image_folder(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        (tmp_path / split).mkdir()
        names = [f"{i}.png" for i in range(count)]
        for i, name in enumerate(names):
            PIL.Image.new("L", (8, 8), i).save(tmp_path / split / name)
        lines = [json.dumps({"file_name": name, "text": f"number {i}"})
                 for i, name in enumerate(names) if i != 1]  # fmt: skip
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(lines))
    source = open_dataset(DataSettings(train_data_dir=str(tmp_path), caption_column="text"))
    assert source.captions.texts == ["number 0", "number 2"]
    assert source.splits["train"]["text"][:] == ["number 0", None, "number 2"]
    assert "caption_column" not in source.read_options("test")
    with pytest.raises(ValueError, match="caption_column among .*'image'.*got 'caption'"):
        open_dataset(DataSettings(train_data_dir=str(tmp_path), caption_column="caption"))


def test_invalid_captions():
    table = images_with_captions(6)
    with pytest.raises(ValueError, match="caption_column of texts, got .*int64"):
        find_captions(table.add_column("number", [*range(6)]), "number")
    with pytest.raises(ValueError, match="captions in caption_column, got none in 'empty'"):
        find_captions(table.add_column("empty", ["", " ", "", "", "", ""]), "empty")
    assert find_captions(table, None) == Captions()
    for arguments, message in (
        ({"caption_column": "text", "streaming": True}, "caption_column null of a stream"),
        ({"text_encoder": "clip"}, "text_encoder null without caption_column"),
    ):
        with pytest.raises(ValueError, match=message):
            DataSettings(dataset_name="digits", **arguments)
    with pytest.raises(ValueError, match="save_text_encoder=True without a text_encoder"):
        read_recipe({"run": {"save_text_encoder": False}})
    recipe = read_recipe({"level_1": {"text_conditional": True}})
    with pytest.raises(ValueError, match="text_conditional=False of level_1 without caption"):
        recipe.level_configs(1, [], {})
