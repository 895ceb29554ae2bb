"""The images of a data set, as grids of 8-bit values."""

import warnings
import zlib
from collections.abc import Iterator, Mapping
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import datasets
import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from datasets.utils.file_utils import xopen
from torch import Tensor

from ..strict import MAX_CLASSES
from .settings import MAX_IMAGE_PIXELS, DataSettings

IMAGE_COLUMNS = ("image", "img", "images", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class")
GREY_MODES = ("L", "1")
COLOUR_MODES = (*GREY_MODES, "RGB", "P", "RGBA", "CMYK", "YCbCr", "LA", "PA", "RGBX")

FILE_TYPES = ("binary", "large_binary", "string", "large_string")  # contents, or paths

Table: TypeAlias = datasets.Dataset | datasets.IterableDataset
Images: TypeAlias = (
    Table | datasets.DatasetDict | datasets.IterableDatasetDict | list[PIL.Image.Image]
)


def load_digits() -> datasets.DatasetDict:
    """scikit-learn's 1,797 digits, 8×8 with 17 grey values, as a data set of images.

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


def load_images(
    settings: DataSettings, images: Images | None = None, seed: int = 0
) -> dict[str, Table]:
    """The splits {"train", "test"} of a data set of images.

    Where there is no `eval_split`, `eval_fraction` of the training split is held out: drawn with
    `seed`, or of a stream by the bytes of the files.

    Args:
        images: what is at hand, in place of a name in the settings.

    Raises:
        ValueError: no data set of images, or none of two images at least.
    """
    splits = _open(settings, images)
    is_stream = any(isinstance(split, datasets.IterableDataset) for split in splits.values())
    if settings.streaming and not is_stream:
        splits = {k: split.to_iterable_dataset(num_shards=4) for k, split in splits.items()}
    train_split, eval_split, fraction = (
        settings.train_split, settings.eval_split, settings.eval_fraction
    )  # fmt: skip
    if is_stream and not settings.streaming:
        raise ValueError("expected streaming=True for a data set that is a stream, got False")
    if train_split not in splits:
        raise ValueError(f"expected train_split among {list(splits)}, got {train_split!r}")
    if eval_split in splits and eval_split != train_split:
        return {"train": splits[train_split], "test": splits[eval_split]}
    whole = splits[train_split]
    if not 0 < fraction < 1:
        raise ValueError(
            f"the data set has no split {eval_split!r}: expected eval_fraction in (0, 1) to hold "
            f"some images out, got {fraction}"
        )
    if not settings.streaming:
        if len(whole) < 2:
            raise ValueError(f"expected at least 2 images to hold some out, got {len(whole)}")
        return whole.train_test_split(test_size=fraction, seed=seed)
    column = find_image_column(whole, settings.image_column)
    whole = encoded(whole, column)
    return {
        split: whole.filter(_is_held_out, fn_kwargs=dict(wanted=wanted, column=column,
                                                         fraction=fraction))
        for split, wanted in (("train", False), ("test", True))
    }  # fmt: skip


def _open(settings: DataSettings, images: Images | None) -> Mapping[str, Table]:
    """All splits, by their names."""
    name, folder, is_stream = settings.dataset_name, settings.train_data_dir, settings.streaming
    if [name, folder, images].count(None) != 2:
        raise ValueError(
            f"expected one of dataset_name and train_data_dir, got {name!r} and {folder!r}"
            + ("" if images is None else f" beside {type(images).__name__}")
        )
    tables = (datasets.Dataset, datasets.IterableDataset)
    if isinstance(images, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        return images
    if isinstance(images, tables):
        return {settings.train_split: images}
    if images is not None:
        kinds = {type(each) for each in images} if isinstance(images, list) else set()
        if not kinds or not all(issubclass(kind, PIL.Image.Image) for kind in kinds):
            shown = sorted(kind.__name__ for kind in kinds)
            raise ValueError(
                "expected a data set of images, the name of one, a folder or a list of PIL images, "
                f"got {type(images).__name__} of {shown}"
            )
        features = datasets.Features({"image": datasets.Image()})
        # Of an image that knows its file the file would be taken, whatever was done to it since.
        table = datasets.Dataset.from_dict({"image": [each.copy() for each in images]}, features)
        return {settings.train_split: table}
    if name == "digits":
        return load_digits()
    if folder is not None:
        if not Path(folder).is_dir():
            raise ValueError(f"expected train_data_dir to be a folder, got {folder!r}")
        loader = "parquet" if any(Path(folder).rglob("*.parquet")) else "imagefolder"
        return _load(loader, data_dir=folder, streaming=is_stream)
    return _load(str(name), name=settings.dataset_config_name, streaming=is_stream)


def _load(path: str, **options) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    try:
        return datasets.load_dataset(path, **options)
    except (ValueError, FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        expected = "a data set of images"
        if "corresponds to no data" in str(error):
            expected = "at least one image in each split"
        where = options.get("data_dir", path)
        raise ValueError(f"expected {expected} in {where}, got {error!r}") from error


def _is_held_out(row: dict, column: str, fraction: float, wanted: bool) -> bool:
    """By a hash of the file: alike wherever the image stands, and whichever process reads it."""
    value = row[column] or {"bytes": None, "path": None}
    content = value["bytes"] or Path(value["path"] or "").name.encode()
    return (zlib.crc32(content) < fraction * 2**32) == wanted


def find_column(
    table: Table, name: str | None, candidates: tuple[str, ...], argument: str
) -> str | None:
    """The column asked for, or the first of the usual ones that is there."""
    names = table.column_names or list(next(iter(table), {}))  # a stream may not know them yet
    if name is None:
        return next((c for c in candidates if c in names), None)
    if name not in names:
        raise ValueError(f"expected {argument} among {names}, got {name!r}")
    return name


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


def find_labels(
    splits: dict[str, Table], label_column: str | None = None
) -> tuple[str | None, list[str]]:
    """The column of labels and the names of the classes 0 … n − 1; (None, []) where there is none.

    Of a stream the classes are known if the data set names them.

    Raises:
        ValueError: the column asked for holds no classes. One that is only found by its name is
            then left aside, as are the names of splits that a folder's labels may stand for.
    """
    train = splits["train"]
    name = find_column(train, label_column, LABEL_COLUMNS, "label_column")
    if name is None:
        return None, []
    feature = (train.features or {}).get(name)
    are_numbers = isinstance(feature, datasets.ClassLabel) or (
        isinstance(feature, datasets.Value) and "int" in feature.dtype
    )
    if isinstance(train, datasets.IterableDataset) or not are_numbers:
        columns, are_classes = [], isinstance(feature, datasets.ClassLabel)
    else:
        columns = [np.asarray(table.with_format("numpy")[name][:]) for table in splits.values()]
        # A null makes numpy's column one of floats; its image is left out when it is read.
        columns = [c if c.dtype.kind != "f" else c[~np.isnan(c)].astype(np.int64) for c in columns]
        are_classes = all(c.size and c.dtype.kind in "iu" and c.min() >= 0 for c in columns)
    if not are_classes or (
        isinstance(feature, datasets.ClassLabel) and set(feature.names) <= {"train", "test", "val"}
    ):
        if label_column is not None:
            raise ValueError(
                f"expected label_column of integers 0 … n − 1 or class labels, got {feature} "
                f"in {name!r}"
            )
        return None, []
    if isinstance(feature, datasets.ClassLabel):
        names = list(feature.names)
    elif (count := 1 + int(max(c.max() for c in columns))) > MAX_CLASSES:
        raise ValueError(
            f"expected labels of at most {MAX_CLASSES} classes, got numbers up to {count - 1} in "
            f"{name!r}: name another label_column, or give that one class labels"
        )
    else:
        names = [str(i) for i in range(count)]
    found = set(np.unique(columns[0]).tolist()) if columns else {*range(len(names))}
    missing = [each for i, each in enumerate(names) if i not in found]
    if missing:
        warnings.warn(
            f"no example of {missing} in the training split: what is drawn of them is not learned",
            stacklevel=2,
        )
    return name, names


def encoded(table: Table, image_column: str) -> Table:
    """The table with images as the bytes of their files, for `decode`."""
    return table.cast_column(image_column, datasets.Image(decode=False))


def decode(value: dict | None, max_image_pixels: int = MAX_IMAGE_PIXELS) -> PIL.Image.Image | None:
    """The image of {"bytes", "path"}, turned as its file says; `None` if it cannot be read, or has
    more pixels than this."""
    limit = PIL.Image.MAX_IMAGE_PIXELS
    if limit is not None and max_image_pixels > limit:
        PIL.Image.MAX_IMAGE_PIXELS = max_image_pixels  # Pillow's own would come first
    try:
        contents = file_of(value)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a file is read or left out, and those are counted
        try:
            image = PIL.Image.open(BytesIO(contents))
            if image.width * image.height > max_image_pixels:
                return None
            image.load()
            PIL.ImageOps.exif_transpose(image, in_place=True)
            return image
        except Exception:  # each format has errors of its own for damaged files
            return None


def file_of(value: dict | None) -> bytes:
    """The bytes of {"bytes", "path"}; b"" where a data set has a null."""
    if value is None or (value["bytes"] is None and value["path"] is None):
        return b""
    if value["bytes"] is not None:
        return value["bytes"]
    with xopen(value["path"], "rb") as file:  # those of streams may lie on the Hub
        return file.read()


def prepare_image(
    image: PIL.Image.Image, mode: str, resolution: int | None = None, center_crop: bool = False
) -> np.ndarray:
    """uint8 (C, H, W) in `mode` ("L" or "RGB").

    Args:
        resolution: length to which the shorter side is resized; `None` leaves the image alone.
        center_crop: cut the middle square out.
    """
    modes = GREY_MODES if mode == "L" else COLOUR_MODES
    if image.mode not in modes:
        raise ValueError(
            f"expected 8-bit images of modes {modes}, as the first image is one of them, "
            f"got one of mode {image.mode!r}"
        )
    image = image.convert(mode)
    if resolution is not None:
        scale = resolution / min(image.size)
        width, height = (max(resolution, round(n * scale)) for n in image.size)
        image = image.resize((width, height), PIL.Image.Resampling.LANCZOS)
    if center_crop:
        side = min(image.size)
        left, upper = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, upper, left + side, upper + side))
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def random_square(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(C, H, W), cut along its longer side."""
    side = min(array.shape[1:])
    top, left = (rng.integers(n - side + 1) for n in array.shape[1:])
    return array[:, top : top + side, left : left + side]


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
) -> Iterator[tuple[np.ndarray, int]]:
    """Each image, uint8 (C, H, W), and its label or −1.

    With `num_crops` squares of it follow each other, the first from the middle and the others from
    anywhere, the same each time.

    Images that cannot be read, that have more than `max_image_pixels`, or that have no label where
    the others have, are left out, and a warning counts and names them at the end, by their files
    or by their indices, of which the table's begin with `first_index`.

    Raises:
        ValueError: an image whose size is not `shape`: nothing is resized unless asked.
    """
    mode, broken = "L" if shape[0] == 1 else "RGB", []
    for index, row in enumerate(encoded(table, image_column), first_index):
        value, label = row[image_column], row[label_column] if label_column else -1
        image = decode(value, max_image_pixels)
        if image is None or label is None:
            broken.append((value or {}).get("path") or f"index {index}")
            continue
        arrays = [prepare_image(image, mode, resolution, center_crop)]
        if arrays[0].shape != shape:
            raise ValueError(
                f"expected all images of (C, H, W) = {shape}, got {arrays[0].shape} at index "
                f"{index}; --resolution and --center_crop make them one size"
            )
        if num_crops > 1:
            whole, rng = prepare_image(image, mode, resolution), np.random.default_rng(index)
            arrays += [random_square(whole, rng) for _ in range(num_crops - 1)]
        yield from ((array, label) for array in arrays)
    if broken:
        shown = ", ".join(broken[:20]) + (", …" if len(broken) > 20 else "")
        warnings.warn(
            f"left out {len(broken)} images that cannot be read, have no label, or have more than "
            f"{max_image_pixels} pixels (--max_image_pixels): {shown}",
            stacklevel=2,
        )


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
