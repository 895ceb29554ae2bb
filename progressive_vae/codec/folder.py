"""The files of a folder that go into an archive, and the names under which they come back."""

import os
import re
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

MAX_NAME = 255  # bytes of a file's name in most file systems
# Files of `unpack` in its folder: the one that is being written, the journal, and the lock.
TEMPORARY = ".unpack.incomplete"
JOURNAL = ".unpack.journal"
LOCK = ".unpack.lock"
UNPACK_FILES = (TEMPORARY, JOURNAL, LOCK)
_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")  # of Windows


class Source(NamedTuple):
    """A file to be packed.

    Args:
        name: relative, with slashes; bytes that are not UTF-8 are surrogates, as in `os.fsdecode`.
        load: returns the contents of a file that is not on the disk.
        size: in bytes.
        permissions: the bits of `chmod`.
        modified: in milliseconds, or `None`.
        is_folder: an empty folder.
        problem: why there is nothing to pack.
        path: of the file, if it is one.
    """

    name: str
    load: Callable[[], bytes] | None = None
    size: int = 0
    permissions: int = 0o644
    modified: int | None = None
    is_folder: bool = False
    problem: str = ""
    path: Path | None = None

    def open(self) -> BinaryIO:
        """
        Raises:
            OSError: a file that must not be read.
        """
        if self.path is not None:
            return open(self.path, "rb")
        return BytesIO(b"" if self.load is None else self.load())


def source_of_file(path: Path, name: str) -> Source:
    try:
        status = path.stat()
    except OSError as error:
        return Source(name, problem=reason_of(error))
    modified = status.st_mtime_ns // 10**6
    permissions = status.st_mode & 0o777
    return Source(name, None, status.st_size, permissions, modified, path=path)


def sources_of_folder(folder: Path, excluded: set[Path]) -> Iterator[Source]:
    """All files below a folder, hidden ones too, in the order of their names.

    Links are followed, but not in circles. Empty folders, and what cannot be packed, are sources
    too.

    Args:
        excluded: resolved paths of files that are passed over.
    """
    yield from _walk(folder, "", excluded, frozenset())


def _walk(
    folder: Path, prefix: str, excluded: set[Path], ancestors: frozenset[str]
) -> Iterator[Source]:
    real = os.path.realpath(folder)
    if real in ancestors:
        yield Source(prefix, problem="a link to a folder that contains it")
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        yield Source(prefix or ".", problem=reason_of(error))
        return
    if prefix and not entries:
        yield Source(prefix, is_folder=True)
    names = {path.name for path in excluded}
    for entry in entries:
        name = f"{prefix}/{entry.name}" if prefix else entry.name
        path = folder / entry.name
        if entry.name in names and path.resolve() in excluded:
            continue
        if name in UNPACK_FILES:
            yield Source(name, problem="the name of a file that unpack writes")
        elif path.is_dir():
            yield from _walk(path, name, excluded, ancestors | {real})
        elif path.is_file():
            yield source_of_file(path, name)
        else:
            problem = "a link to nothing" if path.is_symlink() else "neither a file nor a folder"
            yield Source(name, problem=problem)


def reason_of(error: OSError) -> str:
    return error.strerror or type(error).__name__


def safe_name(name: str, is_windows: bool = os.name == "nt") -> str:
    """The relative path of a file of an archive.

    Where Windows does not allow a name, the characters that are the reason become %XX.

    Raises:
        ValueError: a path that would not lie inside a folder.
    """
    parts = name.split("/")
    if "\0" in name or not all(part not in ("", ".", "..") for part in parts):
        raise ValueError("expected a name inside the folder")
    return "/".join(map(_windows_name, parts)) if is_windows else name


def _windows_name(part: str) -> str:
    escaped = re.sub(r'[<>:"\\|?*%\x00-\x1f]|[. ]$|[\udc80-\udcff]', _escape, part)
    return "%" + f"{ord(escaped[0]):02X}" + escaped[1:] if _RESERVED.fullmatch(part) else escaped


def _escape(match: re.Match) -> str:
    return f"%{ord(match[0]) % 256:02X}"


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path is in a folder, also when links are followed."""
    return path.parent.resolve().is_relative_to(folder.resolve())


def printable(name: str) -> str:
    """A name on one line, with escapes for what cannot be printed."""
    text = name.encode(errors="backslashreplace").decode()
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
