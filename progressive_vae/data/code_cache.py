"""Cache of a dataset's grids (pixels or codes): memory-mapped Arrow shards and a manifest.

`manifest.json` identifies the weights that encoded the grids, the dataset, the split, the shape and
the number of examples; opening a cache with another manifest is an error. A cache is written under
a temporary name and renamed, so it is complete or absent.
"""

import copy
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import torch
from accelerate import Accelerator
from datasets.arrow_writer import ArrowWriter
from torch import Tensor

from ..serialization import read_json
from .classes import NO_LABEL

FORMAT = 2
_REMEDY = "the cache is damaged: delete its folder, and it is written again"
_FEATURES = datasets.Features(
    {
        "grid": datasets.Value("binary"),
        "label": datasets.Value("int64"),
        "caption": datasets.Value("int64"),  # −1 for none; not in caches of earlier versions
        "crc": datasets.Value("uint32"),  # of the grid, to detect damage of the disk
    }
)


@dataclass(frozen=True)
class Manifest:
    """The identity of a cache.

    Args:
        weights: fingerprint of the encoders and codebooks of the codes; "" for pixels.
        dataset: name and fingerprint of the dataset.
        split: "train" or "test".
        shape: of one grid, (C, H, W) for pixels and (H, W) for codes.
        num_values: entries are 0 … num_values − 1.
        format: version of the file format.
    """

    weights: str
    dataset: str
    split: str
    shape: tuple[int, ...]
    num_values: int
    format: int = FORMAT

    @property
    def dtype(self) -> np.dtype:
        return np.min_scalar_type(self.num_values - 1)


def write_cache(
    folder: str | Path,
    manifest: Manifest,
    batches: Iterable[tuple[Tensor, Tensor]],
    accelerator: Accelerator | None = None,
) -> None:
    """Write batches as the cache `folder`.

    Memory does not grow with the number of batches.

    Args:
        batches: grids int64 (b, *shape), and labels int64 (b,), −1 for no label; or (b, 2), class
            ids and caption ids.
        accelerator: if all processes call this: each writes its batches as one shard, and
            shards are ordered by rank. `None` for a single process.

    Raises:
        ValueError: `folder` has other files, which would be lost.
    """
    folder = Path(folder)
    others = [path.name for path in folder.glob("*") if path.suffix not in (".arrow", ".json")]
    if others:
        raise ValueError(f"expected a folder for a cache in {folder}, got one with {others[:3]}")
    rank = 0 if accelerator is None else accelerator.process_index
    num_shards = 1 if accelerator is None else accelerator.num_processes
    is_main = rank == 0
    shards = [f"grids-{i:05d}-of-{num_shards:05d}.arrow" for i in range(num_shards)]
    temporary = folder.with_name(folder.name + ".incomplete")
    if is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    writer = ArrowWriter(path=str(temporary / shards[rank]), features=_FEATURES)
    for grids, labels in batches:
        array = grids.numpy().astype(manifest.dtype).reshape(len(grids), -1)
        rows = [row.tobytes() for row in array]
        crcs = [zlib.crc32(row) for row in rows]
        if labels.ndim == 1:
            labels = torch.stack([labels, torch.full_like(labels, NO_LABEL)], 1)
        class_ids, captions = labels.T.tolist()
        writer.write_batch({"grid": rows, "label": class_ids, "caption": captions, "crc": crcs})
    writer.finalize()
    if accelerator is not None:
        accelerator.wait_for_everyone()
    if is_main:
        count = sum(len(datasets.Dataset.from_file(str(temporary / shard))) for shard in shards)
        if not count:
            raise ValueError(f"expected at least one example in split {manifest.split!r}, got none")
        contents = {**asdict(manifest), "num_examples": count, "shards": shards}
        (temporary / "manifest.json").write_text(json.dumps(contents, indent=2))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    if accelerator is not None:
        accelerator.wait_for_everyone()


class GridDataset(torch.utils.data.Dataset):
    """A cache as a torch dataset: `dataset[i]` is {"grid": (*shape), "label": int, "index": i}.

    The grid is uint8 for pixels and int64 for codes. A loader reads each batch with one access to
    the memory map (`__getitems__`).

    Raises:
        ValueError: no cache in `folder`, or one whose manifest is not `expected`.
    """

    def __init__(self, folder: str | Path, expected: Manifest | None = None):
        self.folder = folder
        path = Path(folder) / "manifest.json"
        if not path.is_file():
            raise ValueError(f"expected a code cache in {folder}, got no manifest.json")
        contents = read_json(path, _REMEDY)
        try:
            self.num_examples = contents.pop("num_examples")
            shards = contents.pop("shards")
            self.manifest = Manifest(**{**contents, "shape": tuple(contents["shape"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"expected a manifest in {path}, got {error!r}: {_REMEDY}") from error
        if expected is not None and self.manifest != expected:
            actual_fields = asdict(self.manifest)
            expected_fields = asdict(expected)
            different = [
                name for name in expected_fields if expected_fields[name] != actual_fields[name]
            ]
            raise ValueError(
                f"the code cache {folder} has another manifest: expected "
                f"{ {name: expected_fields[name] for name in different} }, got "
                f"{ {name: actual_fields[name] for name in different} }; "
                f"run again the phase that writes it (for pixels pass --overwrite_cache)"
            )
        try:
            tables = [datasets.Dataset.from_file(str(Path(folder) / shard)) for shard in shards]
            self.table = datasets.concatenate_datasets(tables)
            actual = str(len(self.table))
        except (OSError, TypeError, ValueError, pyarrow.ArrowInvalid) as error:
            actual = str(error)
        if actual != str(self.num_examples):
            raise ValueError(
                f"expected {self.num_examples} examples in {folder}, got {actual}: {_REMEDY}"
            )

    def __len__(self) -> int:
        return self.num_examples

    @property
    def has_labels(self) -> bool:
        """Return whether any image has a class id."""
        return max(self.table.unique("label"), default=NO_LABEL) != NO_LABEL

    @cached_property
    def captions(self) -> Tensor:
        """The id of each image's caption, int64 (n,), −1 for none."""
        return torch.tensor(self.table["caption"][:])

    def batch(self, indices: slice | list[int]) -> tuple[Tensor, Tensor]:
        """Return grids int64 (b, *shape), and labels int64 (b,).

        Raises:
            ValueError: a grid whose checksum is wrong.
        """
        values, labels = self._read(indices)
        return torch.from_numpy(values.astype(np.int64)), labels

    def _read(self, indices: slice | list[int]) -> tuple[np.ndarray, Tensor]:
        """Return grids as they are stored (b, *shape), and labels int64 (b,)."""
        rows = self.table[indices]
        if [zlib.crc32(grid) for grid in rows["grid"]] != rows["crc"]:
            raise ValueError(
                f"expected the grids that were written to {self.folder}, got others: {_REMEDY}"
            )
        values = np.frombuffer(bytearray().join(rows["grid"]), self.manifest.dtype)
        return values.reshape(-1, *self.manifest.shape), torch.tensor(rows["label"])

    def share(self, rank: int, world_size: int) -> "GridDataset":
        """Return the contiguous shard of process `rank`."""
        part = copy.copy(self)
        part.table = self.table.shard(world_size, rank, contiguous=True)
        part.num_examples = len(part.table)
        return part

    def sample(self, count: int, seed: int) -> Tensor:
        """Return `count` random grids, or all if there are fewer: int64 (b, *shape)."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(self), generator=generator)[:count]
        return self.batch(rows.tolist())[0]

    def random_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield random batches endlessly, sampled with torch's global generator."""
        while True:
            yield self.batch(torch.randint(len(self), (batch_size,)).tolist())

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self), batch_size):
            yield self.batch(slice(start, start + batch_size))

    def __getitems__(self, indices: list[int]) -> list[dict]:
        values, labels = self._read(indices)
        # Pixels are copied to the device as bytes: int64 would be eight times as many.
        is_pixels = len(self.manifest.shape) == 3
        grids = torch.from_numpy(values if is_pixels else values.astype(np.int64))
        rows = zip(grids, labels, indices, strict=True)
        return [{"grid": g, "label": y, "index": i} for g, y, i in rows]

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]


def cached(
    folder: str | Path, manifest: Manifest, batches: Iterable[tuple[Tensor, Tensor]]
) -> GridDataset:
    """Return the cache `folder`; unless it has this manifest, write `batches` there first."""
    if not is_cache(folder, manifest):
        write_cache(folder, manifest, batches)
    return GridDataset(folder, manifest)


def is_cache(folder: str | Path, manifest: Manifest) -> bool:
    """Return whether the folder is a cache with this manifest."""
    try:
        GridDataset(folder, manifest)
    except ValueError:
        return False
    return True


class PairedDataset(torch.utils.data.Dataset):
    """Grids and the codes of each: `dataset[i]` is {"grid", "label", "index", "codes"}."""

    def __init__(self, grids: GridDataset, codes: GridDataset):
        if len(grids) != len(codes):
            raise ValueError(f"expected {len(grids)} codes, one for each grid, got {len(codes)}")
        self.grids = grids
        self.codes = codes

    def __len__(self) -> int:
        return len(self.grids)

    def __getitems__(self, indices: list[int]) -> list[dict]:
        examples = self.grids.__getitems__(indices)
        codes, _ = self.codes.batch(indices)
        return [{**example, "codes": z} for example, z in zip(examples, codes, strict=True)]

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]
