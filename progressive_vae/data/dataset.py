"""Load datasets of images, split them, and read their images as uint8 arrays."""

import glob
import warnings
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
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


@cache  # encoding the images takes half a second
def _digits() -> datasets.DatasetDict:
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


def load_digits() -> datasets.DatasetDict:
    """Return scikit-learn's 1,797 digits, 8×8 with 17 gray values, as a dataset of images.

    The held-out split is stratified by class: 360 digits.
    """
    return datasets.DatasetDict(_digits())


@dataclass
class LoadedImages:
    """
    Args:
        splits: "train", "test" and, with a `validation_fraction`, "validation".
        notes: messages about splits and files that are held out or not used.
    """

    splits: dict[str, Table]
    notes: list[str] = field(default_factory=list)


def load_images(
    settings: DataSettings, images: Images | None = None, seed: int = 0
) -> LoadedImages:
    """Load the splits "train" and "test" of a dataset of images.

    Without an `eval_split`, `eval_fraction` of the training split is held out: a random subset by
    `seed`, or for a stream a subset by the hash of each file. `validation_fraction` of the rest
    becomes the split "validation".

    Args:
        images: a loaded dataset or a list of images, in place of a name in the settings.

    Raises:
        ValueError: not a dataset of images, or fewer than two images.
    """
    splits, notes = _open(settings, images)
    splits = {name: _without_format(table) for name, table in splits.items()}
    train_split = settings.train_split
    eval_split = settings.eval_split
    fraction = settings.eval_fraction
    is_stream = any(isinstance(split, datasets.IterableDataset) for split in splits.values())
    if is_stream and not settings.streaming:
        raise ValueError("expected streaming=True for a dataset that is a stream, got False")
    if train_split not in splits:
        raise ValueError(f"expected train_split among {list(splits)}, got {train_split!r}")
    used = [train_split]
    if eval_split in splits and eval_split != train_split:
        used.append(eval_split)
        pair = {"train": splits[train_split], "test": splits[eval_split]}
    elif not 0 < fraction < 1:
        raise ValueError(
            f"expected eval_fraction in (0, 1) for a dataset without a split {eval_split!r}, "
            f"got {fraction}"
        )
    else:
        notes.append(f"held out: {fraction} of the split {train_split!r}")
        pair = _hold_out(splits[train_split], settings, seed)
    if settings.validation_fraction:
        notes.append(f"held out for validation: {settings.validation_fraction}")
        parts = _random_split(pair["train"], settings.validation_fraction, seed)
        pair |= {"train": parts["train"], "validation": parts["test"]}
    unused = [name for name in splits if name not in used]
    if unused:
        notes.append(f"unused splits: {unused} (choose another one with --eval_split)")
    if settings.streaming:
        pair = {
            name: table.to_iterable_dataset(num_shards=max(1, min(4, len(table))))
            if isinstance(table, datasets.Dataset)
            else table
            for name, table in pair.items()
        }
    return LoadedImages(pair, notes)


def _without_format(table: Table) -> Table:
    """Return a table without its format or transform, which are meant for another program."""
    if isinstance(table, datasets.IterableDataset):
        return table
    if table.format["type"] == "custom":
        warnings.warn(
            "the transform of the dataset is not applied: images are read as stored",
            stacklevel=3,
        )
    return table.with_format(None)


def _hold_out(table: Table, settings: DataSettings, seed: int) -> dict[str, Table]:
    fraction = settings.eval_fraction
    if isinstance(table, datasets.Dataset):
        return _random_split(table, fraction, seed)
    column = find_image_column(table, settings.image_column)
    stream = encoded(table, column)

    def select(held_out: bool) -> Table:
        options = dict(held_out=held_out, column=column, fraction=fraction)
        return stream.filter(_is_in_split, fn_kwargs=options)

    return {"train": select(False), "test": select(True)}


def _random_split(table: datasets.Dataset, fraction: float, seed: int) -> dict[str, Table]:
    if len(table) < 2:
        raise ValueError(f"expected at least 2 images to hold some out, got {len(table)}")
    return dict(table.train_test_split(test_size=fraction, seed=seed))


def _open(settings: DataSettings, images: Images | None) -> tuple[Mapping[str, Table], list[str]]:
    """Return all splits by name, and notes."""
    name = settings.dataset_name
    folder = settings.train_data_dir
    is_stream = settings.streaming
    if sum(source is None for source in (name, folder, images)) != 2:
        raise ValueError(
            f"expected one of dataset_name and train_data_dir, got {name!r} and {folder!r}"
            + ("" if images is None else f" in addition to {type(images).__name__}")
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
        escaped = glob.escape(str(path))  # datasets takes patterns
        return _load(escaped, name=settings.dataset_config_name, streaming=is_stream), []
    is_path = path.is_absolute() or path.exists() or str(value).startswith((".", "~"))
    if argument == "train_data_dir" or is_path:
        state = "which is a file" if path.is_file() else "which does not exist"
        raise ValueError(f"expected {argument} to be a folder, got {value!r}, {state}")
    return _load(str(name), name=settings.dataset_config_name, streaming=is_stream), []


def _as_splits(images: Any, train_split: str) -> Mapping[str, Table]:
    """Return the splits of a loaded dataset or a list of images."""
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
            "expected a dataset of images, the name of one, a folder or a list of PIL images, "
            f"got {type(images).__name__}{of}"
        )
    features = datasets.Features({"image": datasets.Image()})
    # datasets stores the file of an image that was opened from one, without later changes: copies
    # have no file. It stores palettes as TIFF, which has no transparent color: RGBA has.
    copies = [
        image.convert("RGBA") if "transparency" in image.info else image.copy() for image in items
    ]
    return {train_split: datasets.Dataset.from_dict({"image": copies}, features=features)}


def _open_folder(folder: Path, settings: DataSettings) -> tuple[Mapping[str, Table], list[str]]:
    """Open a folder of `Dataset.save_to_disk`, of image files or of parquet files."""
    if any((folder / name).is_file() for name in _SAVED_TO_DISK):
        saved = datasets.load_from_disk(str(folder))
        return _as_splits(saved, settings.train_split), []
    if has_images(folder):
        opened = open_image_folder(
            folder, settings.train_split, settings.label_column, settings.caption_column
        )
        return opened.splits, opened.notes
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
        expected = "a dataset of images"
        if "corresponds to no data" in str(error):
            expected = "at least one image in each split"
        where = options.get("data_dir", path)
        reason: BaseException = error
        while reason.__cause__ is not None:  # the first cause is more specific
            reason = reason.__cause__
        raise ValueError(f"expected {expected} in {where}, got {reason!r}") from error


def _is_in_split(row: dict, column: str, fraction: float, held_out: bool) -> bool:
    """Return whether an image belongs to the held-out split, or else to the training split.

    The hash of its file decides, or of its full path if the file is not read yet, so that the
    split depends neither on the order of the stream nor on the number of processes.
    """
    value = row[column] or {"bytes": None, "path": None}
    content = value["bytes"] or (value["path"] or "").encode(errors="surrogateescape")
    return (zlib.crc32(content) < fraction * 2**32) == held_out


def find_image_column(table: Table, name: str | None = None) -> str:
    """Return the column named `name`, else the first of `IMAGE_COLUMNS` that the table has.

    Raises:
        ValueError: no such column, or a column of something else.
    """
    column = find_column(table, name, IMAGE_COLUMNS, "image_column")
    if column is None:
        raise ValueError(
            f"expected image_column among {table.column_names}, got none of the usual names "
            f"{IMAGE_COLUMNS}"
        )
    feature = (table.features or {}).get(column)
    is_file = isinstance(feature, datasets.Value) and feature.dtype in FILE_TYPES
    if not (feature is None or is_file or isinstance(feature, (datasets.Image, dict))):
        raise ValueError(f"expected image_column of images or their files, got {feature}")
    return column


def encoded(table: Table, image_column: str) -> Table:
    """Return the table with images as {"bytes", "path"} of their files, for `decode`."""
    return table.cast_column(image_column, datasets.Image(decode=False))


def decode(value: dict | None, max_image_pixels: int = MAX_IMAGE_PIXELS) -> OpenedImage:
    """Return the image of {"bytes", "path"}, with the orientation of its EXIF data.

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
    """Return the bytes of {"bytes", "path"}, or b"" for a null."""
    if value is None or (value["bytes"] is None and value["path"] is None):
        return b""
    if value["bytes"] is not None:
        return value["bytes"]
    with xopen(value["path"], "rb") as file:  # a stream's paths may be URLs
        return file.read()


def prepare_image(
    image: PIL.Image.Image,
    mode: str,
    resolution: int | None = None,
    center_crop: bool = False,
    rng: np.random.Generator | None = None,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
) -> np.ndarray:
    """Return an image as uint8 (C, H, W) in `mode` ("L" or "RGB").

    Args:
        resolution: length to which the shorter side is resized; `None` keeps the size.
        center_crop: crop to the center square, before resizing.
        rng: crop to a random square instead.

    Raises:
        ValueError: more than 8 bits a channel, or more pixels than the limit after resizing.
    """
    image = convert_image(image, mode).image
    if center_crop:  # before resizing, which for long images is costly
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
    caption_column: str | None = None,
    caption_ids: Mapping[str, int] | None = None,
) -> Iterator[tuple[np.ndarray, Any]]:
    """Yield each image, uint8 (C, H, W), and its class id, −1 for no label; with a
    `caption_column` the pair of its class id and caption id.

    Images that cannot be read, or have too many pixels or bits, are skipped. At the end a warning
    counts and names them, by file or by index.

    Args:
        shape: (C, H, W) that all images must have after cropping and resizing.
        first_index: index of the first row of `table`, if it is a shard.
        num_crops: yield a center crop of each image and `num_crops` − 1 random crops, which are
            reproducible.
        class_ids: the class id of each label; other labels are −1. `None`: labels are class ids.
        caption_ids: the id of each caption; other captions are −1.
        may_drop_color: convert color images to gray if C is 1; otherwise they are an error.

    Raises:
        ValueError: an image of another shape, or a color image among gray ones.
    """
    mode = "L" if shape[0] == 1 else "RGB"
    skipped = defaultdict[str, list[str]](list)  # the names of images, by reason
    prepare = partial(
        prepare_image,
        mode=mode,
        resolution=resolution,
        center_crop=center_crop,
        max_image_pixels=max_image_pixels,
    )
    for index, row in enumerate(encoded(table, image_column), first_index):
        value = row[image_column]
        label = row.get(label_column, NO_LABEL)
        name = (value or {}).get("path") or f"index {index}"
        try:
            image = decode(value, max_image_pixels).image
            arrays = [prepare(image)]
            if num_crops > 1:
                rng = np.random.default_rng(index)
                arrays += [prepare(image, rng=rng) for _ in range(num_crops - 1)]
        except ValueError as error:
            skipped[str(error)].append(name)
            continue
        if mode == "L" and not may_drop_color:
            _check_gray(image, name)
        _check_shape(arrays[0], shape, name)
        ids: Any = _class_id(label, class_ids)
        if caption_column is not None:
            ids = ids, (caption_ids or {}).get(row.get(caption_column, ""), NO_LABEL)
        yield from ((array, ids) for array in arrays)
    if skipped:
        warnings.warn(_summarize(skipped), stacklevel=2)


def _check_gray(image: PIL.Image.Image, name: str):
    if not is_gray(image):
        raise ValueError(
            f"expected gray images, as the first ones are, got one with color ({image.mode}): "
            f'{name}; set --image_mode to "RGB" or "L"'
        )


def _check_shape(array: np.ndarray, shape: tuple[int, ...], name: str):
    if array.shape != shape:
        raise ValueError(
            f"expected all images of (C, H, W) = {shape}, got {array.shape}: {name}; "
            "resize them with --resolution and --center_crop"
        )


def _class_id(label: Any, class_ids: Mapping[Any, int] | None) -> int:
    """Return the class id of a label; −1 for no label, and for labels that are no class."""
    if class_ids is not None:
        return class_ids.get(label, NO_LABEL)
    return NO_LABEL if label is None else label


def _summarize(skipped: Mapping[str, list[str]], limit: int = 20) -> str:
    """Return the number of skipped images, and at most `limit` reasons and names for each."""
    parts = []
    for reason, names in skipped.items():
        ellipsis = ", …" if len(names) > limit else ""
        parts.append(f"{reason}: {', '.join(names[:limit])}{ellipsis}")
    count = sum(map(len, skipped.values()))
    rest = f"; and for {len(parts) - limit} other reasons" if len(parts) > limit else ""
    return f"left out {count} images: {'; '.join(parts[:limit])}{rest}"


def pixel_batches(
    images: Iterator[tuple[np.ndarray, Any]], random_flip: bool = False, batch_size: int = 1000
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of `read_images` for `write_cache`: int64 (b, C, H, W) of 0 … 255, and labels
    (b,), or (b, 2) with caption ids.

    With `random_flip` each batch is followed by the batch of flipped images, so that uniform
    sampling from both flips each image with probability ½.
    """
    while batch := list(islice(images, batch_size)):
        arrays, labels = zip(*batch, strict=True)
        grids = torch.from_numpy(np.stack(arrays).astype(np.int64))
        yield grids, torch.tensor(labels)
        if random_flip:
            yield grids.flip(-1), torch.tensor(labels)
