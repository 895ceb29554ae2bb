"""Paths: `~` as the home folder, folders that can be written, and files that are replaced whole."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def expand_home(path: str | os.PathLike[str], name: str) -> str:
    """Return `path` with the home folder in place of a leading `~` or `~user`.

    Args:
        name: of the argument, for the error.

    Raises:
        ValueError: there is no such home folder.
    """
    path = os.fspath(path)
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(
            f"expected {name} in a home folder that exists, got {path!r}: write './{path}' for a "
            "path in the working directory"
        )
    if os.path.normpath(expanded).startswith("~"):  # "./~", of which pathlib makes "~"
        return os.path.abspath(expanded)
    return expanded


def make_folder(path: str | os.PathLike[str], name: str) -> Path:
    """Make the folder `path`, unless it exists, and check that files can be written there.

    Raises:
        ValueError: it cannot be made or written.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(_not_writable(name, folder, error)) from error
    check_writable(folder, name)
    return folder


def check_writable(folder: Path, name: str):
    """Raise a `ValueError` unless `folder` is a folder in which files can be written."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(_not_writable(name, folder, error)) from error


def _not_writable(name: str, folder: Path, error: OSError) -> str:
    return f"expected {name} in a folder that can be written, got {str(folder)!r}: {error.strerror}"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`. What is written there becomes `path` when the block ends.

    After an error the temporary file is deleted, and `path` is as it was.
    """
    temporary = path.with_name(f"{path.name}.incomplete")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
