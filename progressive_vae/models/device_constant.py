"""Tensors that depend on numbers only, made once for each device."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch

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
    @wraps(function)
    def call(*arguments):
        return cached(*arguments)

    return call
