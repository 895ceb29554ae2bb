"""Paths: shipped models, `~` as the home folder, writable folders, and atomic replacement."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_INDEX = "model_index.json"


def example(name: str) -> Path:
    """Return the folder of a model that ships with the package, for `from_pretrained`.

    An installation has "fashion_mnist"; a checkout has all models in `examples/`.

    Raises:
        ValueError: there is no such model.
    """
    package = Path(__file__).parent
    folders = [package.parent / "examples", package / "examples"]  # of a checkout, of a wheel
    models = {path.parent.name: path.parent for f in folders for path in f.glob(f"*/{_INDEX}")}
    if name not in models:
        raise ValueError(f"expected name of a model among {sorted(models)}, got {name!r}")
    return models[name]


def expand_home(path: str | os.PathLike[str], name: str) -> str:
    """Return `path` with the home folder in place of a leading `~` or `~user`.

    Args:
        name: of the argument, for the error message.

    Raises:
        ValueError: the home folder does not exist.
    """
    path = os.fspath(path)
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(
            f"expected {name} in a home folder that exists, got {path!r}: write './{path}' for a "
            "path in the working directory"
        )
    if os.path.normpath(expanded).startswith("~"):  # "./~", which pathlib would shorten to "~"
        return os.path.abspath(expanded)
    return expanded


def make_folder(path: str | os.PathLike[str], name: str) -> Path:
    """Create the folder `path`, unless it exists, and check that it is writable.

    Raises:
        ValueError: it cannot be created, or is not writable.
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
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block ends.

    The temporary path is for a file or a folder. A file at `path` is replaced; a folder there must
    be empty. After an error the temporary path is deleted, and `path` is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.incomplete")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)
