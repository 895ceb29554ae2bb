"""What saved files say of themselves: version, format and checksum; and how they are read."""

import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .paths import replacing

__version__ = "0.1.0"

# Raised when files are written that older versions would misread; a golden test holds the format.
FORMAT_VERSION = 7

# The first bytes of a file that git checks out in place of one that git-lfs holds.
_LFS_POINTER = b"version https://git-lfs"


def stamp(prefix: str = "") -> dict[str, Any]:
    """What every config says beside its fields."""
    return {f"{prefix}format_version": FORMAT_VERSION, f"{prefix}progressive_vae": __version__}


def pop_version(fields: dict[str, Any], what: str, prefix: str = "") -> int:
    """Take the stamp out of fields that were loaded, and return their format.

    Raises:
        ValueError: the format is newer than what this version can read.
    """
    found = fields.pop(f"{prefix}format_version", FORMAT_VERSION)
    written_by = fields.pop(f"{prefix}progressive_vae", "an unknown version")
    if not isinstance(found, int) or found > FORMAT_VERSION:
        raise ValueError(
            f"expected {what} with format_version <= {FORMAT_VERSION}, which is what "
            f"progressive_vae {__version__} can read, got {found}, saved by {written_by}: "
            "run `pip install --upgrade progressive-vae`"
        )
    return found


def read_json(path: str | Path, advice: str, kind: type = dict) -> Any:
    """The contents of a JSON file.

    Args:
        advice: what to do where it is damaged.
        kind: `dict`, or `list` for a list of dicts, or a type that is neither.

    Raises:
        ValueError: the file is missing, is not JSON, or holds something else.
    """
    try:
        check_not_pointer(path)
        text = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"expected JSON in {path}, got no such file: {advice}") from error
    try:
        contents = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        start = text[:30].decode("utf-8", "replace")
        raise ValueError(f"expected JSON in {path}, got {start!r}, {error}: {advice}") from error
    entries = contents if isinstance(contents, list) else []
    if not isinstance(contents, kind) or not all(isinstance(entry, dict) for entry in entries):
        names: dict[type, str] = {dict: "an object", list: "a list of objects"}
        expected = names.get(kind, f"a {kind.__name__}")
        shown = json.dumps(contents)[:100]
        raise ValueError(f"expected {expected} in {path}, got {shown}: {advice}")
    return contents


def check_not_pointer(path: str | Path):
    """Raise a `ValueError` if a file is a git-lfs pointer: the contents were not downloaded."""
    with open(path, "rb") as file:
        start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        raise ValueError(
            f"expected the contents of {path}, got a git-lfs pointer: run `git lfs pull` in its "
            "repository"
        )


def check_safetensors(path: str | Path, advice: str):
    """Raise a `ValueError` unless a file is a complete safetensors file."""
    check_not_pointer(path)
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"expected whole weights in {path}, got {error}: {advice}") from error


def write_json(path: Path, contents: dict):
    """Write under a temporary name, then rename."""
    write_text(path, json.dumps(contents, indent=2) + "\n")


def write_text(path: Path, text: str):
    """Write a file under a temporary name, then rename it."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def checksum(parts: Iterable[bytes]) -> int:
    """CRC-32 of what the parts make together: it tells damage, not malice."""
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc


def file_parts(path: str | Path, start: int = 0) -> Iterable[bytes]:
    """The bytes of a file from `start` on, a few at a time."""
    with open(path, "rb") as file:
        file.seek(start)
        while part := file.read(1 << 20):
            yield part
