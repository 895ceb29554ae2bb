"""Command-line flags by jsonargparse.

It reads dotted names, types, defaults and help from classes and functions, and checks dicts and
YAML by the same types.
"""

import argparse
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, TypeVar

from jsonargparse import ArgumentParser

from ..paths import expand_home

Result = TypeVar("Result")


def parse_or_raise(parse: Callable[[], Result]) -> Result:
    """Return the result of a parser's method; raise its errors as a `ValueError` with one line."""
    try:
        return parse()
    except argparse.ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from error


def read_flags(
    parser: ArgumentParser, words: Sequence[str], prefixes: dict[str, str] | None = None
) -> dict[str, Any]:
    """Return the values of the flags of a command, nested by their dotted names.

    A Boolean flag without a value is true.

    Args:
        parser: with `exit_on_error=False`.
        prefixes: of short names: {"seed": "run"} reads --seed as --run.seed.

    Raises:
        ValueError: an unknown flag, or a value of the wrong type.
    """
    prefixes = prefixes or {}
    boolean_names = {
        action.dest
        for action in parser._actions
        if getattr(action, "_typehint", None) in (bool, bool | None)
    }
    arguments = []
    for word, next_word in zip_longest(words, words[1:], fillvalue="--"):
        name, equals, value = word[2:].partition("=")
        if word.startswith("--"):
            if value == "~":  # YAML reads it as null
                value = expand_home(value, name)
            if name in prefixes:
                name = f"{prefixes[name]}.{name}"
            word = f"--{name}{equals}{value}"
            if not equals and next_word.startswith("--") and name in boolean_names:
                word += "=true"
        arguments.append(word)
    return parse_or_raise(lambda: parser.parse_args(arguments, defaults=False)).as_dict()
