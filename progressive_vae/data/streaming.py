"""Images that are read as they come: a data set that does not fit a disk."""

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
    """The pixels of a stream, as `GridDataset` has those of a cache.

    As an iterable it has no end: the images pass again and again, in another order each time,
    shuffled within a window. `batches` passes once, in the order of the files.

    Args:
        table: the stream. Its files are shared out among processes and the workers of their
            loaders; where their number is no multiple of that of the processes, each process reads
            all and leaves out what is not its own.
        random_flip: mirror each image with probability ½.
        forms: in one of which each image comes; of `batches`, as they are.
        buffer_size: images in the window; they are held as encoded files.
        limit: images that the stream has at most, where that is known.
        options: further arguments of `read_images`.
    """

    num_examples = None  # unknown

    def __init__(
        self,
        table: datasets.IterableDataset,
        manifest: Manifest,
        random_flip: bool = False,
        forms: Augmentation = IDENTITY,
        buffer_size: int = 1000,
        limit: int | None = None,
        **options,
    ):
        self.table, self.manifest, self.random_flip = table, manifest, random_flip
        self.forms = forms
        self.options: dict[str, Any] = {"shape": manifest.shape, **options}
        self.buffer_size, self.limit, self.rank, self.seed = buffer_size, limit, 0, 0

    def share(self, rank: int, world_size: int) -> "PixelStream":
        """The part of process `rank`."""
        part = copy.copy(self)
        part.table, part.rank = split_dataset_by_node(self.table, rank, world_size), rank
        return part

    def begin_at(self, epoch: int, start: int):
        """Begin anew, in an order that depends on `epoch` and on `start`, the number of images
        that a training has seen of it: a stream is not wound forward."""
        self.seed = epoch + start

    def sample(self, count: int, seed: int) -> Tensor:
        """The first images in the order of a seed, `count` unless the stream has fewer: int64
        (b, C, H, W)."""
        shuffled = self.table.shuffle(seed=seed, buffer_size=max(count, self.buffer_size))
        return next(pixel_batches(read_images(shuffled, **self.options), batch_size=count))[0]

    def random_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in torch.utils.data.DataLoader(self, batch_size):
            yield batch["grid"], batch["label"]

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        return pixel_batches(read_images(self.table, **self.options), self.random_flip, batch_size)

    def __iter__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        generator = torch.Generator().manual_seed(
            self.seed + 1000 * self.rank + (worker.id if worker else 0)
        )
        epoch, is_empty, forms = self.seed, False, self.forms.of(self.manifest.shape)
        while not is_empty:
            is_empty = True
            table = self.table.shuffle(seed=epoch, buffer_size=self.buffer_size)
            for array, label in read_images(table, **self.options):
                is_empty = False
                grid = torch.from_numpy(array.astype(np.int64))
                if len(forms) > 1:
                    grid = augment(grid, forms[torch.randint(len(forms), (), generator=generator)])
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
