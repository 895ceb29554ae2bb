"""Weights in 16 bits: one cast for all weights of a step, in place of autocast's cast of each."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import has_compiled_regions, is_compiled_module
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..models.heads import Head
from ..models.quantizer_base import Quantizer
from .checkpoints import is_sharded

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class CastWeights(torch.autograd.Function):
    """Tensors in another dtype; their gradients come back in float32."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        return _cast([*weights], dtype)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        existing = iter(_cast([x for x in gradients if x is not None], torch.float32))
        return None, *(None if x is None else next(existing) for x in gradients)


def _cast(tensors: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    casts = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(casts, tensors)
    return tuple(casts)


class Float32Attention(TorchFunctionMode):
    """Inside, attention is computed in float32, also of queries, keys and values in bf16.

    With torch 2.13 on a CPU its backward pass takes six times as long in bf16.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        query = args[0] if args else kwargs["query"]
        with torch.autocast("cpu", enabled=False):
            mixed = function(
                *map(_as_float32, args),
                **{name: _as_float32(value) for name, value in kwargs.items()},
            )
        return mixed.to(query.dtype)


def _as_float32(argument: Any) -> Any:
    """A tensor of another floating dtype in float32; other arguments, and bool masks, as is."""
    is_cast = isinstance(argument, Tensor) and argument.is_floating_point()
    return argument.float() if is_cast else argument


def fast_attention(device: torch.device) -> AbstractContextManager:
    """A context in which attention of queries in 16 bits is fast, forward and backward."""
    return Float32Attention() if device.type == "cpu" else nullcontext()


class MixedPrecisionForward:
    """The forward pass of a prepared model, under Accelerate's autocast.

    Autocast casts each weight by itself, forward and backward: hundreds of kernels a step. Here
    they are cast together before it. Modules that compute in float32 keep their weights.

    Args:
        model: the model before `accelerator.prepare`.
        wrapped: the model after it.
    """

    def __init__(self, model: PreTrainedModel, wrapped: nn.Module, accelerator: Accelerator):
        self.wrapped = wrapped
        self.dtype = DTYPES.get(accelerator.mixed_precision)
        # With gradient checkpointing the backward pass reads the model's own weights again, and a
        # sharded model gathers them as it needs them. A compiled model has fused casts.
        self.is_compiled = is_compiled_module(wrapped) or has_compiled_regions(wrapped)
        if (
            self.is_compiled
            or is_sharded(accelerator)
            or any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        ):
            self.dtype = None
        in_float32 = {
            id(weight)
            for module in model.modules()
            if isinstance(module, Quantizer) or (isinstance(module, Head) and module.is_float32)
            for weight in module.parameters()
        }
        self.attention = fast_attention(accelerator.device)
        self.names = [
            name
            for name, weight in wrapped.named_parameters()
            if weight.requires_grad and id(weight) not in in_float32
        ]

    def __call__(self, **inputs: Any) -> Any:
        if self.dtype is None:
            return self.wrapped(**inputs)
        parameters = dict(self.wrapped.named_parameters())
        casts = CastWeights.apply(self.dtype, *(parameters[name] for name in self.names))
        weights = dict(zip(self.names, casts, strict=True))
        with self.attention:
            return functional_call(self.wrapped, weights, (), inputs)
