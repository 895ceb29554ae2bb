"""Augmentation of the finest level's training images, and crops."""

from itertools import permutations

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator

from helpers.recipes import RECIPE
from progressive_vae.data.args import DataSettings
from progressive_vae.data.augmentation import Augmentation, AugmentedDataset
from progressive_vae.data.code_cache import GridDataset, Manifest, write_cache
from progressive_vae.data.dataset import load_images
from progressive_vae.data.source import open_dataset
from progressive_vae.data.streaming import PixelStream
from progressive_vae.training import train


def colored(count: int, height: int, width: int) -> list[PIL.Image.Image]:
    rng = np.random.default_rng(0)
    arrays = rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return [PIL.Image.fromarray(array) for array in arrays]


def cached(folder, grids):
    manifest = Manifest("", "x", "train", tuple(grids.shape[1:]), 256)
    write_cache(folder, manifest, [(grids, torch.arange(len(grids)))])
    return GridDataset(folder, manifest)


def test_a_square_has_all_24_transforms(tmp_path):
    grids = torch.randint(256, (5, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    dataset = AugmentedDataset(cached(tmp_path, grids), Augmentation(rotation=True, colors=True))
    assert len(dataset) == 5 * 24
    rows = dataset.__getitems__(list(range(len(dataset))))
    assert [row["index"] for row in rows] == list(range(len(dataset)))
    assert [row["label"] for row in rows] == 24 * list(range(5))
    assert all(torch.equal(rows[i]["grid"], grids[i]) for i in range(5))  # the identity
    expected = {
        np.rot90(grids[3].byte()[list(order)], turns, (1, 2)).tobytes()
        for order in permutations(range(3)) for turns in range(4)
    }  # fmt: skip
    assert {row["grid"].numpy().tobytes() for row in rows[3::5]} == expected and len(expected) == 24


def test_rotations_of_other_rectangles_keep_the_shape(tmp_path):
    grids = torch.randint(256, (2, 1, 3, 5), generator=torch.Generator().manual_seed(0))
    dataset = AugmentedDataset(cached(tmp_path, grids), Augmentation(rotation=True))
    assert len(dataset) == 4 and torch.equal(dataset[2]["grid"], grids[0].flip(-1, -2))


def test_only_the_finest_level_trains_on_augmented_images(tmp_path):
    images = colored(30, 8, 8)
    recipe = {**RECIPE, "data": {"random_rotation": True, "random_channel_permutation": True}}
    pipe = train(recipe, images, tmp_path)
    codes = GridDataset(tmp_path / "cache" / "level_2" / "train")
    pixels = GridDataset(tmp_path / "cache" / "pixels" / "train")
    assert len(codes) == len(pixels) == 27  # coarser levels train on the original images
    expected = pipe.level_2.encode(pixels.batch(slice(0, 27))[0].float() / 127.5 - 1)
    assert torch.equal(codes.batch(slice(0, 27))[0], expected)
    with pytest.raises(ValueError, match="forms"):
        train({**RECIPE, "data": {"random_rotation": True}}, images, tmp_path)
    before = (tmp_path / "level_2" / "model.safetensors").read_bytes()
    plain = train(RECIPE, images, tmp_path / "plain")
    assert plain.level_2.config == pipe.level_2.config
    assert before != (tmp_path / "plain" / "level_2" / "model.safetensors").read_bytes()


def test_a_decoder_trains_on_the_codes_of_augmented_images(tmp_path):
    """No cache holds these codes: they are computed in each step."""
    levels = {**RECIPE["levels"], "auxiliary_hidden_size": 8, "encoder_fit": {"max_train_steps": 2}}
    recipe = {**RECIPE, "levels": levels, "data": {"random_channel_permutation": True}}
    train(recipe, colored(20, 8, 8), tmp_path)
    assert len(GridDataset(tmp_path / "cache" / "level_2" / "train")) == 18
    train(recipe, colored(20, 8, 8), tmp_path)  # nothing is left to train


def test_images_of_a_stream_are_augmented(tmp_path):
    for i, image in enumerate(colored(20, 4, 4)):
        image.save(tmp_path / f"{i}.png")
    settings = DataSettings(train_data_dir=str(tmp_path), streaming=True, eval_fraction=0.2)
    table = load_images(settings).splits["train"]
    manifest = Manifest("", "x", "train", (3, 4, 4), 256)
    columns = {"image_column": "image", "label_column": None, "buffer_size": 1}
    stream = PixelStream(table, manifest, augmentation=Augmentation(colors=True), **columns)
    plain = next(iter(stream.batches(100)))[0]
    assert torch.equal(plain, next(iter(PixelStream(table, manifest, **columns).batches(100)))[0])
    orders = set()
    for row, _ in zip(stream, range(200), strict=False):
        (order,) = (
            order for grid in plain for order in permutations(range(3))
            if torch.equal(grid[list(order)], row["grid"])
        )  # fmt: skip
        orders.add(order)
    assert len(orders) == 6


def test_crops_of_each_training_image(tmp_path):
    images = colored(20, 6, 9)
    settings = DataSettings(resolution=6, center_crop=True, num_crops=30, random_flip=True)
    source = open_dataset(settings, images)
    pixels = source.pixels(tmp_path, Accelerator(cpu=True))
    assert len(pixels["test"]) == 2 and len(pixels["train"]) == 18 * 30 * 2
    originals = [np.asarray(row["image"]).transpose(2, 0, 1) for row in source.splits["train"]]
    grids = pixels["train"].batch(slice(0, 30))[0].numpy()
    assert np.array_equal(grids[0], originals[0][..., 1:7])  # the center crop
    offsets = {
        i for g in grids for i in range(4) if np.array_equal(g, originals[0][..., i : i + 6])
    }
    assert offsets == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(num_crops=4), "num_crops 1 without center_crop"),
        (dict(num_crops=4, center_crop=True, streaming=True), "or of a stream"),
        (dict(num_crops=0), "num_crops >= 1"),
    ],
)
def test_invalid_crops(settings, message):
    with pytest.raises(ValueError, match=message):
        DataSettings(**settings)


def test_gray_images_have_no_channel_permutations():
    gray = [image.convert("L") for image in colored(4, 4, 4)]
    with pytest.raises(ValueError, match="random_channel_permutation=False for gray images"):
        open_dataset(DataSettings(random_channel_permutation=True), gray)
