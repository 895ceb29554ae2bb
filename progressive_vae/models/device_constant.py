"""Tensors that depend on numbers only, made once for each device."""

from collections.abc import Callable
from functools import lru_cache, wraps
from operator import index
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def device_constant(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Cache a function whose last argument is a device, and whose other arguments are numbers,
    strings or tuples of them.

    A new copy from the host at each call would make the host wait for the device. In a compiled
    graph the tensors are constants.
    """

    @lru_cache(maxsize=512)
    @torch.inference_mode(False)  # a cached inference tensor could not be used in autograd later
    def cached(*arguments):
        with torch.device("cpu"):  # whatever the default device
            return function(*arguments)

    @torch.compiler.assume_constant_result
    def constant(*arguments):
        return [cached(*arguments)]  # dynamo gives all tensors that are results the same name

    @wraps(function)
    def call(*arguments: Arguments.args, **_: Arguments.kwargs) -> Result:
        # In a graph for all sizes a size has no value: `index` reads it and compiles for this one.
        return constant(*map(_as_constant, arguments))[0]

    return call


@device_constant
def cached_constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A float32 tensor that stays on the device: a new copy at each call would synchronize."""
    return torch.tensor(values, dtype=torch.float32, device=device)


@device_constant
def bit_shifts(num_bits: int, device: torch.device) -> Tensor:
    """num_bits − 1 … 0: the places of bits, the most significant first, int64 (num_bits,)."""
    return torch.arange(num_bits - 1, -1, -1).to(device)


def _as_constant(argument: Any) -> Any:
    if isinstance(argument, tuple):
        return tuple(map(_as_constant, argument))
    return index(argument) if isinstance(argument, int) else argument
