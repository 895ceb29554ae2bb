"""A data set's grids (pixels or codes) on disk: Arrow shards, memory-mapped, and a manifest.

A cache says what it is. `manifest.json` names the weights that made the codes, the data set, the
split, the shape and the count; opening a cache that is not the expected one is an error. A cache
is written under a temporary name and renamed, so it is complete or absent.
"""

import copy
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import torch
from accelerate import PartialState
from datasets.arrow_writer import ArrowWriter
from torch import Tensor

from ..serialization import read_json
from .classes import NO_LABEL

FORMAT = 2
_REMADE = "the cache is damaged, delete its folder and it is made again"
_FEATURES = datasets.Features(
    {
        "grid": datasets.Value("binary"),
        "label": datasets.Value("int64"),
        "crc": datasets.Value("uint32"),  # of the grid: a disk may lie
    }
)


@dataclass(frozen=True)
class Manifest:
    """What a cache holds.

    Args:
        weights: fingerprint of the encoders and codebooks that made the codes; "" for pixels.
        dataset: name and fingerprint of the data set.
        split: its split.
        shape: of one grid, (C, H, W) for pixels and (H, W) for codes.
        num_values: entries are 0 … num_values − 1.
        format: version of the files.
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
    state: PartialState | None = None,
) -> None:
    """Write batches of (grids int64 (b, *shape), labels int64 (b,)) as the cache `folder`.

    Memory does not grow with the number of batches. A label of −1 says that there is none.

    Args:
        state: of Accelerate. Each process writes the batches that it is given as a shard of its
            own, in the order of their ranks, and all call this; `None` for one process alone.
    """
    folder, rank, size = Path(folder), 0, 1
    if state is not None:
        rank, size = state.process_index, state.num_processes
    is_main, shards = rank == 0, [f"grids-{i:05d}-of-{size:05d}.arrow" for i in range(size)]
    temporary = folder.with_name(folder.name + ".incomplete")
    if is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    if state is not None:
        state.wait_for_everyone()
    writer = ArrowWriter(path=str(temporary / shards[rank]), features=_FEATURES)
    for grids, labels in batches:
        array = grids.numpy().astype(manifest.dtype).reshape(len(grids), -1)
        rows = [row.tobytes() for row in array]
        crcs = [zlib.crc32(row) for row in rows]
        writer.write_batch({"grid": rows, "label": labels.tolist(), "crc": crcs})
    writer.finalize()
    if state is not None:
        state.wait_for_everyone()
    if is_main:
        count = sum(len(datasets.Dataset.from_file(str(temporary / shard))) for shard in shards)
        if not count:
            raise ValueError(f"expected at least one example in split {manifest.split!r}, got none")
        contents = {**asdict(manifest), "num_examples": count, "shards": shards}
        (temporary / "manifest.json").write_text(json.dumps(contents, indent=2))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    if state is not None:
        state.wait_for_everyone()


class GridDataset(torch.utils.data.Dataset):
    """A cache as a torch data set: `dataset[i]` is {"grid": (*shape), "label": int, "index": i}.

    Batches are read at once (`__getitems__`), from the memory map.

    Raises:
        ValueError: no cache in `folder`, or one whose manifest is not `expected`.
    """

    def __init__(self, folder: str | Path, expected: Manifest | None = None):
        self.folder, path = folder, Path(folder) / "manifest.json"
        if not path.is_file():
            raise ValueError(f"expected a code cache in {folder}, got no manifest.json")
        contents = read_json(path, _REMADE)
        try:
            self.num_examples, shards = contents.pop("num_examples"), contents.pop("shards")
            self.manifest = Manifest(**{**contents, "shape": tuple(contents["shape"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"expected a manifest in {path}, got {error!r}: {_REMADE}") from error
        if expected is not None and self.manifest != expected:
            ours, theirs = asdict(self.manifest), asdict(expected)
            different = [name for name in theirs if theirs[name] != ours[name]]
            raise ValueError(
                f"the code cache {folder} is not the one asked for: expected "
                f"{ {name: theirs[name] for name in different} }, got "
                f"{ {name: ours[name] for name in different} }; "
                f"run the phase that made it again (for pixels pass --overwrite_cache)"
            )
        try:
            tables = [datasets.Dataset.from_file(str(Path(folder) / shard)) for shard in shards]
            self.table = datasets.concatenate_datasets(tables)
            found = str(len(self.table))
        except (OSError, TypeError, ValueError, pyarrow.ArrowInvalid) as error:
            found = str(error)
        if found != str(self.num_examples):
            raise ValueError(
                f"expected {self.num_examples} examples in {folder}, got {found}: {_REMADE}"
            )

    def __len__(self) -> int:
        return self.num_examples

    @property
    def has_labels(self) -> bool:
        """Whether any image has a class id."""
        return max(self.table.unique("label"), default=NO_LABEL) != NO_LABEL

    def batch(self, indices: slice | list[int]) -> tuple[Tensor, Tensor]:
        """(grids int64 (b, *shape), labels int64 (b,)).

        Raises:
            ValueError: a grid that is not what was written.
        """
        rows = self.table[indices]
        if [zlib.crc32(grid) for grid in rows["grid"]] != rows["crc"]:
            raise ValueError(
                f"expected the grids that were written to {self.folder}, got others: {_REMADE}"
            )
        values = np.frombuffer(b"".join(rows["grid"]), self.manifest.dtype)
        grids = torch.from_numpy(values.reshape(-1, *self.manifest.shape).astype(np.int64))
        return grids, torch.tensor(rows["label"])

    def share(self, rank: int, world_size: int) -> "GridDataset":
        """The rows of process `rank`, which follow those of the process before."""
        part = copy.copy(self)
        part.table = self.table.shard(world_size, rank, contiguous=True)
        part.num_examples = len(part.table)
        return part

    def sample(self, count: int, seed: int) -> Tensor:
        """`count` random grids, or all if there are fewer: int64 (b, *shape)."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(self), generator=generator)[:count]
        return self.batch(rows.tolist())[0]

    def random_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Without an end, drawn with torch's global generator."""
        while True:
            yield self.batch(torch.randint(len(self), (batch_size,)).tolist())

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self), batch_size):
            yield self.batch(slice(start, start + batch_size))

    def __getitems__(self, indices: list[int]) -> list[dict]:
        grids, labels = self.batch(indices)
        rows = zip(grids, labels, indices, strict=True)
        return [{"grid": g, "label": y, "index": i} for g, y, i in rows]

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]


def cached(
    folder: str | Path, manifest: Manifest, batches: Iterable[tuple[Tensor, Tensor]]
) -> GridDataset:
    """The cache `folder`; where that is not what `manifest` says, `batches` are written there
    first."""
    if not is_cache(folder, manifest):
        write_cache(folder, manifest, batches)
    return GridDataset(folder, manifest)


def is_cache(folder: str | Path, manifest: Manifest) -> bool:
    """Whether the folder holds what the manifest says."""
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
        self.grids, self.codes = grids, codes

    def __len__(self) -> int:
        return len(self.grids)

    def __getitems__(self, indices: list[int]) -> list[dict]:
        examples, codes = self.grids.__getitems__(indices), self.codes.batch(indices)[0]
        return [{**example, "codes": z} for example, z in zip(examples, codes, strict=True)]

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]
