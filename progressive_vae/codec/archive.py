"""An archive of a folder: each file in the shortest way that loses nothing.

    folder -> sources -> items -> tiles -> streams of the model -> parts of a container
    container -> parts -> streams -> tiles -> items -> folder

An image becomes streams of the model where its pixels and metadata come back from them, and where
they are shorter than the file. All else is stored as it is, by zstd where that is shorter. `pack`
decodes each stream before it counts. A killed `pack` or `unpack` continues where it was: streams
and tiles of the part that is being worked on lie in a journal.
"""

import errno
import hashlib
import os
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..models.conditioning import Conditioning
from ..serialization import __version__
from ..stack import LevelStack
from . import codec, container, tiles
from .container import ArchiveReader, ArchiveWriter
from .exact_image import SIGNATURE, ExactImage, read_exact_image
from .folder import MAX_NAME, Source, is_inside, reason_of, safe_name, source_of_file
from .tiles import ImageHeader, TileCode

FORMAT = 1
# How a file is stored.
PNG = "png"  # as an image, which comes back as a PNG file
TO_PNG = "to png"  # the same, with ".png" added to the name
PLAIN = "file"
ZSTD = "zstd"
FOLDER = "folder"
ABSENT = "absent"
IMAGES = (PNG, TO_PNG)
METHODS = (PNG, TO_PNG, PLAIN, ZSTD, FOLDER, ABSENT)

CHUNK = 2**22  # bytes of a file that are stored together
MAX_IMAGE_FILE = 2**27
# A part ends behind the file with which it has so many tiles, bytes or files.
PART_TILES = 1024
PART_BYTES = 2**23
PART_FILES = 4096
CHECKSUM_SIZE = 4
# Files of `unpack` in its folder: the one that is being written, and the journal.
TEMPORARY = ".unpack.incomplete"
JOURNAL = ".unpack.journal"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)

Progress = Callable[[int], None]  # is called with the number of bytes that are done


class Entry(NamedTuple):
    """A file of an archive, or a chunk of one: a row of a part's table.

    Args:
        name: of the file in the folder.
        method: one of `METHODS`.
        length: in the archive, in bytes.
        size: of the file or the chunk, in bytes.
        start: of the chunk in the file.
        remaining: chunks of the same file behind this one.
        permissions: the bits of `chmod`.
        modified: milliseconds since 1970, or `None`.
        reason: why the file is stored in this way.
    """

    name: str
    method: str
    length: int
    size: int
    start: int
    remaining: int
    permissions: int
    modified: int | None
    reason: str

    @property
    def target(self) -> str:
        """The name of the file that `unpack` writes."""
        return f"{self.name}.png" if self.method == TO_PNG else self.name


def to_table(entries: list[Entry]) -> list[list]:
    """Columns, which are shorter than rows when they are compressed."""
    return [list(column) for column in zip(*entries, strict=True)]


def from_table(table: Any, data_length: int) -> list[Entry]:
    """
    Raises:
        ValueError: another table.
    """
    try:
        rows = [Entry(*row) for row in zip(*table, strict=True)]
    except TypeError as error:
        raise ValueError("expected a table of files in the archive, got another") from error
    for row in rows:
        is_row = (
            all(isinstance(text, str) for text in (row.name, row.method, row.reason))
            and all(isinstance(number, int) and number >= 0 for number in row[2:7])
            and isinstance(row.modified, int | None)
            and row.method in METHODS
        )
        if not is_row:
            raise ValueError(f"expected a row of a table of files in the archive, got {row!r:.200}")
    if sum(row.length for row in rows) > data_length:
        raise ValueError("expected files inside the part of an archive, got longer ones")
    return rows


class Journal:
    """Results by keys of 16 bytes, in a file that is read again after a kill.

    Args:
        path: `None`: without a file.
    """

    _HEAD = struct.Struct("<16sII")

    def __init__(self, path: Path | None):
        self.path = path
        self.results = dict[bytes, bytes]()
        self.file: BinaryIO | None = None
        if path is not None and path.is_file():
            self._read(path.read_bytes())

    def _read(self, data: bytes):
        place = 0
        while len(data) - place >= self._HEAD.size:
            key, length, crc = self._HEAD.unpack_from(data, place)
            result = data[place + self._HEAD.size :][:length]
            if len(result) < length or zlib.crc32(result, zlib.crc32(key)) != crc:
                break
            self.results[key] = result
            place += self._HEAD.size + length

    def add(self, results: dict[bytes, bytes]):
        if self.path is None:
            self.results |= results
            return
        if self.file is None:
            self.file = open(self.path, "wb")  # noqa: SIM115
            results = self.results | results
        self.results |= results
        for key, result in results.items():
            crc = zlib.crc32(result, zlib.crc32(key))
            self.file.write(self._HEAD.pack(key, len(result), crc) + result)
        self.file.flush()

    def clear(self):
        """Forget all results."""
        self.results = {}
        if self.file is not None:
            self.file.close()
            self.file = None
        if self.path is not None:
            self.path.unlink(missing_ok=True)


class TileCoder:
    """Tiles of a model to streams and back, in batches, with a journal.

    Args:
        stack: the model.
        is_fixed_point: the arithmetic.
        journal: of streams or of tiles.
    """

    def __init__(self, stack: LevelStack, is_fixed_point: bool, journal: Journal):
        self.stack = stack
        self.is_fixed_point = is_fixed_point
        self.journal = journal
        self.batch_size = codec.batch_size_of(stack)
        self.salt = codec.weights_digest(stack) + bytes([is_fixed_point])
        self.num_wrong = 0  # streams that were not decoded to their tiles

    def key(self, contents: bytes) -> bytes:
        return hashlib.sha256(self.salt + contents).digest()[:16]

    def encode(self, batch: Tensor, verify: bool) -> list[bytes]:
        """A stream for each tile, uint8 (n, C, h, w); it is empty if it is not decoded to the
        tile."""
        conditioning = self._conditioning(len(batch))
        streams = codec.encode_batch(self.stack, batch, conditioning, self.is_fixed_point)
        if verify:
            decoded, errors = self._decode_batch(streams, None)
            for i, (tile, result) in enumerate(zip(batch, decoded, strict=True)):
                if i in errors or not torch.equal(tile, result):
                    streams[i] = b""
                    self.num_wrong += 1
        return streams

    def decode(self, streams: Iterable[bytes], num_levels: int | None) -> dict[bytes, np.ndarray]:
        """The tiles, uint8 (h, w, C), of the streams that can be decoded.

        Args:
            num_levels: k: previews from z_1 … z_k.
        """
        prefix = bytes([num_levels or 0])
        keys = {stream: self.key(prefix + stream) for stream in streams}
        pending = [stream for stream, key in keys.items() if key not in self.journal.results]
        for start in range(0, len(pending), self.batch_size):
            batch = pending[start : start + self.batch_size]
            pixels, errors = self._decode_batch(batch, num_levels)
            decoded = {
                keys[stream]: image.numpy().tobytes()
                for i, (stream, image) in enumerate(zip(batch, pixels, strict=True))
                if i not in errors
            }
            self.journal.add(decoded)
        shape = self.stack.image_shape
        return {
            stream: np.frombuffer(tile, np.uint8).reshape(shape).transpose(1, 2, 0)
            for stream, key in keys.items()
            if (tile := self.journal.results.get(key)) is not None
        }

    def _decode_batch(
        self, streams: list[bytes], num_levels: int | None
    ) -> tuple[Tensor, dict[int, str]]:
        size = len(streams) if self.is_fixed_point else self.batch_size
        conditioning = self._conditioning(len(streams))
        return codec.decode_batch(
            self.stack, streams, conditioning, self.is_fixed_point, size, num_levels
        )

    def _conditioning(self, count: int) -> Conditioning:
        return self.stack.as_conditioning(None, count)


# ---- packing -------------------------------------------------------------------------------------


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
        name, _, _, permissions, modified, *_ = self.source
        rest = (permissions, modified, self.reason)
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


def header_of(stack: LevelStack, model: str, arithmetic: str) -> dict:
    """What an archive says of how it was made."""
    return {
        "format": FORMAT,
        "model": model,
        "weights": codec.weights_digest(stack).hex()[:32],
        "image_shape": [*stack.image_shape],
        "arithmetic": arithmetic,
        "computed": codec.arithmetic_of(stack, arithmetic),
        "torch": torch.__version__,
        "processor": processor(),
        "progressive_vae": __version__,
    }


def processor() -> str:
    names = ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA")
    settings = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    return ", ".join([torch.backends.cpu.get_cpu_capability(), *settings])


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


# ---- reading -------------------------------------------------------------------------------------


class StoredFile(NamedTuple):
    """A row of a table, and where its bytes are."""

    row: Entry
    start: int


def stored_files(reader: ArchiveReader) -> Iterator[list[StoredFile]]:
    """The rows of each part.

    Raises:
        ValueError: a table with other values.
    """
    for part in reader.parts:
        files = []
        start = part.start
        for row in from_table(part.table, part.length):
            files.append(StoredFile(row, start))
            start += row.length
        yield files


@dataclass
class Unpacking:
    """What `unpack` did with the files of an archive."""

    written: int = 0
    unchanged: int = 0  # were there already, with the same contents
    differing: list[str] = field(default_factory=list)  # were there, with others
    failed: list[tuple[str, str]] = field(default_factory=list)  # with the reasons
    absent: list[tuple[str, str]] = field(default_factory=list)  # not in the archive
    skipped: int = 0  # have no preview


class Restoring:
    """Files that are written to a folder; those that exist are compared instead.

    Args:
        folder: to write to; `None`: files are only decoded.
    """

    def __init__(self, folder: Path | None, result: Unpacking):
        self.folder = folder
        self.result = result
        self.temporary = folder / TEMPORARY if folder else None
        self.path: Path | None = None
        self.file: BinaryIO | None = None
        self.is_comparison = False
        self.is_same = True
        self.name: str | None = None  # of the file of which a chunk came last
        self.position = 0  # where its next chunk begins

    def target(self, row: Entry) -> Path:
        """
        Raises:
            ValueError: a name outside the folder.
        """
        name = safe_name(row.target)
        if self.folder is None:
            return Path(name)
        path = self.folder / name
        if not is_inside(path, self.folder):
            raise ValueError("expected a name inside the folder, got one behind a link")
        if name in (TEMPORARY, JOURNAL):
            raise ValueError("expected another name than that of a file of `unpack`")
        return path

    def fail(self, row: Entry, reason: str):
        """Give up a file; further chunks of it do not count."""
        if self.name != row.name or self.position >= 0:
            self.result.failed.append((row.name, reason))
        self.close()
        self.name = row.name
        self.position = -1

    def chunk(self, row: Entry, contents: bytes):
        """Write or compare the next chunk of a file.

        Raises:
            ValueError: it is not the next one.
        """
        if row.start == 0:
            self._begin(row)
        elif self.name != row.name or self.position != row.start:
            raise ValueError("a chunk is missing")
        self.position = row.start + len(contents)
        if self.is_comparison and self.file is not None:
            self.is_same = self.is_same and self.file.read(len(contents)) == contents
        elif self.file is not None:
            self.file.write(contents)
        if not row.remaining:
            self._finish(row)

    def _begin(self, row: Entry):
        self.close()
        self.name = row.name
        self.position = 0
        if self.folder is None:
            return
        self.path = self.target(row)
        self.is_comparison = os.path.lexists(self.path)
        self.is_same = True
        if self.is_comparison:
            self.is_same = self.path.is_file()
            self.file = open(self.path, "rb") if self.is_same else None  # noqa: SIM115
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        assert self.temporary is not None
        self.file = open(self.temporary, "wb")  # noqa: SIM115

    def _finish(self, row: Entry):
        if self.folder is None:
            self.result.written += 1
        elif self.is_comparison:
            is_same = self.is_same and self.file is not None and not self.file.read(1)
            self.count_existing(row.target, is_same)
        else:
            assert self.file is not None and self.path is not None and self.temporary is not None
            self.file.close()
            os.chmod(self.temporary, row.permissions & 0o777)
            if row.modified is not None:
                os.utime(self.temporary, ns=(row.modified * 10**6,) * 2)
            os.replace(self.temporary, self.path)
            self.result.written += 1
        self.close()

    def count_existing(self, name: str, is_same: bool):
        if is_same:
            self.result.unchanged += 1
        else:
            self.result.differing.append(name)

    def close(self):
        """End with the current file, which is deleted unless it is complete."""
        if self.file is not None:
            self.file.close()
        if self.temporary is not None:
            self.temporary.unlink(missing_ok=True)
        self.file = None
        self.name = None


@dataclass
class _StoredImage:
    """An image of a part that is being read."""

    row: Entry
    checksum: bytes
    header: ImageHeader
    codes: list[TileCode]


def unpack(
    stack: LevelStack,
    path: Path,
    folder: Path | None,
    only: str | None = None,
    num_levels: int | None = None,
    progress: Progress = lambda count: None,
) -> Unpacking:
    """Restore the files of an archive. Files that exist are compared and never overwritten.

    Args:
        stack: the model of the archive.
        path: of the archive, which may be cut or incomplete.
        folder: to write to; `None`: decode all, and write nothing.
        only: a name, a folder, or a pattern with `*` and `?`.
        num_levels: k: previews of images from z_1 … z_k.
        progress: is called with numbers of bytes of the archive.

    Raises:
        ValueError: no archive, or one of another model.
        OSError: a full disk.
    """
    result = Unpacking()
    with ArchiveReader(path) as reader:
        is_fixed_point = check_model(stack, reader.header, path)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        journal = Journal(None if folder is None else folder / JOURNAL)
        coder = TileCoder(stack, is_fixed_point, journal)
        restoring = Restoring(folder, result)
        advice = "" if is_fixed_point else _float_advice(stack, reader.header)
        for files in stored_files(reader):
            selected = [x for x in files if only is None or is_selected(x.row.name, only)]
            _unpack_part(reader, selected, coder, restoring, num_levels, advice)
            if journal.file is not None:  # else the part had been restored before
                journal.clear()
            progress(sum(x.row.length for x in files))
        restoring.close()
        journal.clear()
    if reader.problem is not None:
        result.failed.append((str(path), reader.problem))
    return result


def is_selected(name: str, only: str) -> bool:
    return name == only or name.startswith(f"{only.rstrip('/')}/") or fnmatch(name, only)


def check_model(stack: LevelStack, header: dict, path: Path) -> bool:
    """Whether the arithmetic of an archive is fixed-point.

    Raises:
        ValueError: an archive of another model, of a later format or without these fields.
    """
    if header.get("format") != FORMAT:
        raise ValueError(f"expected {path} of format {FORMAT}, got {header.get('format')!r}")
    weights = codec.weights_digest(stack).hex()[:32]
    if header.get("weights") != weights:
        raise ValueError(
            f"expected the model of {path}, {header.get('model')!r} with weights "
            f"{header.get('weights')!r}, got a model with weights {weights!r}"
        )
    codec.check_arithmetic(str(header.get("arithmetic")))
    return header.get("arithmetic") == "integer"


def _float_advice(stack: LevelStack, header: dict) -> str:
    return (
        f". It was made in floating point with {header.get('computed')}, processor "
        f"{header.get('processor')}; here are {codec.arithmetic_of(stack, 'float')}, processor "
        f"{processor()}. Unpack where they are the same, or pack with arithmetic integer"
    )


def _unpack_part(
    reader: ArchiveReader,
    files: list[StoredFile],
    coder: TileCoder,
    restoring: Restoring,
    num_levels: int | None,
    advice: str,
):
    images = dict[int, _StoredImage]()
    result = restoring.result
    for file in files:
        if file.row.method in IMAGES:
            try:
                image = _read_image(reader, file, coder.stack.image_shape)
                if not _is_there(image, restoring, num_levels is not None):
                    images[file.start] = image
            except (ValueError, OSError) as error:
                restoring.fail(file.row, _reason(error))
    streams = (
        code.body for image in images.values() for code in image.codes if code.kind == tiles.STREAM
    )
    decoded = coder.decode(streams, num_levels)
    for row, start in files:
        try:
            if row.method == ABSENT:
                restoring.close()
                result.absent.append((row.name, row.reason))
            elif row.method in IMAGES:
                if start in images:
                    image = images[start]
                    pixels = tiles.join_tiles(
                        image.header, image.codes, decoded, coder.stack.image_shape
                    )
                    is_wrong = image.header.checksum(pixels) != image.checksum
                    if is_wrong and num_levels is None:
                        raise ValueError(f"its pixels have another checksum{advice}")
                    exact = ExactImage(pixels, image.header.before, image.header.after)
                    restoring.chunk(row, exact.to_png())
            elif num_levels is not None:
                result.skipped += not row.remaining
            elif row.method == FOLDER:
                _make_folder(row, restoring)
            else:
                restoring.chunk(row, _contents(row, reader.read(start, row.length)))
        except KeyError:
            restoring.fail(row, f"a stream is damaged{advice}")
        except (ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            restoring.fail(row, _reason(error))


def _reason(error: Exception) -> str:
    return reason_of(error) if isinstance(error, OSError) else str(error)


def _make_folder(row: Entry, restoring: Restoring):
    path = restoring.target(row)
    if restoring.folder is None or path.is_dir():
        restoring.result.unchanged += 1
    else:
        path.mkdir(parents=True)
        restoring.result.written += 1


def _read_image(
    reader: ArchiveReader, file: StoredFile, shape: tuple[int, int, int]
) -> _StoredImage:
    data = reader.read(file.start, file.row.length)
    if len(data) < file.row.length:
        raise ValueError("the archive ends before its bytes")
    return _StoredImage(file.row, *tiles.image_from_bytes(data, shape[1:]))


def _is_there(image: _StoredImage, restoring: Restoring, is_preview: bool) -> bool:
    """Whether the image's file exists already; if so, it is counted."""
    path = restoring.target(image.row)
    if restoring.folder is None or not os.path.lexists(path):
        return False
    is_same = False
    if not is_preview and path.is_file():
        try:
            existing = read_exact_image(path.read_bytes())
            is_same = tiles.header_of(existing).checksum(existing.pixels) == image.checksum
        except ValueError:
            pass
    restoring.count_existing(image.row.target, is_same)
    return True


def _contents(row: Entry, data: bytes) -> bytes:
    """The bytes of a chunk of a file.

    Raises:
        ValueError: damaged data.
    """
    checksum = data[:CHECKSUM_SIZE]
    contents = data[CHECKSUM_SIZE:]
    if len(data) < row.length:
        raise ValueError("the archive ends before its bytes")
    if row.method == ZSTD:
        contents = container.decompress(contents, min(row.size, CHUNK))
    if len(contents) != row.size or zlib.crc32(contents).to_bytes(CHECKSUM_SIZE, "big") != checksum:
        raise ValueError("its bytes are damaged")
    return contents
