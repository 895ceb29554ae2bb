"""An opened dataset: shape and classes of its images, and pixels as caches or as a stream."""

import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
from accelerate import Accelerator
from datasets.distributed import split_dataset_by_node

from ..configuration.level import NUM_PIXEL_VALUES
from ..image_files import GRAY_MODES, MODES, is_gray
from .args import DataSettings
from .augmentation import IDENTITY, Augmentation
from .captions import Captions, find_captions
from .classes import Classes, find_classes
from .code_cache import GridDataset, Manifest, is_cache, write_cache
from .dataset import (
    Images,
    Table,
    decode,
    encoded,
    file_of,
    find_image_column,
    load_images,
    pixel_batches,
    prepare_image,
    read_images,
)
from .streaming import PixelStream

STREAMED_EVAL_SAMPLES = 10_000  # held-out images of a stream, which may be very long
# Images that are inspected to detect color. Of a stream these are the first ones.
NUM_INSPECTED = 2_000
NUM_INSPECTED_OF_STREAM = 32


@dataclass
class Source:
    """The splits of a dataset, before their images are read: "train", "test" and maybe
    "validation".

    Args:
        splits: table of each split.
        manifests: identity of each split's cache of pixels.
        classes: names, and class ids of labels.
        captions: of the training images.
        options: arguments of `read_images` for every split; see `read_options`.
        notes: messages about the images that are used and left out.
        random_flip: flip training images horizontally with probability ½.
        num_crops: crops of each training image.
        augmentation: of the finest level's training images.
        shuffle_buffer_size: images in the shuffle buffer of a stream; `None` if it is not one.
        limit: upper bound of the number of training images, if there is one.
    """

    splits: dict[str, Table]
    manifests: dict[str, Manifest]
    classes: Classes
    options: dict[str, Any]
    notes: list[str]
    random_flip: bool = False
    num_crops: int = 1
    augmentation: Augmentation = IDENTITY
    shuffle_buffer_size: int | None = None
    limit: int | None = None
    captions: Captions = field(default_factory=Captions)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, [] without classes."""
        return self.classes.names

    def read_options(self, split: str) -> dict[str, Any]:
        """Return the arguments of `read_images` for a split, except for the shape."""
        options = {**self.options, "class_ids": self.classes.ids.get(split)}
        if self.captions.column is not None and split == "train":
            options |= {"caption_column": self.captions.column, "caption_ids": self.captions.ids}
        return options

    def pixels(
        self,
        folder: Path,
        accelerator: Accelerator,
        overwrite_cache: bool = False,
        overwrite_others: bool = False,
    ) -> dict[str, GridDataset | PixelStream]:
        """Return the pixels of all splits from the caches in `folder`; missing caches are written.

        The training split of a stream is not cached.

        Args:
            overwrite_cache: write all caches again.
            overwrite_others: write those caches again that are of other images.
        """
        return {
            split: PixelStream(
                self.splits[split],
                self.manifests[split],
                **self.read_options(split),
                random_flip=self.random_flip,
                augmentation=self.augmentation,
                buffer_size=self.shuffle_buffer_size,
                limit=self.limit,
            )
            if split == "train" and self.shuffle_buffer_size is not None
            else self._cached(split, folder / split, accelerator, overwrite_cache, overwrite_others)
            for split in self.splits
        }

    def _cached(
        self,
        split: str,
        folder: Path,
        accelerator: Accelerator,
        overwrite: bool,
        overwrite_others: bool,
    ) -> GridDataset:
        """Return the cache of a split, which all processes write together if it is missing."""
        table = self.splits[split]
        manifest = self.manifests[split]
        is_other = overwrite_others and not is_cache(folder, manifest)
        must_write = overwrite or is_other or not folder.exists()
        accelerator.wait_for_everyone()  # before one of them writes, all must have looked
        if must_write:
            rank = accelerator.process_index
            num_shards = accelerator.num_processes
            first_index = 0
            if self.shuffle_buffer_size is None:
                first_index = sum(
                    len(split_dataset_by_node(table, i, num_shards)) for i in range(rank)
                )
            options = self.read_options(split)
            options |= {"shape": manifest.shape, "first_index": first_index}
            if split == "train":
                options["num_crops"] = self.num_crops
            images = read_images(split_dataset_by_node(table, rank, num_shards), **options)
            is_flipped = self.random_flip and split == "train"
            write_cache(folder, manifest, pixel_batches(images, is_flipped), accelerator)
        return GridDataset(folder, manifest)


def _first_files(table: Table, column: str, count: int = 8) -> int:
    """Return the CRC-32 of the first images' files."""
    checksum = 0
    for row in islice(encoded(table, column), count):
        with suppress(OSError):  # `read_images` leaves it out
            checksum = zlib.crc32(file_of(row[column]), checksum)
    return checksum


def image_mode(table: Table, column: str, settings: DataSettings) -> tuple[str, bool]:
    """Return "L" or "RGB", and whether the settings or the dataset's `Image(mode=)` define it.

    Otherwise it is "RGB" if any of the inspected images, spread evenly over the table, has color.
    """
    if settings.image_mode is not None:
        return settings.image_mode, True
    feature = (table.features or {}).get(column)
    mode = getattr(feature, "mode", None)
    if mode is not None:
        return ("L" if mode in GRAY_MODES else "RGB"), True
    files = encoded(table, column)
    if isinstance(files, datasets.Dataset):
        inspected = files.select(range(0, len(files), max(1, len(files) // NUM_INSPECTED)))
    else:
        inspected = files.take(NUM_INSPECTED_OF_STREAM)
    for row in inspected:
        try:
            with PIL.Image.open(BytesIO(file_of(row[column]))) as image:  # reads only the header
                if not is_gray(image):
                    return "RGB", False
        except Exception:  # formats raise various errors; `read_images` names the file
            continue
    return "L", False


def _first_shape(table: Table, column: str, mode: str, settings: DataSettings) -> tuple[int, ...]:
    """Return the shape (C, H, W) of the first image that can be read.

    Raises:
        ValueError: no image can be read.
    """
    limit = settings.max_image_pixels
    reason = "no image"
    for row in encoded(table, column):
        try:
            image = decode(row[column], limit).image
            array = prepare_image(
                image, mode, settings.resolution, settings.center_crop, max_image_pixels=limit
            )
        except ValueError as error:
            reason = str(error)
            continue
        return array.shape
    raise ValueError(f"expected images in column {column!r}, got none that can be read: {reason}")


def open_dataset(settings: DataSettings, images: Images | None = None) -> Source:
    """Open a dataset; the first image of its training split defines the shape.

    Args:
        images: a loaded dataset or a list of images, in place of a name in the settings.

    Raises:
        ValueError: no such dataset, no image in it that can be read, or permutations of the color
            channels of gray images.
    """
    loaded = load_images(settings, images)
    column = find_image_column(loaded.splits["train"], settings.image_column)
    classes = find_classes(loaded.splits, settings.label_column)
    limits: dict[str, int | None] = dict.fromkeys(loaded.splits, settings.max_eval_samples)
    limits["train"] = settings.max_train_samples
    if settings.streaming:
        limits["test"] = limits["test"] or STREAMED_EVAL_SAMPLES
    splits = {
        split: _subset(split, table, limits[split], settings)
        for split, table in loaded.splits.items()
    }
    captions = find_captions(splits["train"], settings.caption_column)
    mode, is_settled = image_mode(splits["train"], column, settings)
    shape = _first_shape(splits["train"], column, mode, settings)
    if settings.random_channel_permutation and shape[0] == 1:
        raise ValueError("expected random_channel_permutation=False for gray images, got True")
    manifests = {
        split: _manifest(split, table, limits[split], shape, column, classes, settings)
        for split, table in splits.items()
    }
    return Source(
        splits,
        manifests,
        classes,
        options={
            "image_column": column,
            "label_column": classes.column,
            "resolution": settings.resolution,
            "center_crop": settings.center_crop,
            "max_image_pixels": settings.max_image_pixels,
            "may_drop_color": is_settled,
        },
        notes=[*loaded.notes, _summary(splits, shape, classes)],
        random_flip=settings.random_flip,
        num_crops=settings.num_crops,
        augmentation=Augmentation(settings.random_rotation, settings.random_channel_permutation),
        shuffle_buffer_size=settings.shuffle_buffer_size if settings.streaming else None,
        limit=limits["train"],
        captions=captions,
    )


def _subset(split: str, table: Table, limit: int | None, settings: DataSettings) -> Table:
    """Return a random subset of at most `limit` images of a split."""
    if isinstance(table, datasets.IterableDataset):
        if limit is None:
            return table
        # Sorted files are shuffled too: their order first, then images in the buffer.
        return table.shuffle(seed=0, buffer_size=settings.shuffle_buffer_size).take(limit)
    if limit is not None and limit < len(table):  # image folders are sorted by class
        table = table.shuffle(seed=0).select(range(limit))
    # Sample grids and curves show the first held-out images.
    return table if split == "train" else table.shuffle(seed=0)


def _manifest(
    split: str,
    table: Table,
    limit: int | None,
    shape: tuple[int, ...],
    column: str,
    classes: Classes,
    settings: DataSettings,
) -> Manifest:
    """Return the identity of a split's cache of pixels: all settings that change its content."""
    name = settings.dataset_name or settings.train_data_dir or "images"
    if Path(name).expanduser().exists():  # several spellings of one path
        name = str(Path(name).expanduser().resolve())
    if isinstance(table, datasets.Dataset):
        content = table._fingerprint
    else:  # a stream has no fingerprint: its first files stand for its content
        content = (
            f"stream of {limit}, {settings.dataset_config_name}, {settings.train_split}, "
            f"{settings.eval_split}, {settings.eval_fraction}, {settings.shuffle_buffer_size}, "
            f"{_first_files(table, column):08x}"
        )
    variants = f"{settings.random_flip and split == 'train'}"
    if split == "train" and settings.num_crops > 1:
        variants += f", {settings.num_crops} crops"
    if settings.caption_column is not None and split == "train":
        variants += f"; captions {settings.caption_column}"
    return Manifest(
        weights="",
        dataset=f"{name} ({content}; {column}, {classes.column}, {settings.max_image_pixels}; "
        f"{settings.resolution}, {settings.center_crop}, {variants})",
        split=split,
        shape=shape,
        num_values=NUM_PIXEL_VALUES,
    )


def _summary(splits: dict[str, Table], shape: tuple[int, ...], classes: Classes) -> str:
    """Return a message with the number, size, mode and classes of the images."""
    counts = [
        f"{len(table) if isinstance(table, datasets.Dataset) else 'a stream'} to {verb}"
        for verb, table in (("train", splits["train"]), ("evaluate", splits["test"]))
    ]
    channels, height, width = shape
    names = ", ".join(classes.names[:10]) + (", …" if len(classes.names) > 10 else "")
    labels = f"{len(classes.names)} classes ({names})" if classes.names else "no classes"
    return f"images used: {', '.join(counts)}, {height}×{width} in mode {MODES[channels]}; {labels}"
