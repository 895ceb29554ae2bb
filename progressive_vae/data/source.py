"""A data set of images, opened: what its images are, and their pixels as caches or as a stream."""

import zlib
from contextlib import suppress
from dataclasses import dataclass
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

STREAMED_EVAL_SAMPLES = 10_000  # of a stream, whose end may be far
# Images whose files are opened to see whether a data set has color; of a stream only the first.
NUM_INSPECTED, NUM_INSPECTED_OF_STREAM = 2_000, 32


@dataclass
class Source:
    """The splits "train" and "test", of which no more than the first image has been read.

    Args:
        splits: their tables.
        manifests: what the caches of their pixels hold.
        classes: of the images.
        options: of `read_images` for every split; see `read_options`.
        notes: what was found, what is used and what was left aside, for people.
        random_flip: of the training split, as is
        num_crops: squares out of each image.
        forms: in which the finest level sees its images.
        shuffle_buffer_size: images in the window of a stream; `None` if it is none.
        limit: images of the training split at most, where that was asked for.
    """

    splits: dict[str, Table]
    manifests: dict[str, Manifest]
    classes: Classes
    options: dict[str, Any]
    notes: list[str]
    random_flip: bool = False
    num_crops: int = 1
    forms: Augmentation = IDENTITY
    shuffle_buffer_size: int | None = None
    limit: int | None = None

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, [] where there are none."""
        return self.classes.names

    def read_options(self, split: str) -> dict[str, Any]:
        """The arguments of `read_images` for the rows of a split, but for their shape."""
        return {**self.options, "class_ids": self.classes.ids.get(split)}

    def pixels(
        self,
        folder: Path,
        accelerator: Accelerator,
        overwrite_cache: bool = False,
        overwrite_others: bool = False,
    ) -> dict[str, GridDataset | PixelStream]:
        """The pixels of both splits, from the caches in `folder`, which are made where they are
        missing; those of a stream's training split as they come.

        Args:
            overwrite_cache: make them anew.
            overwrite_others: make those anew that are of other images.
        """
        return {
            split: PixelStream(
                self.splits[split],
                self.manifests[split],
                **self.read_options(split),
                random_flip=self.random_flip,
                forms=self.forms,
                buffer_size=self.shuffle_buffer_size,
                limit=self.limit,
            )
            if split == "train" and self.shuffle_buffer_size is not None
            else self._cached(split, folder / split, accelerator, overwrite_cache, overwrite_others)
            for split in self.splits
        }

    def _cached(
        self, split: str, folder: Path, accelerator: Accelerator, anew: bool, others_anew: bool
    ) -> GridDataset:
        table, manifest = self.splits[split], self.manifests[split]
        is_missing = anew or not folder.exists() or (others_anew and not is_cache(folder, manifest))
        accelerator.wait_for_everyone()  # all have seen that there is no cache yet
        if is_missing:
            rank, processes = accelerator.process_index, accelerator.num_processes
            share, before = split_dataset_by_node(table, rank, processes), 0
            if self.shuffle_buffer_size is None:
                before = sum(len(split_dataset_by_node(table, i, processes)) for i in range(rank))
            options = self.read_options(split)
            options |= {"shape": manifest.shape, "first_index": before}
            if split == "train":
                options["num_crops"] = self.num_crops
            images = read_images(share, **options)
            is_flipped = self.random_flip and split == "train"
            write_cache(folder, manifest, pixel_batches(images, is_flipped), accelerator.state)
        return GridDataset(folder, manifest)


def _first_files(table: Table, column: str, count: int = 8) -> int:
    """The CRC-32 of the first images' files."""
    checksum = 0
    for row in islice(encoded(table, column), count):
        with suppress(OSError):  # it is left out when it is read
            checksum = zlib.crc32(file_of(row[column]), checksum)
    return checksum


def image_mode(table: Table, column: str, settings: DataSettings) -> tuple[str, bool]:
    """ "L" or "RGB", and whether that is settled for images that are otherwise, too.

    It is what the settings say, or the data set's own `Image(mode=)`; else "RGB" if any of the
    images has color of those that are inspected, spread evenly over the table.
    """
    if settings.image_mode is not None:
        return settings.image_mode, True
    feature = (table.features or {}).get(column)
    stated = getattr(feature, "mode", None)
    if stated is not None:
        return ("L" if stated in GRAY_MODES else "RGB"), True
    files = encoded(table, column)
    if isinstance(files, datasets.Dataset):
        inspected = files.select(range(0, len(files), max(1, len(files) // NUM_INSPECTED)))
    else:
        inspected = files.take(NUM_INSPECTED_OF_STREAM)
    for row in inspected:
        try:
            with PIL.Image.open(BytesIO(file_of(row[column]))) as image:  # its header alone
                if not is_gray(image):
                    return "RGB", False
        except Exception:  # each format has errors of its own; the file is named when it is read
            continue
    return "L", False


def _first_image(table: Table, column: str, mode: str, settings: DataSettings) -> tuple[int, ...]:
    """The shape (C, H, W) of the first image that can be read.

    Raises:
        ValueError: there is none.
    """
    limit, reason = settings.max_image_pixels, "no image"
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
    """Open a data set; the first image of its training split settles the size.

    Args:
        images: what is at hand, in place of a name in the settings.

    Raises:
        ValueError: no such data set, or no image in it that can be read.
    """
    limits = {"train": settings.max_train_samples, "test": settings.max_eval_samples}
    loaded, streaming = load_images(settings, images), settings.streaming
    splits, notes = loaded.splits, loaded.notes
    column = find_image_column(splits["train"], settings.image_column)
    classes = find_classes(splits, settings.label_column)
    window = settings.shuffle_buffer_size
    for split, limit in limits.items():
        if streaming:
            limit = limit or {"test": STREAMED_EVAL_SAMPLES}.get(split)
            if limit:  # of sorted files too: their order is shuffled, then images in a buffer
                shuffled = splits[split].shuffle(seed=0, buffer_size=window)
                splits[split] = shuffled.take(limit)
            continue
        if limit is not None and limit < len(splits[split]):  # image folders are sorted by class
            splits[split] = splits[split].shuffle(seed=0).select(range(limit))
        if split == "test":
            splits[split] = splits[split].shuffle(seed=0)  # the pictures show its beginning
    mode, is_settled = image_mode(splits["train"], column, settings)
    shape = _first_image(splits["train"], column, mode, settings)
    if settings.random_colours and shape[0] == 1:
        raise ValueError("expected random_colours=False of gray pictures, got True")
    dataset, manifests = settings.dataset_name or settings.train_data_dir or "images", {}
    if Path(dataset).expanduser().exists():  # however its path is written
        dataset = str(Path(dataset).expanduser().resolve())
    for split, table in splits.items():
        if not streaming:
            content = table._fingerprint
        else:  # which has no name of its content: its first files stand for it
            content = f"stream of {limits[split]}, {settings.dataset_config_name}, "
            content += f"{settings.train_split}, {settings.eval_split}, {settings.eval_fraction}, "
            content += f"{window}, {_first_files(table, column):08x}"
        varied = f"{settings.random_flip and split == 'train'}"
        if split == "train" and settings.num_crops > 1:
            varied += f", {settings.num_crops} crops"
        manifests[split] = Manifest(
            weights="",
            dataset=f"{dataset} ({content}; {column}, {classes.column}, "
            f"{settings.max_image_pixels}; {settings.resolution}, {settings.center_crop}, "
            f"{varied})",
            split=split,
            shape=shape,
            num_values=NUM_PIXEL_VALUES,
        )
    options = {
        "image_column": column,
        "label_column": classes.column,
        "resolution": settings.resolution,
        "center_crop": settings.center_crop,
        "max_image_pixels": settings.max_image_pixels,
        "may_drop_color": is_settled,
    }
    return Source(
        splits,
        manifests,
        classes,
        options,
        [*notes, _use(splits, shape, classes)],
        settings.random_flip,
        settings.num_crops,
        Augmentation(settings.random_rotation, settings.random_colours),
        window if streaming else None,
        limits["train"],
    )


def _use(splits: dict[str, Table], shape: tuple[int, ...], classes: Classes) -> str:
    """What is used of a data set, in words."""
    counts = [
        f"{len(table) if isinstance(table, datasets.Dataset) else 'a stream'} to {verb}"
        for verb, table in (("train", splits["train"]), ("evaluate", splits["test"]))
    ]
    channels, height, width = shape
    names = ", ".join(classes.names[:10]) + (", …" if len(classes.names) > 10 else "")
    labels = f"{len(classes.names)} classes ({names})" if classes.names else "no classes"
    return f"images used: {', '.join(counts)}, {height}×{width} in mode {MODES[channels]}; {labels}"
