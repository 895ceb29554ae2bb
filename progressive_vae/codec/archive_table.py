"""What an archive says: the header of how it was made, and a row for each file.

The rows of a part are its table in the container; `container.py` has the bytes around it.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..serialization import __version__
from ..stack import LevelStack
from . import codec
from .bitstream import FORMAT, FORMATS
from .container import ArchiveReader

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
CHECKSUM_SIZE = 4  # of the CRC-32 before a chunk

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


def header_of(stack: LevelStack, model: str, arithmetic: str) -> dict:
    """What an archive says of how it was made."""
    return {
        "format": FORMAT,  # of the streams, which have no headers
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


def check_model(stack: LevelStack, header: dict, path: Path) -> bool:
    """Whether the arithmetic of an archive is fixed-point.

    Raises:
        ValueError: an archive of another model, of a later format or without these fields.
    """
    if header.get("format") not in FORMATS:
        raise ValueError(f"expected {path} of a format in {FORMATS}, got {header.get('format')!r}")
    weights = codec.weights_digest(stack).hex()[:32]
    if header.get("weights") != weights:
        raise ValueError(
            f"expected the model of {path}, {header.get('model')!r} with weights "
            f"{header.get('weights')!r}, got a model with weights {weights!r}"
        )
    codec.check_arithmetic(str(header.get("arithmetic")))
    return header.get("arithmetic") == "integer"
