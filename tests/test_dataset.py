import io
import struct
import zlib
from dataclasses import replace

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from progressive_vae.data.args import DataSettings
from progressive_vae.data.classes import Classes, find_classes
from progressive_vae.data.dataset import (
    decode,
    find_image_column,
    load_digits,
    load_images,
    pixel_batches,
    prepare_image,
    read_images,
)
from progressive_vae.data.source import open_dataset


def table(images, **columns):
    return datasets.Dataset.from_dict({"image": images, **columns}).cast_column(
        "image", datasets.Image()
    )


def images_of_modes(*modes, size=(4, 3)):
    return [PIL.Image.new(mode, size) for mode in modes]


def test_digits_are_split_by_class():
    digits = load_digits()
    assert len(digits["train"]) == 1437 and len(digits["test"]) == 360
    counts = np.bincount(digits["test"]["label"])
    assert counts.min() >= 34 and counts.max() <= 38
    assert np.asarray(digits["train"][0]["image"]).max() == 255


def test_a_folder_without_a_held_out_split_is_divided(tmp_path):
    for i in range(20):
        PIL.Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / f"{i}.png")
    settings = DataSettings(train_data_dir=str(tmp_path), eval_fraction=0.25)
    for fraction, sizes in ((0, [15, 5]), (0.2, [12, 5, 3])):
        splits = load_images(replace(settings, validation_fraction=fraction)).splits
        assert [len(table) for table in splits.values()] == sizes
        reds = {row["image"].getpixel((0, 0))[0] for split in splits.values() for row in split}
        assert reds == set(range(20))
    with pytest.raises(ValueError, match="validation_fraction 0 of a stream, got 0.2"):
        replace(settings, validation_fraction=0.2, streaming=True)


def test_a_folder_of_splits_has_no_classes(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for i in range(3):
            PIL.Image.new("RGB", (4, 4)).save(tmp_path / split / f"{i}.png")
    splits = load_images(DataSettings(train_data_dir=str(tmp_path))).splits
    assert len(splits["test"]) == 3 and find_classes(splits) == Classes()


def test_a_folder_for_each_class(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(10):
            PIL.Image.new("L", (4, 4)).save(tmp_path / name / f"{i}.png")
    classes = find_classes(load_images(DataSettings(train_data_dir=str(tmp_path))).splits)
    assert classes.column == "label" and classes.names == ["cat", "dog"]


def test_pixels_are_those_of_the_images():
    arrays = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 3), dtype=np.uint8)
    data = table([PIL.Image.fromarray(a) for a in arrays], label=[4, 3, 2, 1, 0])
    batches = list(pixel_batches(read_images(data, "image", "label", (3, 3, 4)), batch_size=2))
    grids, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert torch.equal(grids, torch.from_numpy(arrays.transpose(0, 3, 1, 2)).long())
    assert labels.tolist() == [4, 3, 2, 1, 0]
    flipped = list(pixel_batches(read_images(data, "image", None, (3, 3, 4)), random_flip=True))
    assert torch.equal(flipped[1][0], flipped[0][0].flip(-1)) and flipped[0][1].tolist() == [-1] * 5


def test_resolution_and_crop_only_when_asked():
    image = PIL.Image.new("RGB", (40, 20))
    assert prepare_image(image, "RGB").shape == (3, 20, 40)
    assert prepare_image(image, "RGB", resolution=10).shape == (3, 10, 20)
    assert prepare_image(image, "RGB", resolution=10, center_crop=True).shape == (3, 10, 10)


@pytest.mark.parametrize(
    ("modes", "shape", "message"),
    [
        (("L", "RGB"), (1, 3, 4), "expected gray images.*color .RGB.: index 1; .*--image_mode"),
        (("L",), (1, 4, 4), r"all images of \(C, H, W\) = \(1, 4, 4\), got \(1, 3, 4\): index 0"),
    ],
)
def test_images_of_another_mode_or_shape_raise(modes, shape, message):
    with pytest.raises(ValueError, match=message):
        list(read_images(table(images_of_modes(*modes)), "image", None, shape))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(), "one of dataset_name and train_data_dir"),
        (dict(dataset_name="digits", train_data_dir="x"), "one of dataset_name"),
        (dict(train_data_dir="/no/such/folder"), "train_data_dir to be a folder"),
    ],
)
def test_invalid_sources(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_images(DataSettings(**arguments))


def test_unreadable_images_are_left_out_and_named(tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    for i, image in enumerate(images_of_modes("L", "L", "L", "L")):
        image.save(folder / f"{i}.png")
    (folder / "1.png").write_bytes(b"not an image")
    contents = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(contents[: len(contents) // 2])
    images = table([str(folder / f"{i}.png") for i in range(4)])
    with pytest.warns(UserWarning, match="left out 2 images: .*1.png.*2.png"):
        ((grids, labels),) = pixel_batches(read_images(images, "image", None, (1, 3, 4)))
    assert len(grids) == len(labels) == 2


def png_of(width, height):
    """A file of a few bytes whose header claims this many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    file = b"\x89PNG\r\n\x1a\n"
    for name, data in chunks:
        file += struct.pack(">I", len(data)) + name + data
        file += struct.pack(">I", zlib.crc32(name + data))
    return file


def file_of_format(kind, size=(40, 30), **options):
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
    PIL.Image.fromarray(pixels).save(file, kind, **options)
    return bytearray(file.getvalue())


@pytest.mark.parametrize(
    ("kind", "place", "value"),
    [("AVIF", slice(60, 200), b"\xff" * 140), ("BMP", slice(14, 18), b"\x0b\0\0\0"),
     ("BMP", slice(28, 30), b"\xff\xff"), ("TIFF", slice(8, 60), b"\xff" * 52),
     ("GIF", slice(6, 12), b"\xff" * 6), ("WEBP", slice(16, 40), b"\0" * 24)],
)  # fmt: skip
def test_a_damaged_file_of_any_format_raises(kind, place, value):
    file = file_of_format(kind)
    assert decode({"bytes": bytes(file), "path": None}).image.size == (40, 30)
    file[place] = value
    with pytest.raises(ValueError):
        decode({"bytes": bytes(file), "path": None})


def test_bombs_nulls_and_missing_files_are_left_out_and_named(tmp_path):
    valid = bytes(file_of_format("PNG", (4, 3)))
    files = [valid, png_of(20_000, 20_000), None, b"", valid]
    rows = [{"bytes": file, "path": None} for file in files]
    rows[2] = None
    images = datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image())
    images.to_parquet(tmp_path / "train.parquet")
    columns = dict(image_column="image", label_column=None, shape=(3, 3, 4))
    for streaming in (False, True):
        table_or_stream = datasets.load_dataset(
            "parquet", data_files=str(tmp_path / "train.parquet"), streaming=streaming
        )["train"]
        words = "left out 3 images: (?=.*index 1)(?=.*index 2)(?=.*index 3).*more than 134217728"
        with pytest.warns(UserWarning, match=words):
            assert len(list(read_images(table_or_stream, **columns))) == 2
    with pytest.warns(UserWarning, match=r"left out 5 images: .*more than 11 pixels"):
        assert not list(read_images(images, **columns, max_image_pixels=11))
    gone = table([{"bytes": None, "path": str(tmp_path / "gone.png")}])
    with pytest.warns(UserWarning, match="left out 1 images: .*gone.png"):
        assert not list(read_images(gone, **columns))


def test_a_limit_above_that_of_pillow():
    previous = PIL.Image.MAX_IMAGE_PIXELS
    try:
        PIL.Image.MAX_IMAGE_PIXELS = 100
        value = {"bytes": bytes(file_of_format("PNG")), "path": None}
        assert decode(value, 10_000).image.size == (40, 30)
        with pytest.raises(ValueError, match="more than 1199 pixels: 40×30"):
            decode(value, 1199)
    finally:
        PIL.Image.MAX_IMAGE_PIXELS = previous


@pytest.mark.parametrize(
    "wrong",
    [dict(resolution=0), dict(max_train_samples=0), dict(max_eval_samples=-1),
     dict(max_image_pixels=0), dict(shuffle_buffer_size=0)],
)  # fmt: skip
def test_settings_that_must_be_positive(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"expected {name} >= 1, got {value}"):
        open_dataset(DataSettings(dataset_name="digits", **wrong))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LA"])
def test_every_mode_of_8_bits_becomes_color(mode):
    gray = PIL.Image.new("L", (4, 3), 255)
    first = PIL.Image.new("RGB", (4, 3))
    last = gray.convert("RGB" if mode == "LA" else "L").convert(mode)
    if mode == "YCbCr":  # as `datasets` stores it
        try:
            last.save(file := io.BytesIO(), "TIFF")
            PIL.Image.open(file).load()
        except OSError as error:
            pytest.skip(f"this Pillow does not read the image that it writes: {error}")
    images = table([first, last])
    (_, (array, _)) = read_images(images, "image", None, (3, 3, 4))
    assert array.dtype == np.uint8 and array.min() >= 254


def test_palettes_are_read_as_color_and_transparency_on_white():
    palette = PIL.Image.new("RGB", (4, 3), (10, 200, 30)).quantize(4)
    clear = PIL.Image.new("RGBA", (4, 3), (10, 200, 30, 0))
    (one, _), (two, _) = read_images(table([palette, clear]), "image", None, (3, 3, 4))
    assert one[:, 0, 0].tolist() == [10, 200, 30] and two[:, 0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_8_bits_is_left_out_and_named(mode):
    with pytest.warns(UserWarning, match=f"left out 1 images: more than 8 bits.*{mode}.*index 0"):
        read = list(read_images(table(images_of_modes(mode, "L")), "image", None, (1, 3, 4)))
    assert len(read) == 1


def test_a_missing_column():
    images = table(images_of_modes("L", "L")).rename_column("image", "scan")
    with pytest.raises(ValueError, match="image_column among .*'scan'.*got none of the usual"):
        find_image_column(images)
    assert find_image_column(images, "scan") == "scan"
    numbers = table(images_of_modes("L", "L"), label=[0, 1])
    for wrong in (numbers, numbers.to_iterable_dataset()):
        with pytest.raises(ValueError, match="image_column of images or their files, got Value"):
            find_image_column(wrong, "label")
    with pytest.raises(ValueError, match="expected image_column among .*'scan'.*got 'photo'"):
        find_image_column(images, "photo")


def test_an_empty_split(tmp_path):
    for split, count in (("train", 3), ("test", 0)):
        images = table(images_of_modes(*["L"] * count))
        images.to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    with pytest.raises(ValueError, match='one image in each split in .*"test" corresponds to no'):
        load_images(DataSettings(train_data_dir=str(tmp_path)))
