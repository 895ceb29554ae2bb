# /// script
# requires-python = ">=3.10"
# dependencies = ["progressive-vae[train,codec]"]
#
# [tool.uv.sources]
# progressive-vae = { path = "..", editable = true }
# ///
"""A folder of pictures, or a data set, as one file without a loss, and back.

    python examples/compress.py pack pictures pictures.parquet --model you/pictures
    python examples/compress.py unpack pictures.parquet again --model you/pictures
    python examples/compress.py grow picture.png growing.png --model you/pictures

Pictures of any size are cut into tiles of the model's. The file is a table with a row for each
picture: its name, its size, and the streams of `pipe.compress`, tile by tile. What was done before
an interruption is not done again. Pictures that cannot be read, or whose pixels the model cannot
hold without a loss, are left out, with the reason. Color profiles are kept.
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
from progressive_vae.paths import expand_home
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
# Files that were written before color profiles were kept.
SCHEMA_WITHOUT_PROFILES = pa.schema([field for field in SCHEMA if field.name != "icc_profile"])
LEFT_OUT = b"left_out"  # names and reasons, in the metadata of a part
TILES_AT_A_TIME = 256  # in memory, and from one move of the progress bar to the next


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
    """Pictures into one file; its size is printed beside those of PNG, WebP and JPEG-XL files.

    Args:
        source: a folder of pictures, a picture, or a data set: a folder of parquet files alone, or
            a name.
        file: to write, a table in parquet.
        model: a pipeline's folder, or its repository on the Hub.
        split: of a data set.
        max_pictures: so many of the first ones at most.
        pictures_per_part: so many are done again at most after an interruption.
        arithmetic: "float", which this kind of machine reads again, or "integer", which takes
            several times as long and is read by others too.
        beside_files: whether other files are made to compare with, which takes longest.
    """
    file = expand_home(file, "file")
    if Path(file).exists():
        raise ValueError(f"expected a file to write that is not there yet, got {file}")
    parts, paths = Path(f"{file}.parts"), []
    written = [parts, Path(f"{file}.incomplete")]
    pipe = loaded(model)
    named, left_out = named_pictures(source, split, max_pictures, written)
    names = hashlib.sha256("\n".join(targets(named["name"])).encode()).hexdigest()
    made = {"source": source, "split": split, "model": pipe.stream_id(arithmetic), "names": names,
            "pictures_per_part": pictures_per_part}  # fmt: skip
    settings = parts / "settings.json"
    if settings.is_file() and (found := read_json(settings, "delete its folder")) != made:
        raise ValueError(f"expected parts of {made} in {parts}, got those of {found}: delete them")
    parts.mkdir(parents=True, exist_ok=True)
    write_json(settings, made)
    with tqdm(total=len(named), desc="pack") as progress:
        for start in range(0, len(named), pictures_per_part):
            paths.append(parts / f"{start:08d}.parquet")
            some = named.select(range(start, min(start + pictures_per_part, len(named))))
            if paths[-1].is_file():
                progress.update(len(some))
            else:
                write_table(packed(pipe, some, arithmetic, progress), paths[-1])
    tables = [pq.read_table(path) for path in paths]
    whole = pa.concat_tables([table.replace_schema_metadata() for table in tables])
    if not len(whole):
        raise ValueError(f"expected pictures of mode {mode_of(pipe)} in {source}, got none")
    write_table(whole, Path(file))
    shutil.rmtree(parts)
    for table in tables:
        left_out += json.loads(table.schema.metadata[LEFT_OUT])
    for name in left_out:
        print(f"left out {name}")
    print(sizes(pipe, whole, Path(file), named if beside_files else None))


def unpack(file: str, output_dir: str, model: str = MODEL):
    """The pictures of a file into a folder, as PNG files; those that are there stay as they are.

    Args:
        file: that `pack` has written.
        output_dir: to write to.
        model: the pipeline that packed it.
    """
    pipe, table = loaded(model), pq.read_table(expand_home(file, "file"))
    if not (table.schema.equals(SCHEMA) or table.schema.equals(SCHEMA_WITHOUT_PROFILES)):
        raise ValueError(f"expected {file} of pictures, got a table of {table.schema.names}")
    folder, whole = Path(expand_home(output_dir, "output_dir")), table.to_pylist()
    # Earlier versions wrote names on Windows with backslashes.
    names = [name.replace("\\", "/") for name in table["name"].to_pylist()]
    for row, target in zip(whole, targets(names), strict=True):
        row["path"] = folder / target
        if not row["path"].resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"expected names inside of a folder in {file}, got {row['name']!r}")
        sides = zip((row["height"], row["width"]), pipe.image_shape[1:], strict=True)
        if math.prod(-(-n // side) for n, side in sides) != len(row["tiles"]) or not row["tiles"]:
            raise ValueError(f"expected {row['name']!r} in tiles of {pipe.image_shape[1:]}, got "
                             f"{len(row['tiles'])} of {row['height']}×{row['width']}")  # fmt: skip
    rows = [row for row in whole if not row["path"].is_file()]
    with tqdm(total=len(table), initial=len(table) - len(rows), desc="unpack") as progress:
        for group in together(rows):
            tiles = pipe.decompress([tile for row in group for tile in row["tiles"]])
            counts = [len(row["tiles"]) for row in group]
            for row, part in zip(group, tiles.split(counts), strict=True):
                picture = joined(part, row["height"], row["width"])
                if zlib.crc32(picture.tobytes()) != row["crc"]:
                    raise ValueError(f"expected the pixels of {row['name']!r}, got others")
                save(picture, row["path"], row.get("icc_profile"))
            progress.update(len(group))
    print(f"wrote {len(table)} pictures to {output_dir}")


def grow(picture: str, file: str, model: str = MODEL):
    """What the first bytes of a picture's stream show, beside the smallest lossy files.

    Args:
        picture: of the model's size.
        file: the image to write.
        model: a pipeline's folder, or its repository on the Hub.
    """
    pipe = loaded(model)
    picture = expand_home(picture, "picture")
    try:
        array, _ = pixels_of({"bytes": None, "path": picture}, pipe.image_shape[0])
    except ValueError as error:
        raise ValueError(f"expected a picture of mode {mode_of(pipe)}, got {picture}: {error}"
                         ) from error  # fmt: skip
    stream, views = pipe.compress(array[None])[0], dict[str, np.ndarray]()
    for k, (length, view) in enumerate(progressive_previews(pipe, array[None], stream), 1):
        name = f"z_1: {length} bytes" if k == 1 else f"z_1 … z_{k}: {length} bytes"
        views[name] = as_array(view)
    views[f"all: {len(stream)} bytes"] = as_array(pipe.decompress(stream)[0])
    for name, qualities in LOSSY.items():
        with suppress(ImportError):  # imagecodecs is not there
            options = ({"distance" if name == "JPEG-XL" else "quality": q} for q in qualities)
            files = [codec_roundtrip(name, array.squeeze(), each) for each in options]
            contents, seen = min(files, key=lambda found: len(found[0]))
            views[f"{name}: {len(contents)} bytes"] = seen.reshape(array.shape)
    errors = {name: np.square(view - array.astype(float)).mean() for name, view in views.items()}
    quality = {name: f"{psnr_of(e):.1f} dB" if e else "no loss" for name, e in errors.items()}
    told = {f"{name}, {quality[name]}": view for name, view in views.items()}
    side_by_side(told).save(file, "PNG")
    print("\n".join(told))


# ---- pictures ------------------------------------------------------------------------------------


def named_pictures(
    source: str, split: str, max_pictures: int | None, written: list[Path]
) -> tuple[datasets.Dataset, list[str]]:
    """Rows of "name" and "image", whose files are not read yet, and names that cannot be stored,
    with the reason.

    Args:
        written: files and folders that are no pictures, although they may lie among them.
    """
    if max_pictures is not None and max_pictures < 1:
        raise ValueError(f"expected max_pictures >= 1, got {max_pictures}")
    path = Path(expand_home(source, "source"))
    folder, files = path, list[Path]()
    if path.is_file():
        folder, files = path.parent, [path]
    elif path.is_dir():
        files = [f for f in list_files(path, hidden=True) if not {f, *f.parents} & {*written}]
    elif path.is_absolute() or source.startswith((".", "~")):
        raise ValueError(f"expected source to be a folder, a picture or a data set, got {source!r},"
                         " which is not there")  # fmt: skip
    left_out = list[str]()
    if path.is_dir() and not files:
        raise ValueError(f"expected pictures in {source}, got none")
    if any(file.suffix != ".parquet" for file in files):
        reasons = {file: unusable_name(file.relative_to(folder)) for file in files}
        left_out = [f"{printable(file.relative_to(folder))}: {reason}"
                    for file, reason in reasons.items() if reason]  # fmt: skip
        kept = [file for file in files if not reasons[file]]
        columns = {
            "name": [file.relative_to(folder).as_posix() for file in kept],
            "image": [{"bytes": None, "path": str(file)} for file in kept],
        }
        table = datasets.Dataset.from_dict(columns)
    else:
        table = data_set(glob.escape(str(path)) if files else source, split)
    if not len(table):
        raise ValueError(f"expected pictures in {source}, got none")
    return table.select(range(min(len(table), max_pictures or len(table)))), left_out


def unusable_name(name: Path) -> str | None:
    """Why a name cannot be stored."""
    if not is_utf8(name):
        return "its name is not UTF-8"
    if os.sep == "/" and "\\" in str(name):
        return "its name has a backslash, which separates folders elsewhere"
    return None


def data_set(name: str, split: str) -> datasets.Dataset:
    table = datasets.load_dataset(name, split=split)
    images = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]
    if not images:
        raise ValueError(f"expected a data set of images, got columns {table.column_names}")
    table = table.select_columns(images[:1])
    if images[0] != "image":
        table = table.rename_column(images[0], "image")
    table = table.cast_column("image", datasets.Image(decode=False))
    return table.add_column("name", [f"{i:08d}" for i in range(len(table))])


def mode_of(pipe: ProgressiveVAEPipeline) -> str:
    return MODES[pipe.image_shape[0]]


def targets(names: list[str]) -> list[str]:
    """What pictures are called that come back."""
    found = [name if name.endswith(".png") else f"{name}.png" for name in names]
    if twice := [name for name, count in Counter(found).items() if count > 1]:
        raise ValueError(f"expected names that stay apart as PNG files, got {twice[:5]} twice")
    return found


def pixels_of(image: dict, num_channels: int) -> tuple[np.ndarray, bytes | None]:
    """uint8 (H, W, C), and the color profile of the file.

    Raises:
        ValueError: it cannot be read, or not without a loss; the message is the reason.
    """
    opened, mode = decode(image), MODES[num_channels]
    conversion = convert_image(opened.image, mode)
    if opened.omissions or not conversion.is_lossless:
        losses = [*opened.omissions, *conversion.steps]
        raise ValueError(f"not without a loss: {', '.join(losses)}")
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
    temporary = path.with_name(f"{path.name}.incomplete")
    as_pil(array).save(temporary, "PNG", icc_profile=profile)
    temporary.replace(path)


def side_by_side(views: dict[str, np.ndarray], scale: int = 3) -> PIL.Image.Image:
    """Each with its name below it."""
    height, width = (scale * n for n in next(iter(views.values())).shape[:2])
    width, margin = max(width, 190), 22
    whole = PIL.Image.new("RGB", (len(views) * (width + 8), height + margin), "white")
    for i, (name, view) in enumerate(views.items()):
        cell = as_pil(view)
        cell = cell.resize((scale * cell.width, scale * cell.height), PIL.Image.Resampling.NEAREST)
        whole.paste(cell, (i * (width + 8), 0))
        PIL.ImageDraw.Draw(whole).text((i * (width + 8), height + 4), name, "black")
    return whole


# ---- tiles ---------------------------------------------------------------------------------------


def tiles_of(picture: np.ndarray, size: tuple[int, int]) -> Tensor:
    """uint8 (H, W, C) -> (n, C, h, w), row by row; what is beyond the border repeats it."""
    ends = [(0, -n % side) for n, side in zip(picture.shape[:2], size, strict=True)]
    padded = torch.from_numpy(np.pad(picture, [*ends, (0, 0)], "edge"))
    rows = padded.unflatten(0, (-1, size[0])).unflatten(2, (-1, size[1]))  # (R, h, S, w, C)
    return rows.permute(0, 2, 4, 1, 3).flatten(0, 1)


def joined(tiles: Tensor, height: int, width: int) -> np.ndarray:
    """The reverse: uint8 (H, W, C)."""
    rows = tiles.unflatten(0, (-1, -(-width // tiles.shape[-1])))  # (R, S, C, h, w)
    whole = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    return whole[:height, :width].numpy()


# ---- files ---------------------------------------------------------------------------------------


def packed(
    pipe: ProgressiveVAEPipeline, some: datasets.Dataset, arithmetic: str, progress: tqdm
) -> pa.Table:
    """The rows of some pictures."""
    rows, waiting, left_out = list[dict](), list[Tensor](), list[str]()

    def flush():
        found = pipe.compress(torch.cat(waiting), arithmetic=arithmetic) if waiting else []
        streams = iter(found)
        for row, tiles in zip(rows[len(rows) - len(waiting) :], waiting, strict=True):
            row["tiles"] = [next(streams) for _ in tiles]
        progress.update(len(waiting))
        waiting.clear()

    for name, image in zip(some["name"], some["image"], strict=True):
        try:
            picture, profile = pixels_of(image, pipe.image_shape[0])
        except ValueError as reason:
            left_out.append(f"{name}: {reason}")
            progress.update()
            continue
        waiting.append(tiles_of(picture, pipe.image_shape[1:]))
        crc, (height, width) = zlib.crc32(picture.tobytes()), picture.shape[:2]
        row = {"name": name, "height": height, "width": width, "crc": crc, "icc_profile": profile}
        rows.append(row)
        if sum(map(len, waiting)) >= TILES_AT_A_TIME:
            flush()
    flush()
    return pa.Table.from_pylist(rows, SCHEMA.with_metadata({LEFT_OUT: json.dumps(left_out)}))


def together(rows: list[dict]) -> Iterator[list[dict]]:
    """Rows in groups of tiles that are many enough to be read at once."""
    group: list[dict] = []
    for row in rows:
        group.append(row)
        if sum(len(each["tiles"]) for each in group) >= TILES_AT_A_TIME:
            yield group
            group = []
    if group:
        yield group


def write_table(table: pa.Table, path: Path):
    temporary = path.with_name(f"{path.name}.incomplete")
    pq.write_table(table, temporary, compression="zstd")
    temporary.replace(path)


def loaded(model: str) -> ProgressiveVAEPipeline:
    pipe = ProgressiveVAEPipeline.from_pretrained(model)
    pipe.to(default_device()).set_progress_bar_config(disable=True)
    return pipe


def sizes(
    pipe: ProgressiveVAEPipeline, table: pa.Table, file: Path, named: datasets.Dataset | None
) -> str:
    """Bytes, and bits of a color of a pixel, beside those of other files of the same pictures."""
    rows = table.to_pylist()
    count = sum(row["height"] * row["width"] for row in rows) * pipe.image_shape[0]
    streams = sum(len(tile) for row in rows for tile in row["tiles"])
    found = {f"{file.name}": file.stat().st_size, "its streams": streams}
    if named is not None:
        kept = {row["name"] for row in rows}
        for row in named:
            if row["name"] in kept:
                array, _ = pixels_of(row["image"], pipe.image_shape[0])
                flat = array.squeeze(-1) if array.shape[-1] == 1 else array
                for name, options in LOSSLESS.items():
                    with suppress(ImportError):  # imagecodecs is not there
                        size = len(codec_roundtrip(name, flat, options)[0])
                        found[f"{name} files"] = found.get(f"{name} files", 0) + size
    lines = [f"| {name} | {size} | {8 * size / count:.4f} |" for name, size in found.items()]
    title = f"| {len(rows)} pictures | bytes | bits/dim |"
    return "\n".join([title, "|---|---|---|", *lines])


def main(words: list[str]):
    auto_cli([pack, unpack, grow], args=words)


if __name__ == "__main__":
    run_script(main)
