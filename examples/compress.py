# /// script
# requires-python = ">=3.10"
# dependencies = ["progressive-vae[train,codec]"]
#
# [tool.uv.sources]
# progressive-vae = { path = "..", editable = true }
# ///
"""Lossless compression of a folder of images, or of a dataset, into one file.

    python examples/compress.py pack photos photos.parquet --model you/photos
    python examples/compress.py unpack photos.parquet restored --model you/photos
    python examples/compress.py grow photo.png progressive.png --model you/photos

Images of any size are cut into tiles of the model's size. The file is a table with a row for each
image: its name, its size, its color profile, and the streams of `pipe.compress`, one for each tile.
The same command resumes after an interruption. Images that cannot be read, or not converted to the
model's mode without loss, are left out and listed with the reason.
"""

import glob
import hashlib
import json
import math
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import PIL.ImageDraw
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jsonargparse import auto_cli
from torch import Tensor
from tqdm.auto import tqdm

from progressive_vae import ProgressiveVAEPipeline
from progressive_vae.codec.progressive import progressive_previews
from progressive_vae.data.dataset import decode
from progressive_vae.evaluation.image_codecs import LOSSLESS, LOSSY, codec_roundtrip
from progressive_vae.evaluation.likelihood import psnr_of
from progressive_vae.image_files import (
    MODES,
    convert_image,
    image_array,
    is_utf8,
    list_files,
    printable,
)
from progressive_vae.paths import expand_home, replacing
from progressive_vae.scripts import default_device, run_script
from progressive_vae.serialization import read_json, write_json

MODEL = str(Path(__file__).parent / "fashion_mnist")
COLOR_SPACES = {"L": b"GRAY", "RGB": b"RGB "}  # of ICC profiles, in bytes 16 to 20
SCHEMA = pa.schema(
    {
        "name": pa.string(),
        "height": pa.int32(),
        "width": pa.int32(),
        "crc": pa.uint32(),  # of the pixels
        "tiles": pa.list_(pa.binary()),
        "icc_profile": pa.binary(),
    }
)
# Files of versions that stored no color profiles.
SCHEMA_WITHOUT_PROFILES = pa.schema([field for field in SCHEMA if field.name != "icc_profile"])
LEFT_OUT = b"left_out"  # metadata key of a part: names and reasons
BATCH_SIZE = 256  # tiles that are in memory together


def pack(
    source: str,
    file: str,
    model: str = MODEL,
    split: str = "test",
    max_pictures: int | None = None,
    pictures_per_part: int = 1024,
    arithmetic: str = "float",
    beside_files: bool = True,
):
    """Compress images into one file, and print its size beside those of PNG, WebP and JPEG-XL.

    Args:
        source: a folder of images, one image, or a dataset: its name, or a folder that has only
            parquet files.
        file: parquet file to write.
        model: a pipeline's folder, or its repository on the Hub.
        split: of a dataset.
        max_pictures: compress at most this many images.
        pictures_per_part: images that are compressed again at most after an interruption.
        arithmetic: "float", decoded on the same kind of machine only, or "integer", several times
            slower and portable between machines.
        beside_files: encode all images in the other formats, which takes longest.
    """
    file = expand_home(file, "file")
    if Path(file).exists():
        raise ValueError(f"expected file that does not exist yet, got {file}")
    folder = Path(f"{file}.parts")
    pipe = loaded(model)
    own_files = [folder, Path(f"{file}.incomplete")]
    images, left_out = named_images(source, split, max_pictures, own_files)
    names = hashlib.sha256("\n".join(targets(images["name"])).encode()).hexdigest()
    settings = {
        "source": source,
        "split": split,
        "model": pipe.stream_id(arithmetic),
        "names": names,
        "pictures_per_part": pictures_per_part,
    }
    check_settings(folder, settings)

    tables = packed_parts(pipe, images, folder, pictures_per_part, arithmetic)
    table = pa.concat_tables([part.replace_schema_metadata() for part in tables])
    if not len(table):
        raise ValueError(f"expected images of mode {mode_of(pipe)} in {source}, got none")
    write_table(table, Path(file))
    shutil.rmtree(folder)

    for part in tables:
        left_out += json.loads(part.schema.metadata[LEFT_OUT])
    for name in left_out:
        print(f"left out {name}")
    print(sizes(pipe, table, Path(file), images if beside_files else None))


def check_settings(folder: Path, settings: dict):
    """Write the settings of the parts in `folder`.

    Raises:
        ValueError: it holds parts of other settings.
    """
    path = folder / "settings.json"
    if path.is_file() and (previous := read_json(path, "delete its folder")) != settings:
        raise ValueError(
            f"expected parts of {settings} in {folder}, got those of {previous}: delete them"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def unpack(file: str, output_dir: str, model: str = MODEL):
    """Restore the images of a file as PNG files; files that exist are not overwritten.

    Args:
        file: of `pack`.
        output_dir: folder to write to.
        model: the pipeline that compressed the images.
    """
    pipe = loaded(model)
    table = pq.read_table(expand_home(file, "file"))
    if not (table.schema.equals(SCHEMA) or table.schema.equals(SCHEMA_WITHOUT_PROFILES)):
        raise ValueError(
            f"expected {file} of compressed images, got a table of {table.schema.names}"
        )
    folder = Path(expand_home(output_dir, "output_dir"))
    all_rows = table.to_pylist()
    # Earlier versions wrote names on Windows with backslashes.
    names = [name.replace("\\", "/") for name in table["name"].to_pylist()]
    for row, target in zip(all_rows, targets(names), strict=True):
        row["path"] = folder / target
        if not row["path"].resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"expected names inside a folder in {file}, got {row['name']!r}")
        sides = zip((row["height"], row["width"]), pipe.image_shape[1:], strict=True)
        if math.prod(-(-n // side) for n, side in sides) != len(row["tiles"]) or not row["tiles"]:
            raise ValueError(
                f"expected {row['name']!r} in tiles of {pipe.image_shape[1:]}, got "
                f"{len(row['tiles'])} of {row['height']}×{row['width']}"
            )
    rows = [row for row in all_rows if not row["path"].is_file()]
    with tqdm(total=len(table), initial=len(table) - len(rows), desc="unpack") as progress:
        for group in batches_of(rows):
            tiles = pipe.decompress([tile for row in group for tile in row["tiles"]])
            counts = [len(row["tiles"]) for row in group]
            for row, part in zip(group, tiles.split(counts), strict=True):
                image = join_tiles(part, row["height"], row["width"])
                if (crc := zlib.crc32(image.tobytes())) != row["crc"]:
                    raise ValueError(f"expected the CRC {row['crc']} of {row['name']!r}, got {crc}")
                save(image, row["path"], row.get("icc_profile"))
            progress.update(len(group))
    print(f"wrote {len(table)} images to {output_dir}")


def grow(image: str, file: str, model: str = MODEL):
    """Decode prefixes of an image's stream progressively, beside the smallest lossy files.

    Args:
        image: file of an image of the model's size.
        file: the image to write.
        model: a pipeline's folder, or its repository on the Hub.
    """
    pipe = loaded(model)
    image = expand_home(image, "image")
    try:
        array, _ = pixels_of({"bytes": None, "path": image}, pipe.image_shape[0])
    except ValueError as error:
        raise ValueError(f"expected image of mode {mode_of(pipe)}, got {image}: {error}") from error
    stream = pipe.compress(array[None])[0]
    decoded = dict[str, np.ndarray]()
    for k, (length, preview) in enumerate(progressive_previews(pipe.stack, array[None], stream), 1):
        codes = "z_1" if k == 1 else f"z_1 … z_{k}"
        decoded[f"{codes}: {length} bytes"] = as_array(preview)
    decoded[f"all: {len(stream)} bytes"] = as_array(pipe.decompress(stream)[0])
    for name, qualities in LOSSY.items():
        with suppress(ImportError):  # imagecodecs is not installed
            options = ({"distance" if name == "JPEG-XL" else "quality": q} for q in qualities)
            files = [codec_roundtrip(name, array.squeeze(), option) for option in options]
            contents, pixels = min(files, key=lambda pair: len(pair[0]))
            decoded[f"{name}: {len(contents)} bytes"] = pixels.reshape(array.shape)
    captioned = {}
    for name, pixels in decoded.items():
        error = np.square(pixels - array.astype(float)).mean()
        captioned[f"{name}, {f'{psnr_of(error):.1f} dB' if error else 'no loss'}"] = pixels
    side_by_side(captioned).save(file, "PNG")
    print("\n".join(captioned))


# ---- images --------------------------------------------------------------------------------------


def named_images(
    source: str, split: str, max_images: int | None, own_files: list[Path]
) -> tuple[datasets.Dataset, list[str]]:
    """Return rows of "name" and "image", whose files are not read yet, and a message for each name
    that cannot be stored.

    Args:
        own_files: files and folders of this script, which may be inside the source.
    """
    if max_images is not None and max_images < 1:
        raise ValueError(f"expected max_pictures >= 1, got {max_images}")
    path = Path(expand_home(source, "source"))
    folder = path
    files = list[Path]()
    if path.is_file():
        folder = path.parent
        files = [path]
    elif path.is_dir():
        files = [f for f in list_files(path, hidden=True) if not {f, *f.parents} & {*own_files}]
    elif path.is_absolute() or source.startswith((".", "~")):
        raise ValueError(
            f"expected source to be a folder, an image or a dataset, got {source!r}, which does "
            "not exist"
        )
    left_out = list[str]()
    if path.is_dir() and not files:
        raise ValueError(f"expected images in {source}, got none")
    if any(file.suffix != ".parquet" for file in files):
        reasons = {file: unusable_name(file.relative_to(folder)) for file in files}
        left_out = [
            f"{printable(file.relative_to(folder))}: {reason}"
            for file, reason in reasons.items()
            if reason
        ]
        files = [file for file in files if not reasons[file]]
        columns = {
            "name": [file.relative_to(folder).as_posix() for file in files],
            "image": [{"bytes": None, "path": str(file)} for file in files],
        }
        table = datasets.Dataset.from_dict(columns)
    else:
        table = open_table(glob.escape(str(path)) if files else source, split)
    if not len(table):
        raise ValueError(f"expected images in {source}, got none")
    return table.select(range(min(len(table), max_images or len(table)))), left_out


def unusable_name(name: Path) -> str | None:
    """Return the reason why a name cannot be stored, if there is one."""
    if not is_utf8(name):
        return "its name is not UTF-8"
    if os.sep == "/" and "\\" in str(name):
        return "its name has a backslash, which separates folders elsewhere"
    return None


def open_table(name: str, split: str) -> datasets.Dataset:
    """Return the images of a dataset as rows of "name" and "image"."""
    table = datasets.load_dataset(name, split=split)
    images = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]
    if not images:
        raise ValueError(f"expected a dataset of images, got columns {table.column_names}")
    table = table.select_columns(images[:1])
    if images[0] != "image":
        table = table.rename_column(images[0], "image")
    table = table.cast_column("image", datasets.Image(decode=False))
    return table.add_column("name", [f"{i:08d}" for i in range(len(table))])


def mode_of(pipe: ProgressiveVAEPipeline) -> str:
    return MODES[pipe.image_shape[0]]


def targets(names: list[str]) -> list[str]:
    """Return the names of the PNG files that `unpack` writes."""
    targets = [name if name.endswith(".png") else f"{name}.png" for name in names]
    if duplicates := [name for name, count in Counter(targets).items() if count > 1]:
        raise ValueError(f"expected names that differ as PNG files, got {duplicates[:5]} twice")
    return targets


def pixels_of(image: dict, num_channels: int) -> tuple[np.ndarray, bytes | None]:
    """Return the pixels of an image file, uint8 (H, W, C), and its color profile.

    Raises:
        ValueError: it cannot be read, or not without loss; the message is the reason.
    """
    opened = decode(image)
    mode = MODES[num_channels]
    conversion = convert_image(opened.image, mode)
    if opened.omissions or not conversion.is_lossless:
        losses = [*opened.omissions, *conversion.steps]
        raise ValueError(f"not without loss: {', '.join(losses)}")
    profile = opened.image.info.get("icc_profile") or None
    if profile is not None and profile[16:20] != COLOR_SPACES[mode]:
        raise ValueError(f"its color profile is not for pixels of mode {mode}")
    return image_array(conversion.image).transpose(1, 2, 0), profile


def as_array(image: Tensor) -> np.ndarray:
    return image.movedim(0, -1).numpy()


def as_pil(array: np.ndarray) -> PIL.Image.Image:
    return PIL.Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def save(array: np.ndarray, path: Path, profile: bytes | None):
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        as_pil(array).save(temporary, "PNG", icc_profile=profile)


def side_by_side(images: dict[str, np.ndarray], scale: int = 3) -> PIL.Image.Image:
    """Return a row of enlarged images with their names as captions."""
    height, width = (scale * n for n in next(iter(images.values())).shape[:2])
    step = max(width, 190) + 8  # room for a caption
    row = PIL.Image.new("RGB", (len(images) * step, height + 22), "white")
    for i, (name, image) in enumerate(images.items()):
        cell = as_pil(image)
        cell = cell.resize((scale * cell.width, scale * cell.height), PIL.Image.Resampling.NEAREST)
        row.paste(cell, (i * step, 0))
        PIL.ImageDraw.Draw(row).text((i * step, height + 4), name, "black")
    return row


# ---- tiles ---------------------------------------------------------------------------------------


def split_tiles(image: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Return the tiles of an image, uint8 (H, W, C) -> (n, C, h, w), in raster order, padded by
    repeating the border."""
    padding = [(0, -n % side) for n, side in zip(image.shape[:2], size, strict=True)]
    padded = torch.from_numpy(np.pad(image, [*padding, (0, 0)], "edge"))
    rows = padded.unflatten(0, (-1, size[0])).unflatten(2, (-1, size[1]))  # (R, h, S, w, C)
    return rows.permute(0, 2, 4, 1, 3).flatten(0, 1)


def join_tiles(tiles: Tensor, height: int, width: int) -> np.ndarray:
    """Return the image of tiles, uint8 (n, C, h, w) -> (H, W, C): the inverse of `split_tiles`."""
    rows = tiles.unflatten(0, (-1, -(-width // tiles.shape[-1])))  # (R, S, C, h, w)
    padded = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    return padded[:height, :width].numpy()


# ---- files ---------------------------------------------------------------------------------------


def packed_parts(
    pipe: ProgressiveVAEPipeline,
    images: datasets.Dataset,
    folder: Path,
    part_size: int,
    arithmetic: str,
) -> list[pa.Table]:
    """Return tables of compressed images, which are also written to `folder`; the tables of an
    interrupted call are read from there."""
    tables = []
    with tqdm(total=len(images), desc="pack") as progress:
        for start in range(0, len(images), part_size):
            path = folder / f"{start:08d}.parquet"
            part = images.select(range(start, min(start + part_size, len(images))))
            if path.is_file():
                progress.update(len(part))
            else:
                write_table(packed(pipe, part, arithmetic, progress), path)
            tables.append(pq.read_table(path))
    return tables


def packed(
    pipe: ProgressiveVAEPipeline, images: datasets.Dataset, arithmetic: str, progress: tqdm
) -> pa.Table:
    """Return a table of compressed images, with the images that are left out as metadata."""
    rows = list[dict]()
    pending = list[Tensor]()  # the tiles of the last rows, which are compressed as one batch
    left_out = list[str]()

    def flush():
        batch = pipe.compress(torch.cat(pending), arithmetic=arithmetic) if pending else []
        streams = iter(batch)
        for row, tiles in zip(rows[len(rows) - len(pending) :], pending, strict=True):
            row["tiles"] = [next(streams) for _ in tiles]
        progress.update(len(pending))
        pending.clear()

    for name, image in zip(images["name"], images["image"], strict=True):
        try:
            pixels, profile = pixels_of(image, pipe.image_shape[0])
        except ValueError as reason:
            left_out.append(f"{name}: {reason}")
            progress.update()
            continue
        pending.append(split_tiles(pixels, pipe.image_shape[1:]))
        height, width, _ = pixels.shape
        crc = zlib.crc32(pixels.tobytes())
        row = {"name": name, "height": height, "width": width, "crc": crc, "icc_profile": profile}
        rows.append(row)
        if sum(map(len, pending)) >= BATCH_SIZE:
            flush()
    flush()
    return pa.Table.from_pylist(rows, SCHEMA.with_metadata({LEFT_OUT: json.dumps(left_out)}))


def batches_of(rows: list[dict]) -> Iterator[list[dict]]:
    """Yield groups of rows that have at least `BATCH_SIZE` tiles together."""
    group: list[dict] = []
    for row in rows:
        group.append(row)
        if sum(len(member["tiles"]) for member in group) >= BATCH_SIZE:
            yield group
            group = []
    if group:
        yield group


def write_table(table: pa.Table, path: Path):
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def loaded(model: str) -> ProgressiveVAEPipeline:
    pipe = ProgressiveVAEPipeline.from_pretrained(model)
    pipe.to(default_device()).set_progress_bar_config(disable=True)
    return pipe


def sizes(
    pipe: ProgressiveVAEPipeline, table: pa.Table, file: Path, images: datasets.Dataset | None
) -> str:
    """Return a table of bytes and bits/dim.

    Args:
        images: to encode in other formats; `None`: no comparison.
    """
    rows = table.to_pylist()
    num_dims = sum(row["height"] * row["width"] for row in rows) * pipe.image_shape[0]
    streams = sum(len(tile) for row in rows for tile in row["tiles"])
    num_bytes = Counter({file.name: file.stat().st_size, "its streams": streams})
    compressed = {row["name"] for row in rows}
    for row in images or []:
        if row["name"] not in compressed:
            continue
        array, _ = pixels_of(row["image"], pipe.image_shape[0])
        array = array.squeeze(-1) if array.shape[-1] == 1 else array
        for name, options in LOSSLESS.items():
            with suppress(ImportError):  # imagecodecs is not installed
                num_bytes[f"{name} files"] += len(codec_roundtrip(name, array, options)[0])
    lines = [f"| {name} | {size} | {8 * size / num_dims:.4f} |" for name, size in num_bytes.items()]
    title = f"| {len(rows)} images | bytes | bits/dim |"
    return "\n".join([title, "|---|---|---|", *lines])


def main(words: list[str]):
    auto_cli([pack, unpack, grow], args=words)


if __name__ == "__main__":
    run_script(main)
