"""Files: version fields of configs, JSON, and checks of what is read."""

import json
import zlib
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .paths import replacing

__version__ = "0.2.0"

# Raised when files are written that older versions would misread; a golden test checks the format.
FORMAT_VERSION = 8

# The first bytes of the file that git checks out if git-lfs did not download the contents.
_LFS_POINTER = b"version https://git-lfs"


def version_fields(prefix: str = "") -> dict[str, Any]:
    """Return the version fields that every saved config has."""
    return {f"{prefix}format_version": FORMAT_VERSION, f"{prefix}progressive_vae": __version__}


def pop_version(fields: dict[str, Any], name: str, prefix: str = "") -> int:
    """Remove the version fields from loaded `fields`, and return the format version.

    Args:
        name: of the config, for the error message.

    Raises:
        ValueError: the format is newer than this version of the package can read.
    """
    format_version = fields.pop(f"{prefix}format_version", FORMAT_VERSION)
    package_version = fields.pop(f"{prefix}progressive_vae", "an unknown version")
    if not isinstance(format_version, int) or format_version > FORMAT_VERSION:
        raise ValueError(
            f"expected {name} with format_version <= {FORMAT_VERSION}, which is what "
            f"progressive_vae {__version__} can read, got {format_version}, saved by "
            f"{package_version}: run `pip install --upgrade progressive-vae`"
        )
    return format_version


def read_json(path: str | Path, advice: str, kind: type = dict) -> Any:
    """Return the contents of a JSON file.

    Args:
        advice: what the user can do about a damaged file, for the error message.
        kind: the expected type; `list` means a list of dicts.

    Raises:
        ValueError: the file is missing, is not JSON, or contains another type.
    """
    try:
        check_not_pointer(path)
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"expected JSON in {path}, got no such file: {advice}") from error
    try:
        contents = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        start = data[:30].decode("utf-8", "replace")
        raise ValueError(f"expected JSON in {path}, got {start!r}, {error}: {advice}") from error
    entries = contents if isinstance(contents, list) else []
    if not isinstance(contents, kind) or not all(isinstance(entry, dict) for entry in entries):
        names: dict[type, str] = {dict: "an object", list: "a list of objects"}
        expected = names.get(kind, f"a {kind.__name__}")
        start = json.dumps(contents)[:100]
        raise ValueError(f"expected {expected} in {path}, got {start}: {advice}")
    return contents


def check_not_pointer(path: str | Path):
    """Raise a `ValueError` if a file is a git-lfs pointer: its contents were not downloaded."""
    with open(path, "rb") as file:
        start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        raise ValueError(
            f"expected the contents of {path}, got a git-lfs pointer: run `git lfs pull` in its "
            "repository"
        )


def check_safetensors(path: str | Path, advice: str):
    """Raise a `ValueError` if a safetensors file is truncated or its header is damaged."""
    check_not_pointer(path)
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"expected a complete safetensors file in {path}, got {error}: {advice}"
        ) from error


def write_json(path: Path, contents: dict):
    """Write a JSON file atomically."""
    write_text(path, json.dumps(contents, indent=2) + "\n")


def write_text(path: Path, text: str):
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def file_checksum(path: str | Path) -> int:
    """Return the CRC-32 of a file, which detects damage but not manipulation."""
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return crc
