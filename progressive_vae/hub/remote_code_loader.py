"""The package in one file, which a repository may hold: with `trust_remote_code=True` it is loaded
where the package is not installed. Where it is, that is what is used.

In a repository the package's files stand below, each line behind `#|`. They are written into a
folder beside this file, once, and imported from there.
"""

import hashlib
import importlib
import importlib.util
import os
import sys
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

NAME, FILE, LINE = "progressive_vae", "#: ", "#|"  # as remote_code.py writes them


def unpacked(file: Path) -> Path:
    """The folder of the package whose files stand in `file`."""
    contents = file.read_bytes()
    folder = file.parent / f"{NAME}-{hashlib.sha256(contents).hexdigest()[:16]}"
    if not folder.exists():
        temporary = Path(tempfile.mkdtemp(dir=file.parent))
        texts: dict[str, list[str]] = {}
        for line in contents.decode().splitlines():
            if line.startswith(FILE):
                texts[line.removeprefix(FILE)] = lines = []
            elif line.startswith(LINE):
                lines.append(line.removeprefix(LINE) + "\n")
        for name, lines in texts.items():
            path = temporary / NAME / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(lines), encoding="utf-8")
        with suppress(OSError):  # another process was first
            os.replace(temporary, folder)
    return folder


_found = importlib.util.find_spec(NAME)
if _found is None or _found.origin is None:  # or a folder of that name, without code
    sys.path.append(str(unpacked(Path(__file__))))

_package = importlib.import_module(NAME)  # by name: libraries look for imports that are missing
__version__ = _package.__version__
VERSION = __version__  # in a repository the version of the files below
if VERSION != __version__:
    warnings.warn(
        f"this repository's code is progressive_vae {VERSION}; {__version__}, which is installed "
        "or was loaded before, is used in its place",
        stacklevel=2,
    )

ProgressiveVAELevel = _package.ProgressiveVAELevel
ProgressiveVAELevelConfig = _package.ProgressiveVAELevelConfig
ProgressiveVAEPipeline = _package.ProgressiveVAEPipeline
ProgressiveVAEPrior = _package.ProgressiveVAEPrior
ProgressiveVAEPriorConfig = _package.ProgressiveVAEPriorConfig
