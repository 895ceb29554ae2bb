"""The container of an archive: parts that are appended to a file, and an index behind them.

A part is a table and the data that it describes:

| bytes | |
|---|---|
| 4 | `PART` |
| 4 | length of the table |
| 8 | length of the data |
| 4 | CRC-32 of the part's place in the file, of both lengths and of the table |
| … | the table: JSON, compressed by zstd |
| … | data |

The first part is the header, and the last one the index: it repeats all tables, so that one damaged
byte costs no file but its own. The last bytes of a file say where the index is. Without an index,
as in a file that is being written or that was cut, the parts are searched for.
"""

import json
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import filelock
import zstandard

MAGIC = b"\x8bPVAE\r\n\x1a"  # the first bytes of a file, and the last ones
PART = b"\x8bPVP"
MAX_TABLE = 2**29  # bytes of a table's JSON
_HEAD = struct.Struct("<4sIQI")
_TRAILER = struct.Struct("<Q8s")
_BLOCK = 2**20  # bytes that a search reads at once


class Part(NamedTuple):
    """A table, and where its data are in the file."""

    table: Any
    start: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length


def compress(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=12, write_checksum=False).compress(data)


def decompress(data: bytes, limit: int) -> bytes:
    """
    Raises:
        ValueError: damaged data, or more than `limit` bytes.
    """
    try:
        reader = zstandard.ZstdDecompressor().stream_reader(data)
        contents = reader.read(limit + 1)
    except zstandard.ZstdError as error:
        raise ValueError(f"expected zstd data, got others: {error}") from error
    if len(contents) > limit:
        raise ValueError(f"expected at most {limit} bytes in zstd data, got more")
    return contents


class ArchiveWriter:
    """Writes `{path}.partial`, or continues it, and renames it to `path` when it is complete.

    Args:
        header: what the archive is made with.
        identity: names of the header's fields that must not change between interruption and
            continuation.

    Raises:
        ValueError: `path` exists, another process writes it, or parts were made with another
            header.
    """

    def __init__(self, path: Path, header: dict, identity: tuple[str, ...]):
        if path.exists():
            raise ValueError(f"expected a file that does not exist yet, got {path}")
        self.path = path
        self.partial = path.with_name(f"{path.name}.partial")
        self._lock = filelock.FileLock(f"{self.partial}.lock")
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise ValueError(f"expected no other process that writes {path}, got one") from error
        self.file: BinaryIO = open(self.partial, "r+b" if self.partial.exists() else "w+b")
        self.header = header
        self.parts: list[Part] = []
        try:
            self._continue(identity)
        except BaseException:
            self.close()
            raise

    def _continue(self, identity: tuple[str, ...]):
        """Read the parts that are complete, and cut off the rest of the file."""
        parts = list(_consecutive_parts(self.file))
        self.file.seek(0)
        if not MAGIC.startswith(self.file.read(len(MAGIC))):
            raise ValueError(
                f"expected {self.partial} of an interrupted run, got another file: move it "
                "elsewhere"
            )
        if not parts:
            self.file.truncate(0)
            self.file.seek(0)
            self.file.write(MAGIC)
            self._write(self.header, b"")
            return
        previous = parts[0].table
        for name in identity:
            if not isinstance(previous, dict) or previous.get(name) != self.header[name]:
                raise ValueError(
                    f"expected {self.partial} with {name} {self.header[name]!r}, got one with "
                    f"{previous!r}: delete it to start again"
                )
        self.header = previous
        self.parts = parts[1:]
        self.file.truncate(parts[-1].stop)
        self.file.seek(0, os.SEEK_END)

    def append(self, table: Any, data: bytes):
        """Write a part, and read its data back from the file.

        Raises:
            OSError: the file has other bytes then.
        """
        part = self._write(table, data)
        self.parts.append(part)
        self.file.seek(part.start)
        if self.file.read(part.length) != data:
            raise OSError(f"{self.partial} does not have the bytes that were written to it")

    def finish(self):
        """Write the index and rename the file."""
        place = self.file.tell()
        index = {"header": self.header, "parts": [[*part] for part in self.parts]}
        self._write(index, b"")
        self.file.write(_TRAILER.pack(place, MAGIC))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.partial, self.path)

    def close(self):
        self.file.close()
        with suppress(OSError):  # Windows deletes no open file
            Path(self._lock.lock_file).unlink()  # before another process can hold the lock
        self._lock.release()

    def _write(self, table: Any, data: bytes) -> Part:
        place = self.file.tell()
        compressed = compress(json.dumps(table, separators=(",", ":")).encode())
        self.file.write(_head(place, compressed, len(data)) + compressed + data)
        self.file.flush()
        os.fsync(self.file.fileno())
        return Part(table, place + _HEAD.size + len(compressed), len(data))

    def __enter__(self) -> "ArchiveWriter":
        return self

    def __exit__(self, *exception):
        self.close()


class ArchiveReader:
    """Reads an archive, complete or not: `header`, `parts`, and the bytes of their data.

    `problem` says what is wrong with the archive's index, if anything is.

    Raises:
        ValueError: a file that is no archive.
    """

    def __init__(self, path: Path):
        self.path = path
        self.problem: str | None = None
        self.file = open(path, "rb")  # noqa: SIM115
        try:
            index = self._index()
            if index is None:
                self.problem = "its index is missing: it was cut, damaged or is not complete"
                tables = list(_all_parts(self.file))
                headers = [part.table for part in tables if isinstance(part.table, dict)]
                if not headers:
                    raise ValueError(f"expected an archive in {path}, got a file that is none")
                self.header = headers[0]
                self.parts = [part for part in tables if isinstance(part.table, list)]
            else:
                self.header = index["header"]
                self.parts = [Part(*fields) for fields in index["parts"]]
        except BaseException:
            self.file.close()
            raise

    def read(self, start: int, length: int) -> bytes:
        """Bytes of the file, fewer where it ends before."""
        self.file.seek(start)
        return self.file.read(length)

    def _index(self) -> dict | None:
        size = self.file.seek(0, os.SEEK_END)
        trailer = self.read(max(0, size - _TRAILER.size), _TRAILER.size)
        if len(trailer) < _TRAILER.size:
            return None
        place, magic = _TRAILER.unpack(trailer)
        part = _read_part(self.file, place) if magic == MAGIC and place < size else None
        table = part.table if part is not None else None
        is_index = (
            isinstance(table, dict)
            and isinstance(table.get("header"), dict)
            and isinstance(table.get("parts"), list)
            and all(map(_is_part, table["parts"]))
        )
        return table if is_index else None

    def __enter__(self) -> "ArchiveReader":
        return self

    def __exit__(self, *exception):
        self.file.close()


def _is_part(fields: Any) -> bool:
    return (
        isinstance(fields, list)
        and len(fields) == 3
        and isinstance(fields[0], list)
        and all(isinstance(number, int) and 0 <= number < 2**62 for number in fields[1:])
    )


def _head(place: int, compressed: bytes, data_length: int) -> bytes:
    checksum = zlib.crc32(compressed, zlib.crc32(struct.pack("<QQ", place, data_length)))
    return _HEAD.pack(PART, len(compressed), data_length, checksum)


def _read_part(file: BinaryIO, place: int) -> Part | None:
    """The part at a place, if there is one."""
    file.seek(place)
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size or not head.startswith(PART):
        return None
    _, table_length, data_length, _ = _HEAD.unpack(head)
    if table_length > MAX_TABLE:
        return None
    compressed = file.read(table_length)
    if len(compressed) < table_length or _head(place, compressed, data_length) != head:
        return None
    try:
        table = json.loads(decompress(compressed, MAX_TABLE))
    except (ValueError, RecursionError):
        return None
    return Part(table, place + _HEAD.size + table_length, data_length)


def _consecutive_parts(file: BinaryIO) -> Iterator[Part]:
    """The parts of a file that was not finished, without one whose data are not complete."""
    size = file.seek(0, os.SEEK_END)
    place = len(MAGIC)
    while (part := _read_part(file, place)) is not None and part.stop <= size:
        yield part
        place = part.stop


def _all_parts(file: BinaryIO) -> Iterator[Part]:
    """The parts of a damaged file: where one ends, or wherever another one begins."""
    place = 0
    while (next_place := _find(file, PART, place)) is not None:
        part = _read_part(file, next_place)
        if part is None:
            place = next_place + 1
            continue
        yield part
        # Damage may have changed the number of bytes, so that the next part is not where it was.
        following = _read_part(file, part.stop)
        place = part.stop if following is not None else part.start


def _find(file: BinaryIO, pattern: bytes, start: int) -> int | None:
    file.seek(start)
    before = b""
    while block := file.read(_BLOCK):
        position = (before + block).find(pattern)
        if position >= 0:
            return start - len(before) + position
        start += len(block)
        before = (before + block)[1 - len(pattern) :]
    return None
