"""A data set of images, opened: what its images are, and their pixels as caches or as a stream."""

import zlib
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from datasets.distributed import split_dataset_by_node

from ..configuration import NUM_PIXEL_VALUES
from .codes import GridDataset, Manifest, is_cache, write_cache
from .data import (
    GREY_MODES,
    Images,
    Table,
    decode,
    encoded,
    file_of,
    find_image_column,
    find_labels,
    load_images,
    pixel_batches,
    prepare_image,
    read_images,
)
from .forms import AS_THEY_ARE, Forms
from .settings import DataSettings
from .streaming import PixelStream

STREAMED_EVAL_SAMPLES = 10_000  # of a stream, whose end may be far


@dataclass
class Source:
    """The splits "train" and "test", of which no more than the first image has been read.

    Args:
        splits: their tables.
        manifests: what the caches of their pixels hold.
        class_names: names of the classes, [] where there are none.
        options: of `read_images`.
        random_flip: of the training split, as is
        num_crops: squares out of each image.
        forms: in which the finest level sees its images.
        shuffle_buffer_size: images in the window of a stream; `None` if it is none.
        limit: images of the training split at most, where that was asked for.
    """

    splits: dict[str, Table]
    manifests: dict[str, Manifest]
    class_names: list[str]
    options: dict[str, Any]
    random_flip: bool = False
    num_crops: int = 1
    forms: Forms = AS_THEY_ARE
    shuffle_buffer_size: int | None = None
    limit: int | None = None

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
                **self.options,
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
            options = {**self.options, "shape": manifest.shape, "first_index": before}
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


def open_source(settings: DataSettings, images: Images | None = None) -> Source:
    """Open a data set; the first image of its training split settles colours and size.

    Args:
        images: what is at hand, in place of a name in the settings.

    Raises:
        ValueError: no such data set, or no image in it that can be read.
    """
    limits = {"train": settings.max_train_samples, "test": settings.max_eval_samples}
    splits, streaming = load_images(settings, images), settings.streaming
    window = settings.shuffle_buffer_size
    sizes = settings.resolution, settings.center_crop
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
    column = find_image_column(splits["train"], settings.image_column)
    label_name, class_names = find_labels(splits, settings.label_column)
    values = (row[column] for row in encoded(splits["train"], column))
    decoded = (decode(value, settings.max_image_pixels) for value in values)
    image = next((image for image in decoded if image is not None), None)
    if image is None:
        raise ValueError(f"expected images in column {column!r}, got none that can be read")
    mode = "L" if image.mode in GREY_MODES else "RGB"
    shape = prepare_image(image, mode, *sizes).shape
    if settings.random_colours and shape[0] == 1:
        raise ValueError("expected random_colours=False of grey pictures, got True")
    dataset, manifests = settings.dataset_name or settings.train_data_dir or "images", {}
    if Path(dataset).exists():  # however its path is written
        dataset = str(Path(dataset).resolve())
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
            dataset=f"{dataset} ({content}; {column}, {label_name}, "
            f"{settings.max_image_pixels}; {sizes[0]}, {sizes[1]}, {varied})",
            split=split,
            shape=shape,
            num_values=NUM_PIXEL_VALUES,
        )
    options = {
        "image_column": column,
        "label_column": label_name,
        "resolution": settings.resolution,
        "center_crop": settings.center_crop,
        "max_image_pixels": settings.max_image_pixels,
    }
    return Source(
        splits,
        manifests,
        class_names,
        options,
        settings.random_flip,
        settings.num_crops,
        Forms(settings.random_rotation, settings.random_colours),
        window if streaming else None,
        limits["train"],
    )
