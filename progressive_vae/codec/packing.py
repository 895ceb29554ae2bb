"""`pack`: the files of a folder into an archive, each in the shortest way that loses nothing.

sources -> items -> tiles -> streams of the model -> parts of a container
"""

import errno
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..stack import LevelStack
from . import codec, container, tiles
from .archive_table import (
    ABSENT,
    CHECKSUM_SIZE,
    CHUNK,
    FOLDER,
    PLAIN,
    PNG,
    TO_PNG,
    ZSTD,
    Entry,
    Progress,
    from_table,
    header_of,
    to_table,
)
from .container import ArchiveWriter
from .exact_image import SIGNATURE, ExactImage, read_exact_image
from .folder import MAX_NAME, Source, reason_of, source_of_file
from .tile_coder import Journal, TileCoder
from .tiles import TileCode

MAX_IMAGE_FILE = 2**27
# A part ends behind the file with which it has so many tiles, bytes or files.
PART_TILES = 1024
PART_BYTES = 2**23
PART_FILES = 4096


@dataclass
class Item:
    """A file that is being packed, or a chunk of one."""

    source: Source
    contents: bytes
    start: int = 0  # of the chunk in the file
    remaining: int = 0  # chunks behind it
    reason: str = ""
    stored: list[tuple[str, bytes]] = field(default_factory=list)  # method and bytes of each chunk
    image: ExactImage | None = None
    method: str = PNG
    codes: list[TileCode] = field(default_factory=list)
    places: list[int] = field(default_factory=list)  # of tiles that wait for the model
    length: int = 0  # of the image so far

    @property
    def stored_length(self) -> int:
        return sum(len(data) for _, data in self.stored)

    def rows(self) -> Iterator[tuple[Entry, bytes]]:
        """Rows of the table, and their bytes."""
        name = self.source.name
        rest = (self.source.permissions, self.source.modified, self.reason)
        if self.image is not None:
            data = tiles.image_to_bytes(self.image, self.codes)
            yield Entry(name, self.method, len(data), len(self.contents), 0, 0, *rest), data
            return
        starts = range(0, max(1, len(self.contents)), CHUNK)
        for k, (start, (method, data)) in enumerate(zip(starts, self.stored, strict=True)):
            size = len(self.contents[start : start + CHUNK])
            remaining = self.remaining + len(self.stored) - k - 1
            yield Entry(name, method, len(data), size, self.start + start, remaining, *rest), data


class Packing(NamedTuple):
    """What `pack` did."""

    counts: Counter  # of files by (method, reason)
    absent: list[tuple[str, str]]  # names and reasons
    changed: list[str]  # names of files that changed after they were packed
    num_wrong: int


def pack(
    stack: LevelStack,
    sources: list[Source],
    path: Path,
    model: str = "",
    arithmetic: str = "integer",
    verify: bool = True,
    progress: Progress = lambda count: None,
) -> Packing:
    """Write the files into an archive, or continue to.

    Args:
        stack: the model.
        sources: the files.
        path: of the archive; until it is complete it has the suffix ".partial".
        model: the model's name, for readers.
        arithmetic: "integer", or "float" for readers on the same kind of machine.
        verify: decode each stream, and read each part from the disk.
        progress: is called with numbers of bytes of the sources.

    Raises:
        ValueError: a file at `path`; or one at `{path}.partial` of other settings or other files.
    """
    stack.require_prior()
    codec.check_arithmetic(arithmetic)
    header = header_of(stack, model, arithmetic)
    identity = ("format", "weights", "image_shape", "arithmetic", "computed")
    with ArchiveWriter(path, header, identity) as writer:
        rows = [row for part in writer.parts for row in from_table(part.table, part.length)]
        first, chunk = _continuation(rows, sources, writer.partial)
        progress(sum(row.size for row in rows))
        journal = Journal(path.with_name(f"{path.name}.journal"))
        coder = TileCoder(stack, arithmetic == "integer", journal)
        taken = {source.name for source in sources}
        items = _items(sources[first:], chunk, stack, taken)
        for group in _groups(items):
            num_bytes = _encode_images(group, coder, verify, progress)
            if verify:
                _check_images(group, stack.image_shape)
            pairs = [pair for item in group for pair in item.rows()]
            entries = [entry for entry, _ in pairs]
            data = b"".join(data for _, data in pairs)
            writer.append(to_table(entries), data)
            journal.clear()
            rows += entries
            progress(sum(entry.size for entry in entries) - num_bytes)
        writer.finish()
    return Packing(
        Counter((row.method, row.reason) for row in rows if not row.remaining),
        [(row.name, row.reason) for row in rows if row.method == ABSENT],
        [source.name for source in sources if not _is_unchanged(source)],
        coder.num_wrong,
    )


def _continuation(rows: list[Entry], sources: list[Source], partial: Path) -> tuple[int, int]:
    """How many sources the rows of a `partial` hold, and how many chunks of the next one.

    Raises:
        ValueError: rows of other files, or of files that have changed.
    """
    count = 0
    chunks = 0
    size = 0
    for row in rows:
        source = sources[count] if count < len(sources) else None
        size += row.size
        is_absent = row.method == ABSENT
        if (
            source is None
            or source.name != row.name
            or not is_absent
            and (row.modified != source.modified or not row.remaining and size != source.size)
        ):
            raise ValueError(
                f"expected the files with which {partial} was begun, got others: {row.name!r} has "
                "changed, or another file has its place. Delete it to start again"
            )
        chunks += 1
        if not row.remaining:
            count += 1
            chunks = 0
            size = 0
    return count, chunks


def _is_unchanged(source: Source) -> bool:
    return source.path is None or source_of_file(source.path, source.name) == source


def _items(
    sources: list[Source], first_chunk: int, stack: LevelStack, taken: set[str]
) -> Iterator[Item]:
    for source in sources:
        if source.problem:
            yield _empty_item(source, ABSENT, source.problem)
        elif source.is_folder:
            yield _empty_item(source, FOLDER, "an empty folder")
        else:
            try:
                with source.open() as file:
                    if source.size <= MAX_IMAGE_FILE:
                        yield _image_item(source, file.read(), stack, taken)
                    else:
                        yield from _chunk_items(source, file, first_chunk)
            except OSError as error:
                yield _empty_item(source, ABSENT, reason_of(error))
        first_chunk = 0


def _empty_item(source: Source, method: str, reason: str) -> Item:
    return Item(source, b"", reason=reason, stored=[(method, b"")])


def _chunk_items(source: Source, file: BinaryIO, first_chunk: int) -> Iterator[Item]:
    file.seek(first_chunk * CHUNK)
    for start in range(first_chunk * CHUNK, source.size, CHUNK):
        stop = min(start + CHUNK, source.size)
        contents = file.read(stop - start)
        if len(contents) < stop - start:
            raise OSError(errno.EIO, "it became shorter while it was read")
        remaining = -(-(source.size - stop) // CHUNK)
        yield Item(source, contents, start, remaining, "a large file", _stored(contents))


def _stored(contents: bytes) -> list[tuple[str, bytes]]:
    """The method and the bytes of each chunk of a file."""
    chunks = []
    for start in range(0, max(1, len(contents)), CHUNK):
        chunk = contents[start : start + CHUNK]
        checksum = zlib.crc32(chunk).to_bytes(CHECKSUM_SIZE, "big")
        compressed = container.compress(chunk)
        is_shorter = len(compressed) < len(chunk)
        chunks.append((ZSTD, checksum + compressed) if is_shorter else (PLAIN, checksum + chunk))
    return chunks


def _image_item(source: Source, contents: bytes, stack: LevelStack, taken: set[str]) -> Item:
    """A file as an image, if that is possible without loss."""
    item = Item(source, contents, stored=_stored(contents))
    channels, *size = stack.image_shape
    try:
        image = read_exact_image(contents)
        tiles.to_channels(image.pixels, channels)
        item.method = PNG if contents.startswith(SIGNATURE) else TO_PNG
        if item.method == TO_PNG:
            _check_target(f"{source.name}.png", taken)
    except ValueError as error:
        item.reason = str(error)
        return item
    item.image = image
    item.codes, item.places = tiles.simple_codes(image.pixels, (size[0], size[1]))
    item.length = len(tiles.image_to_bytes(image, item.codes))
    item.length -= sum(len(item.codes[place].to_bytes()) for place in item.places)
    return item


def _check_target(target: str, taken: set[str]):
    """Raise a `ValueError` unless a file can come back with the name of a PNG file."""
    if len(os.fsencode(target.rpartition("/")[2])) > MAX_NAME:
        raise ValueError("its name is too long for one more suffix")
    if any(name == target or name.startswith(f"{target}/") for name in taken):
        raise ValueError("its PNG file would have the name of another file")


def _groups(items: Iterable[Item]) -> Iterator[list[Item]]:
    """The items of each part."""
    group: list[Item] = []
    num_tiles = 0
    num_bytes = 0
    for item in items:
        group.append(item)
        num_tiles += len(item.places)
        num_bytes += len(item.contents)
        if num_tiles >= PART_TILES or num_bytes >= PART_BYTES or len(group) >= PART_FILES:
            yield group
            group = []
            num_tiles = 0
            num_bytes = 0
    if group:
        yield group


def _encode_images(group: list[Item], coder: TileCoder, verify: bool, progress: Progress) -> int:
    """Choose the shortest way for each image of a part.

    Returns:
        the number of bytes of which `progress` knows: a share of its file for each tile.
    """
    batch: list[tuple[Item, int, Tensor]] = []
    num_bytes = 0
    for item in group:
        if item.image is None:
            continue
        for place in item.places:
            if item.length >= item.stored_length:
                break
            tile = tiles.tile_at(item.image.pixels, place, coder.stack.image_shape)
            batch.append((item, place, tile))
            if len(batch) == coder.batch_size:
                _encode_batch(batch, coder, verify)
                count = sum(len(item.contents) // len(item.places) for item, _, _ in batch)
                progress(count)
                num_bytes += count
                batch = []
    if batch:
        _encode_batch(batch, coder, verify)
    for item in group:
        if item.image is not None and item.length >= item.stored_length:
            item.image = None
            item.reason = "its file is shorter than its streams"
        elif item.image is not None:
            item.reason = "streams are shorter than its file"
    return num_bytes


def _check_images(group: list[Item], shape: tuple[int, int, int]):
    """Read each image of a part from its bytes; one that does not come back is stored as a file.

    Its streams have been decoded before.
    """
    for item in group:
        if item.image is None:
            continue
        checksum, header, codes = tiles.image_from_bytes(
            tiles.image_to_bytes(item.image, item.codes), shape[1:]
        )
        decoded = {
            code.body: tiles.tile_at(item.image.pixels, k, shape).permute(1, 2, 0).numpy()
            for k, code in enumerate(codes)
            if code.kind == tiles.STREAM
        }
        pixels = tiles.join_tiles(header, codes, decoded, shape)
        restored = read_exact_image(ExactImage(pixels, header.before, header.after).to_png())
        is_same = np.array_equal(restored.pixels, item.image.pixels)
        if not is_same or restored[1:] != item.image[1:] or header.checksum(pixels) != checksum:
            item.image = None
            item.reason = "it does not come back from its streams"


def _encode_batch(batch: list[tuple[Item, int, Tensor]], coder: TileCoder, verify: bool):
    keys = [coder.key(tile.numpy().tobytes()) for _, _, tile in batch]
    new = {key: tile for key, (_, _, tile) in zip(keys, batch, strict=True)}
    new = {key: tile for key, tile in new.items() if key not in coder.journal.results}
    if new:
        streams = coder.encode(torch.stack([*new.values()]), verify)
        coder.journal.add(dict(zip(new, streams, strict=True)))
    for key, (item, place, _) in zip(keys, batch, strict=True):
        stream = coder.journal.results[key]
        code = item.codes[place]
        if stream and len(stream) < code.number:
            code = TileCode(tiles.STREAM, len(stream), stream)
        item.codes[place] = code
        item.length += len(code.to_bytes())
