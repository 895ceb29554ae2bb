"""The start of a bundle: the package in one file of a repository, see remote_code.py.

If the package is installed, it is imported. Otherwise the files of the package, which follow below
with `#|` before each line, are unpacked once into a folder beside this file and imported from it.
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

NAME = "progressive_vae"
FILE_PREFIX = "#: "  # as in remote_code.py
LINE_PREFIX = "#|"


def unpack(file: Path) -> Path:
    """Write the files in a bundle into a folder, unless it exists, and return the folder."""
    contents = file.read_bytes()
    folder = file.parent / f"{NAME}-{hashlib.sha256(contents).hexdigest()[:16]}"
    if not folder.exists():
        temporary = Path(tempfile.mkdtemp(dir=file.parent))
        texts: dict[str, list[str]] = {}
        for line in contents.decode().splitlines():
            if line.startswith(FILE_PREFIX):
                lines: list[str] = []
                texts[line.removeprefix(FILE_PREFIX)] = lines
            elif line.startswith(LINE_PREFIX):
                lines.append(line.removeprefix(LINE_PREFIX) + "\n")
        for name, lines in texts.items():
            path = temporary / NAME / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(lines), encoding="utf-8")
        with suppress(OSError):  # another process has already renamed its copy
            os.replace(temporary, folder)
    return folder


_spec = importlib.util.find_spec(NAME)
if _spec is None or _spec.origin is None:  # no origin: a folder of that name without code
    sys.path.append(str(unpack(Path(__file__))))

# Imported by name, as libraries search this file for import statements of missing packages.
_package = importlib.import_module(NAME)
__version__ = _package.__version__
BUNDLE_VERSION = __version__  # replaced in a bundle by the version of its files
if BUNDLE_VERSION != __version__:
    warnings.warn(
        f"this repository's code is progressive_vae {BUNDLE_VERSION}; {__version__}, which is "
        "installed or already loaded, is used instead",
        stacklevel=2,
    )

HashedTextConfig = _package.HashedTextConfig
HashedTextEncoder = _package.HashedTextEncoder
HashedTokenizer = _package.HashedTokenizer
ProgressiveVAELevel = _package.ProgressiveVAELevel
ProgressiveVAELevelConfig = _package.ProgressiveVAELevelConfig
ProgressiveVAEPipeline = _package.ProgressiveVAEPipeline
ProgressiveVAEPrior = _package.ProgressiveVAEPrior
ProgressiveVAEPriorConfig = _package.ProgressiveVAEPriorConfig
