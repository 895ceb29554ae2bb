"""The images of a data set, as grids of 8-bit values."""

import glob
import warnings
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import PIL.Image
import torch
from datasets.utils.file_utils import xopen
from torch import Tensor

from ..image_files import (
    MAX_IMAGE_PIXELS,
    OpenedImage,
    convert_image,
    crop_square,
    image_array,
    is_gray,
    list_files,
    open_image,
    resize_shorter_side,
)
from .args import DataSettings
from .classes import NO_LABEL, find_column
from .image_folder import has_images, open_image_folder

IMAGE_COLUMNS = ("image", "img", "images", "pixel_values")
FILE_TYPES = ("binary", "large_binary", "string", "large_string")  # contents, or paths
_SAVED_TO_DISK = ("dataset_dict.json", "state.json")

Table: TypeAlias = datasets.Dataset | datasets.IterableDataset
Images: TypeAlias = (
    Table | datasets.DatasetDict | datasets.IterableDatasetDict | Sequence[PIL.Image.Image]
)


def load_digits() -> datasets.DatasetDict:
    """scikit-learn's 1,797 digits, 8×8 with 17 gray values, as a data set of images.

    The held-out split is stratified by class: 360 digits.
    """
    from sklearn.datasets import load_digits as sklearn_digits

    digits = sklearn_digits()
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[*map(str, range(10))])}
    )
    images = [PIL.Image.fromarray(image) for image in (digits.images * 15.9375).astype(np.uint8)]
    table = datasets.Dataset.from_dict(
        {"image": images, "label": digits.target.tolist()}, features=features
    )
    return table.train_test_split(test_size=360, seed=0, stratify_by_column="label")


@dataclass
class LoadedImages:
    """
    Args:
        splits: "train" and "test".
        notes: what was found, and what was left aside, for people.
    """

    splits: dict[str, Table]
    notes: list[str] = field(default_factory=list)


def load_images(
    settings: DataSettings, images: Images | None = None, seed: int = 0
) -> LoadedImages:
    """The splits "train" and "test" of a data set of images.

    Where there is no `eval_split`, `eval_fraction` of the training split is held out: drawn with
    `seed`, or of a stream by the bytes of the files.

    Args:
        images: what is at hand, in place of a name in the settings.

    Raises:
        ValueError: no data set of images, or none of two images at least.
    """
    splits, notes = _open(settings, images)
    splits = {name: _without_format(table) for name, table in splits.items()}
    train_split, eval_split = settings.train_split, settings.eval_split
    fraction = settings.eval_fraction
    is_stream = any(isinstance(split, datasets.IterableDataset) for split in splits.values())
    if is_stream and not settings.streaming:
        raise ValueError("expected streaming=True for a data set that is a stream, got False")
    if train_split not in splits:
        raise ValueError(f"expected train_split among {list(splits)}, got {train_split!r}")
    used = [train_split]
    if eval_split in splits and eval_split != train_split:
        used.append(eval_split)
        pair = {"train": splits[train_split], "test": splits[eval_split]}
    elif not 0 < fraction < 1:
        raise ValueError(
            f"the data set has no split {eval_split!r}: expected eval_fraction in (0, 1) to hold "
            f"some images out, got {fraction}"
        )
    else:
        notes.append(f"held out: {fraction} of the split {train_split!r}")
        pair = _hold_out(splits[train_split], settings, seed)
    unused = [name for name in splits if name not in used]
    if unused:
        notes.append(f"splits that are not used: {unused} (--eval_split names another one)")
    if settings.streaming:
        pair = {
            name: table.to_iterable_dataset(num_shards=max(1, min(4, len(table))))
            if isinstance(table, datasets.Dataset)
            else table
            for name, table in pair.items()
        }
    return LoadedImages(pair, notes)


def _without_format(table: Table) -> Table:
    """The rows as they are stored: a format or a transform, as diffusers' scripts set it, is for
    whoever set it."""
    if isinstance(table, datasets.IterableDataset):
        return table
    if table.format["type"] == "custom":
        warnings.warn(
            "the transform of the data set is not applied: images are read as they are stored",
            stacklevel=3,
        )
    return table.with_format(None)


def _hold_out(whole: Table, settings: DataSettings, seed: int) -> dict[str, Table]:
    fraction = settings.eval_fraction
    if isinstance(whole, datasets.Dataset):
        if len(whole) < 2:
            raise ValueError(f"expected at least 2 images to hold some out, got {len(whole)}")
        return dict(whole.train_test_split(test_size=fraction, seed=seed))
    column = find_image_column(whole, settings.image_column)
    stream = encoded(whole, column)

    def select(wanted: bool) -> Table:
        options = dict(wanted=wanted, column=column, fraction=fraction)
        return stream.filter(_is_held_out, fn_kwargs=options)

    return {"train": select(False), "test": select(True)}


def _open(settings: DataSettings, images: Images | None) -> tuple[Mapping[str, Table], list[str]]:
    """All splits, by their names, and notes for people."""
    name, folder, is_stream = settings.dataset_name, settings.train_data_dir, settings.streaming
    if sum(source is None for source in (name, folder, images)) != 2:
        raise ValueError(
            f"expected one of dataset_name and train_data_dir, got {name!r} and {folder!r}"
            + ("" if images is None else f" beside {type(images).__name__}")
        )
    if images is not None:
        return _as_splits(images, settings.train_split), []
    if name == "digits":
        return load_digits(), []
    argument, value = ("train_data_dir", folder) if name is None else ("dataset_name", name)
    path = Path(str(value)).expanduser()
    if path.is_dir():
        has_card = argument == "dataset_name" and (path / "README.md").is_file()
        if not has_card and settings.dataset_config_name is None:
            return _open_folder(path, settings)
        escaped = glob.escape(str(path))  # a path is no pattern
        return _load(escaped, name=settings.dataset_config_name, streaming=is_stream), []
    is_path = path.is_absolute() or path.exists() or str(value).startswith((".", "~"))
    if argument == "train_data_dir" or is_path:
        state = "which is a file" if path.is_file() else "which is not there"
        raise ValueError(f"expected {argument} to be a folder, got {value!r}, {state}")
    return _load(str(name), name=settings.dataset_config_name, streaming=is_stream), []


def _as_splits(images: Any, train_split: str) -> Mapping[str, Table]:
    """The splits of what a caller has at hand."""
    if isinstance(images, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        return images
    if isinstance(images, (datasets.Dataset, datasets.IterableDataset)):
        return {train_split: images}
    is_sequence = isinstance(images, Sequence) and not isinstance(images, (str, bytes))
    items = list(images) if is_sequence else []
    kinds = {type(item) for item in items}
    if not items or not all(issubclass(kind, PIL.Image.Image) for kind in kinds):
        of = f" of {sorted(kind.__name__ for kind in kinds)}" if items else ""
        raise ValueError(
            "expected a data set of images, the name of one, a folder or a list of PIL images, "
            f"got {type(images).__name__}{of}"
        )
    features = datasets.Features({"image": datasets.Image()})
    # Of an image that knows its file datasets would store the file, whatever was done to it since;
    # and palettes as TIFF, which has no transparent color.
    copies = [
        image.convert("RGBA") if "transparency" in image.info else image.copy() for image in items
    ]
    return {train_split: datasets.Dataset.from_dict({"image": copies}, features=features)}


def _open_folder(folder: Path, settings: DataSettings) -> tuple[Mapping[str, Table], list[str]]:
    """Image files, else what `Dataset.save_to_disk` wrote, else files of parquet."""
    if any((folder / name).is_file() for name in _SAVED_TO_DISK):
        saved = datasets.load_from_disk(str(folder))
        return _as_splits(saved, settings.train_split), []
    if has_images(folder):
        found = open_image_folder(folder, settings.train_split, settings.label_column)
        return found.splits, found.notes
    if not any(folder.rglob("*.parquet")):
        count = len(list_files(folder))
        raise ValueError(
            f"expected images or files of parquet in {folder}, got {count} files without the "
            "suffix of either"
        )
    escaped = glob.escape(str(folder))  # a path is no pattern
    return _load("parquet", data_dir=escaped, streaming=settings.streaming), []


def _load(path: str, **options) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    try:
        return datasets.load_dataset(path, **options)
    except (ValueError, FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        expected = "a data set of images"
        if "corresponds to no data" in str(error):
            expected = "at least one image in each split"
        where = options.get("data_dir", path)
        reason: BaseException = error
        while reason.__cause__ is not None:  # datasets wraps it, and says less than it does
            reason = reason.__cause__
        raise ValueError(f"expected {expected} in {where}, got {reason!r}") from error


def _is_held_out(row: dict, column: str, fraction: float, wanted: bool) -> bool:
    """By a hash of the file, or of its whole path where it is not read yet: alike wherever the
    image stands in the stream, and whichever process reads it."""
    value = row[column] or {"bytes": None, "path": None}
    content = value["bytes"] or (value["path"] or "").encode(errors="surrogateescape")
    return (zlib.crc32(content) < fraction * 2**32) == wanted


def find_image_column(table: Table, name: str | None = None) -> str:
    found = find_column(table, name, IMAGE_COLUMNS, "image_column")
    if found is None:
        raise ValueError(
            f"expected image_column among {table.column_names}, got none of the usual names "
            f"{IMAGE_COLUMNS}"
        )
    feature = (table.features or {}).get(found)
    is_file = isinstance(feature, datasets.Value) and feature.dtype in FILE_TYPES
    if not (feature is None or is_file or isinstance(feature, (datasets.Image, dict))):
        raise ValueError(f"expected image_column of images or their files, got {feature}")
    return found


def encoded(table: Table, image_column: str) -> Table:
    """The table with images as the bytes of their files, for `decode`."""
    return table.cast_column(image_column, datasets.Image(decode=False))


def decode(value: dict | None, max_image_pixels: int = MAX_IMAGE_PIXELS) -> OpenedImage:
    """The image of {"bytes", "path"}, turned as its file says.

    Raises:
        ValueError: it cannot be read, or has more pixels than the limit; the message is the reason.
    """
    try:
        contents = file_of(value)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise ValueError(error.strerror or type(error).__name__) from error
    if not contents:
        raise ValueError("empty")
    return open_image(contents, max_image_pixels)


def file_of(value: dict | None) -> bytes:
    """The bytes of {"bytes", "path"}; b"" where a data set has a null."""
    if value is None or (value["bytes"] is None and value["path"] is None):
        return b""
    if value["bytes"] is not None:
        return value["bytes"]
    with xopen(value["path"], "rb") as file:  # those of streams may lie on the Hub
        return file.read()


def prepare_image(
    image: PIL.Image.Image,
    mode: str,
    resolution: int | None = None,
    center_crop: bool = False,
    rng: np.random.Generator | None = None,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
) -> np.ndarray:
    """uint8 (C, H, W) in `mode` ("L" or "RGB").

    Args:
        resolution: length to which the shorter side is resized; `None` leaves the image alone.
        center_crop: crop to the middle square.
        rng: of a square from anywhere, in place of the middle.

    Raises:
        ValueError: more than 8 bits a channel, or more pixels than the limit after resizing.
    """
    image = convert_image(image, mode).image
    if center_crop:  # first, as of a narrow image little remains to be resized
        image = crop_square(image, rng)
    if resolution is not None:
        image = resize_shorter_side(image, resolution, max_image_pixels)
    return image_array(image)


def read_images(
    table: Table,
    image_column: str,
    label_column: str | None,
    shape: tuple[int, ...],
    resolution: int | None = None,
    center_crop: bool = False,
    first_index: int = 0,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    num_crops: int = 1,
    class_ids: Mapping[Any, int] | None = None,
    may_drop_color: bool = False,
) -> Iterator[tuple[np.ndarray, int]]:
    """Each image, uint8 (C, H, W), and its class id or −1.

    With `num_crops` squares of it follow each other, the first from the middle and the others from
    anywhere, the same each time.

    Images that cannot be read, or have too many pixels or bits, are left out, and a warning counts
    and names them at the end, by their files or by their indices, of which the table's begin with
    `first_index`.

    Args:
        class_ids: the class id of each label; other labels are −1, no class. `None`: labels are
            class ids.
        may_drop_color: images with color among gray ones are converted, which is else an error.

    Raises:
        ValueError: an image whose size is not `shape`, as nothing is resized unless asked; an image
            with color among gray ones.
    """
    mode, refused = "L" if shape[0] == 1 else "RGB", defaultdict[str, list[str]](list)
    prepare = partial(
        prepare_image,
        mode=mode,
        resolution=resolution,
        center_crop=center_crop,
        max_image_pixels=max_image_pixels,
    )
    for index, row in enumerate(encoded(table, image_column), first_index):
        value, label = row[image_column], row.get(label_column, NO_LABEL)
        name = (value or {}).get("path") or f"index {index}"
        try:
            image = decode(value, max_image_pixels).image
            arrays = [prepare(image)]
            if num_crops > 1:
                rng = np.random.default_rng(index)
                arrays += [prepare(image, rng=rng) for _ in range(num_crops - 1)]
        except ValueError as error:
            refused[str(error)].append(name)
            continue
        if mode == "L" and not (may_drop_color or is_gray(image)):
            raise ValueError(
                f"expected gray images, as the first ones are, got one with color ({image.mode}): "
                f'{name}; --image_mode "RGB" or "L" says what all shall be'
            )
        if arrays[0].shape != shape:
            raise ValueError(
                f"expected all images of (C, H, W) = {shape}, got {arrays[0].shape}: {name}; "
                "--resolution and --center_crop make them one size"
            )
        if class_ids is not None:
            label = class_ids.get(label, NO_LABEL)
        elif label is None:
            label = NO_LABEL
        yield from ((array, label) for array in arrays)
    if refused:
        warnings.warn(_summarize(refused), stacklevel=2)


def _summarize(refused: Mapping[str, list[str]], most: int = 20) -> str:
    """What was left out, and why."""
    parts = []
    for reason, names in refused.items():
        more = ", …" if len(names) > most else ""
        parts.append(f"{reason}: {', '.join(names[:most])}{more}")
    count = sum(map(len, refused.values()))
    more = f"; and for {len(parts) - most} other reasons" if len(parts) > most else ""
    return f"left out {count} images: {'; '.join(parts[:most])}{more}"


def pixel_batches(
    images: Iterator[tuple[np.ndarray, int]], random_flip: bool = False, batch_size: int = 1000
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (int64 (b, C, H, W) of 0 … 255, labels (b,)) of what `read_images` gives, for
    `codes.write_cache`.

    With `random_flip` the mirror image of each follows: a model trained on both sees every image
    either way with probability ½.
    """
    while batch := list(islice(images, batch_size)):
        arrays, labels = zip(*batch, strict=True)
        grids = torch.from_numpy(np.stack(arrays).astype(np.int64))
        yield grids, torch.tensor(labels)
        if random_flip:
            yield grids.flip(-1), torch.tensor(labels)
