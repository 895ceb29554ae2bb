"""The identity of a fit: all that its weights depend on, as JSON; and how two are compared."""

from collections.abc import Mapping
from typing import Any

MAX_NAMED = 8  # differences that an error names

# Earlier phases decide these fields; all others are settings of the user.
DECIDED_BY_EARLIER_PHASES = ("config.finer_fingerprint", "data.weights", "data.num_examples")


def flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by dotted names."""
    values: dict[str, Any] = {}
    for name, value in fields.items():
        is_nested = isinstance(value, Mapping) and value
        values |= flatten(value, f"{prefix}{name}.") if is_nested else {prefix + name: value}
    return values


def differences(
    identity: Mapping[str, Any], saved: Mapping[str, Any], settings_only: bool = False
) -> list[tuple[str, Any, Any]]:
    """Return (dotted name, value in `identity`, value in `saved`) of each field that differs.

    Fields that only `saved` has do not count: earlier versions had other fields.

    Args:
        settings_only: ignore the fields that earlier phases decide.
    """
    ignored = DECIDED_BY_EARLIER_PHASES if settings_only else ()
    saved_values = flatten(saved)
    return [
        (name, value, saved_values.get(name))
        for name, value in flatten(identity).items()
        if name not in ignored and value != saved_values.get(name)
    ]


def check_identity(
    identity: Mapping[str, Any], saved: Mapping[str, Any], place: str, settings_only: bool = False
):
    """Raise a `ValueError` that names the differences from the identity saved in `place`."""
    different = differences(identity, saved, settings_only)
    if not different:
        return
    named = different[:MAX_NAMED]
    more = f" and {len(different) - len(named)} more" if len(different) > len(named) else ""
    expected = ", ".join(f"{name}={old!r}" for name, _, old in named)
    got = ", ".join(f"{name}={new!r}" for name, new, _ in named)
    raise ValueError(
        f"expected to resume from {place} with {expected}{more}, got {got}{more}: pass the same "
        "flags and number of processes, choose another --output_dir, or replace the content of "
        "the folder with --overwrite_output_dir"
    )
