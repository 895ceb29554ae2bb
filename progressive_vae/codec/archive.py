"""An archive of a folder: each file in the shortest way that loses nothing.

    folder -> sources -> items -> tiles -> streams of the model -> parts of a container
    container -> parts -> streams -> tiles -> items -> folder

An image becomes streams of the model where its pixels and metadata come back from them, and where
they are shorter than the file. All else is stored as it is, by zstd where that is shorter. `pack`
decodes each stream before it counts. A killed `pack` or `unpack` continues where it was: streams
and tiles of the part that is being worked on lie in a journal.

| file | content |
|---|---|
| `folder.py` | the files of a folder, and safe names |
| `exact_image.py` | which images come back without loss, and as which PNG file |
| `tiles.py` | an image as tiles, and its bytes |
| `tile_coder.py` | tiles to streams and back, and the journal |
| `packing.py`, `unpacking.py` | how each file is stored, and restored |
| `archive_table.py` | rows of files, and the header |
| `container.py` | parts of bytes, and the index |
"""

from .archive_table import (
    PLAIN,
    PNG,
    ZSTD,
    Entry,
    StoredFile,
    header_of,
    processor,
    stored_files,
    to_table,
)
from .packing import MAX_IMAGE_FILE, Packing, pack
from .tile_coder import Journal, TileCoder
from .unpacking import JOURNAL, TEMPORARY, Restoring, Unpacking, unpack

__all__ = [
    "JOURNAL",
    "MAX_IMAGE_FILE",
    "PLAIN",
    "PNG",
    "TEMPORARY",
    "ZSTD",
    "Entry",
    "Journal",
    "Packing",
    "Restoring",
    "StoredFile",
    "TileCoder",
    "Unpacking",
    "header_of",
    "pack",
    "processor",
    "stored_files",
    "to_table",
    "unpack",
]
