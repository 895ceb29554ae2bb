"""What saved files say of themselves: the version that wrote them, and their format."""

from typing import Any

__version__ = "0.1.0"

# Raised when files are written that older versions would misread; a golden test holds the format.
FORMAT_VERSION = 3


def stamp(prefix: str = "") -> dict[str, Any]:
    """What every config says beside its fields."""
    return {f"{prefix}format_version": FORMAT_VERSION, f"{prefix}progressive_vae": __version__}


def take_stamp(fields: dict[str, Any], what: str, prefix: str = "") -> int:
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
