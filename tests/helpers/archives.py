"""Folders and their archives."""

from pathlib import Path

import numpy as np
import PIL.Image
import torch

from helpers.models import tiny_pipeline
from progressive_vae.codec import archive
from progressive_vae.codec.container import ArchiveReader
from progressive_vae.codec.exact_image import read_exact_image
from progressive_vae.codec.folder import sources_of_folder
from progressive_vae.models.value_types import unit_to_uint8


def write_samples(folder: Path, count: int, rows: int = 1, columns: int = 1, pipe=None):
    """PNG files of sampled tiles, whose streams are short.

    Args:
        pipe: of 5×7 pixels; `None`: `tiny_pipeline()`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    samples = (pipe or tiny_pipeline())(
        num_images_per_prompt=count * rows * columns, generator=generator, output_type="pt"
    )
    tiles = unit_to_uint8(samples.images).movedim(1, -1).numpy()
    for i, image in enumerate(tiles.reshape(count, rows, columns, 5, 7, 3)):
        pixels = image.transpose(0, 2, 1, 3, 4).reshape(5 * rows, 7 * columns, 3)
        PIL.Image.fromarray(pixels).save(folder / f"{i}.png", compress_level=0)


def pack_folder(stack, folder: Path, path: Path, **options) -> archive.Packing:
    return archive.pack(stack, [*sources_of_folder(folder, set())], path, "tiny", **options)


def unpack_folder(stack, path: Path, folder: Path, **options) -> archive.Unpacking:
    return archive.unpack(stack, path, folder, **options)


def stored(path: Path) -> dict[str, archive.Entry]:
    """The first row of each file of an archive, by its name."""
    with ArchiveReader(path) as reader:
        rows = [file.row for files in archive.stored_files(reader) for file in files]
    return {row.name: row for row in reversed(rows)}


def differences(source: Path, restored: Path) -> list[str]:
    """What is not as it was: files by their bytes, images also by mode, pixels and chunks."""
    lines = []
    for item in sources_of_folder(source, set()):
        if item.problem or item.is_folder:
            continue
        same = restored / item.name
        converted = restored / f"{item.name}.png"
        with item.open() as file:
            contents = file.read()
        if same.is_file() and same.read_bytes() == contents:
            continue
        path = same if same.is_file() else converted
        if not path.is_file():
            lines.append(f"{item.name} is missing")
            continue
        expected = read_exact_image(contents)
        actual = read_exact_image(path.read_bytes())
        if not np.array_equal(actual.pixels, expected.pixels) or actual[1:] != expected[1:]:
            lines.append(f"{item.name} is another image")
    return lines
