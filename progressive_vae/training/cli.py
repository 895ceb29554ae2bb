"""Flags of scripts, by jsonargparse: it reads dotted names, types, defaults and help from classes
and functions, so that nothing is written twice, and checks dicts and YAML by the same types."""

import argparse
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, TypeVar

from jsonargparse import ArgumentParser

from ..paths import expand_home

Result = TypeVar("Result")


def in_words(call: Callable[[], Result]) -> Result:
    """What a call of a parser returns; its errors as a `ValueError` of one line."""
    try:
        return call()
    except argparse.ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from error


def read_flags(
    parser: ArgumentParser, words: Sequence[str], prefixes: dict[str, str] | None = None
) -> dict[str, Any]:
    """What the words of a command say, nested as dotted names are.

    The name alone of something that is true or false says that it is true.

    Args:
        parser: with `exit_on_error=False`.
        prefixes: of names that may come without them: {"seed": "run"} reads --seed as --run.seed.

    Raises:
        ValueError: a flag that is none, or a value that is not of its type.
    """
    prefixes, whole = prefixes or {}, []
    truths = {
        action.dest
        for action in parser._actions
        if getattr(action, "_typehint", None) in (bool, bool | None)
    }
    for word, following in zip_longest(words, words[1:], fillvalue="--"):
        name, equals, value = word[2:].partition("=")
        if word.startswith("--"):
            value = expand_home(value, name) if value == "~" else value  # which YAML reads as null
            name = f"{prefixes[name]}.{name}" if name in prefixes else name
            is_alone = not equals and following.startswith("--") and name in truths
            word = f"--{name}{equals}{value}" + "=true" * is_alone
        whole.append(word)
    return in_words(lambda: parser.parse_args(whole, defaults=False)).as_dict()
