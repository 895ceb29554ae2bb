"""Streaming: images that are read on the fly, for datasets larger than a disk."""

import copy
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torch import Tensor

from .augmentation import IDENTITY, Augmentation, augment
from .code_cache import Manifest
from .dataset import pixel_batches, read_images


class PixelStream(torch.utils.data.IterableDataset):
    """The pixels of a stream, with the interface of `GridDataset`.

    As an iterable it is endless: each epoch shuffles the images in another order, within a buffer.
    `batches` is one epoch in the order of the files.

    Args:
        table: the stream. Its files are split among processes and the workers of their loaders; if
            their number is not a multiple of the number of processes, each process reads all files
            and skips the images of other processes.
        random_flip: flip each image horizontally with probability ½.
        augmentation: one random transform is applied to each image, except by `batches`.
        buffer_size: images in the shuffle buffer, which holds encoded files.
        limit: upper bound of the number of images, if there is one.
        options: further arguments of `read_images`.
    """

    num_examples = None  # unknown until the stream ends

    def __init__(
        self,
        table: datasets.IterableDataset,
        manifest: Manifest,
        random_flip: bool = False,
        augmentation: Augmentation = IDENTITY,
        buffer_size: int = 1000,
        limit: int | None = None,
        **options,
    ):
        self.table = table
        self.manifest = manifest
        self.random_flip = random_flip
        self.augmentation = augmentation
        self.buffer_size = buffer_size
        self.limit = limit
        self.options: dict[str, Any] = {"shape": manifest.shape, **options}
        self.rank = 0
        self.seed = 0

    def share(self, rank: int, world_size: int) -> "PixelStream":
        """Return the shard of process `rank`."""
        part = copy.copy(self)
        part.table = split_dataset_by_node(self.table, rank, world_size)
        part.rank = rank
        return part

    def begin_at(self, epoch: int, start: int):
        """Set the order of the images for an epoch that resumes after `start` images.

        A stream cannot skip images cheaply, so a resumed epoch restarts in another order.
        """
        self.seed = epoch + start

    def sample(self, count: int, seed: int) -> Tensor:
        """Return `count` shuffled images, or all if there are fewer: int64 (b, C, H, W)."""
        shuffled = self.table.shuffle(seed=seed, buffer_size=max(count, self.buffer_size))
        return next(pixel_batches(read_images(shuffled, **self.options), batch_size=count))[0]

    def random_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in torch.utils.data.DataLoader(self, batch_size):
            yield batch["grid"].long(), batch["label"]

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        return pixel_batches(read_images(self.table, **self.options), self.random_flip, batch_size)

    def __iter__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        generator = torch.Generator().manual_seed(
            self.seed + 1000 * self.rank + (worker.id if worker else 0)
        )
        transforms = self.augmentation.transforms(self.manifest.shape)
        epoch = self.seed
        is_empty = False
        while not is_empty:
            is_empty = True
            table = self.table.shuffle(seed=epoch, buffer_size=self.buffer_size)
            for array, label in read_images(table, **self.options):
                is_empty = False
                grid = torch.from_numpy(array.astype(np.uint8))
                if len(transforms) > 1:
                    choice = int(torch.randint(len(transforms), (), generator=generator))
                    grid = augment(grid, transforms[choice])
                if self.random_flip and torch.rand((), generator=generator) < 0.5:
                    grid = grid.flip(-1)
                index = int(torch.randint(2**62, (), generator=generator))
                yield {"grid": grid, "label": label, "index": index}
            epoch += 1
        if worker is None:
            raise ValueError(
                f"expected images in split {self.manifest.split!r}, got none for process "
                f"{self.rank}"
            )
