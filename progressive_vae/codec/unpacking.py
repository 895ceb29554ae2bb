"""`unpack`: the files of an archive, restored, compared with those that exist, or only decoded.

container -> parts -> streams of the model -> tiles -> items -> folder
"""

import errno
import os
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO

import filelock

from ..arguments import as_integer
from ..stack import LevelStack
from . import codec, container, tiles
from .archive_table import (
    ABSENT,
    CHECKSUM_SIZE,
    CHUNK,
    FOLDER,
    IMAGES,
    ZSTD,
    Entry,
    Progress,
    StoredFile,
    check_model,
    processor,
    stored_files,
)
from .container import ArchiveReader
from .exact_image import ExactImage, read_exact_image
from .folder import JOURNAL, LOCK, TEMPORARY, UNPACK_FILES, is_inside, reason_of, safe_name
from .tile_coder import Journal, TileCoder
from .tiles import ImageHeader, TileCode

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


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
        if Path(name).parts[0] in UNPACK_FILES:
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
        ValueError: no archive, or one of another model; no file that is selected; another process
            that unpacks into the folder.
        OSError: a full disk, or a folder that cannot be written to.
    """
    if num_levels is not None:
        num_levels = as_integer("num_levels", num_levels, 1, stack.num_levels)
    result = Unpacking()
    num_selected = 0
    with ArchiveReader(path) as reader, ExitStack() as exits:
        is_fixed_point = check_model(stack, reader.header, path)
        exits.enter_context(_locked(folder))
        journal = Journal(None if folder is None else folder / JOURNAL)
        coder = TileCoder(stack, is_fixed_point, journal, reader.header["format"])
        restoring = Restoring(folder, result)
        advice = "" if is_fixed_point else _float_advice(stack, reader.header)
        for files in stored_files(reader):
            selected = [x for x in files if only is None or is_selected(x.row.name, only)]
            num_selected += len(selected)
            _unpack_part(reader, selected, coder, restoring, num_levels, advice)
            if journal.file is not None:  # else the part had been restored before
                journal.clear()
            progress(sum(x.row.length for x in files))
        restoring.close()
        journal.clear()
    if reader.problem is not None:
        result.failed.append((str(path), reader.problem))
    if only is not None and not num_selected and reader.problem is None:
        raise ValueError(f"expected only to select files of {path}, got {only!r}, which has none")
    return result


@contextmanager
def _locked(folder: Path | None) -> Iterator[None]:
    """Make the folder, and let no other process unpack into it meanwhile."""
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    if path.is_file() and path.stat().st_size:
        raise ValueError(f"expected {path} to be a lock of unpack, got another file: move it")
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise ValueError(
            f"expected no other process that unpacks into {folder}, got one"
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):  # Windows deletes no open file
            path.unlink()  # before the release: no other process can hold the lock of this file
        lock.release()


def is_selected(name: str, only: str) -> bool:
    if name == only or name.startswith(f"{only.rstrip('/')}/"):
        return True
    return fnmatchcase(name, only.replace("[", "[[]"))  # brackets have no meaning


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
    if restoring.folder is None:
        restoring.result.written += 1
    elif path.is_dir():
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
