"""Arguments of public methods: numbers as Python's own, or an error that names the argument; and
old names."""

import functools
import math
import warnings
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def as_integer(name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    """An integer of Python, numpy or torch in minimum … maximum, as an `int`.

    Raises:
        ValueError: a value of another type, such as bool, or out of range.
    """
    number = _as_scalar(value)
    is_integer = isinstance(number, Integral) and not isinstance(number, bool)
    is_integer = is_integer or (isinstance(number, float) and number.is_integer())
    if is_integer and minimum <= number and (maximum is None or number <= maximum):
        return int(number)
    limits = f">= {minimum}" if maximum is None else f"in {minimum} … {maximum}"
    raise ValueError(f"expected {name} {limits}, got {_as_text(value)}")


def as_number(name: str, value: Any, limits: str, is_allowed: Callable[[float], bool]) -> float:
    """A finite number of Python, numpy or torch, as a `float`.

    Args:
        limits: the range as text, for the error.
        is_allowed: the range as a function.

    Raises:
        ValueError: a value of another type, such as bool, or out of range.
    """
    number = _as_scalar(value)
    if isinstance(number, Real) and not isinstance(number, bool):
        if math.isfinite(number) and is_allowed(float(number)):
            return float(number)
    raise ValueError(f"expected {name} {limits}, got {_as_text(value)}")


def _as_scalar(value: Any) -> Any:
    """The Python number of a numpy number, or of an array or tensor without dimensions."""
    if isinstance(value, np.generic) or (
        isinstance(value, (np.ndarray, Tensor)) and not value.ndim
    ):
        return value.item()
    return value


def _as_text(value: Any) -> str:
    """As `str`, with quotes around text, and with the type of anything but numbers."""
    if isinstance(value, (str, bytes)):
        return repr(value)
    return f"{value}" if isinstance(value, (int, float)) else f"{value} ({type(value).__name__})"


def renamed_argument(old: str, new: str) -> Callable[[Function], Function]:
    """A decorator: the keyword `old` is accepted for `new`, with a `FutureWarning`."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if old in kwargs:
                if new in kwargs:
                    raise ValueError(f"expected {new} without {old}, its old name, got both")
                warnings.warn(f"{old} is now called {new}", FutureWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate
