"""Layers for (B, C, H, W) in channels_last, and their initialization."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .device_constant import device_constant


def add_dither(x: Tensor, scale: float) -> Tensor:
    """Add a fixed pattern of period 4×4 and root mean square `scale` to (B, D, H, W).

    It is added before a quantizer and removed after it, with −scale. Equal latents then get
    sixteen different quantization errors, which a network that sees neighbors can average:
    subtractive dither (Roberts 1962, "Picture coding using pseudo-random noise").
    """
    if not scale:
        return x
    height, width = x.shape[-2:]
    pattern = _dither_pattern(x.shape[1], x.device)
    pattern = pattern.repeat(1, math.ceil(height / 4), math.ceil(width / 4))
    return x + scale * pattern[:, :height, :width].to(x)


@device_constant
def _dither_pattern(dim: int, device: torch.device) -> Tensor:
    # The stream of `RandomState` never changes, so saved models keep their pattern.
    cell = np.random.RandomState(0).uniform(-1, 1, (dim, 4, 4))
    return torch.from_numpy(cell / np.sqrt(np.mean(cell**2))).float().to(device)


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of (B, C, H, W).

    In channels_last it needs no transposes, where group norm takes a third of a training step.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ZeroConv2d(nn.Conv2d):
    """A convolution whose weights start at zero."""


class ZeroLinear(nn.Linear):
    """A linear map whose weights start at zero."""


class ResidualLinear(nn.Linear):
    """The last linear map of a residual branch, whose weights start at zero.

    It is a hidden layer, where `ZeroLinear` is an output layer: Muon trains only hidden ones.
    """


class AlignedLinear(nn.Linear):
    """A linear map whose input is padded to a multiple of 16 features.

    Otherwise matrix products round differently in different rows, where the number of features does
    not fill a processor's registers. The codec needs results that are equal in every batch.
    """

    def forward(self, x: Tensor) -> Tensor:
        padding = (0, -self.in_features % 16)
        return F.linear(F.pad(x, padding), F.pad(self.weight, padding), self.bias)

    def unaligned(self, x: Tensor) -> Tensor:
        """The map without padding, for training."""
        return F.linear(x, self.weight, self.bias)


class ZeroEmbedding(nn.Embedding):
    """An embedding whose vectors start at zero."""


class SmallEmbedding(nn.Embedding):
    """An embedding whose vectors start small, so that training decides which values are alike."""


def embed_channels(embedding: nn.Embedding, values: Tensor) -> Tensor:
    """The sum of embeddings of the channels: int64 (B, C, ...) -> (B, ..., E).

    Args:
        embedding: of C·V rows, V for each channel.
    """
    channels = values.shape[1]
    if channels == 1:
        return embedding(values[:, 0])
    num_values = embedding.num_embeddings // channels
    return sum(embedding(values[:, c] + c * num_values) for c in range(channels))  # type: ignore


class PixelEmbedding(nn.Embedding):
    """A vector for each pixel value; nearby values start with similar vectors."""

    def ordinal_features(self) -> Tensor:
        """√2 cos(π k x / 2) for x in [0, 2]: (V, E)."""
        kwargs: dict[str, Any] = {"dtype": torch.float32, "device": self.weight.device}
        x = torch.linspace(0, 2, self.num_embeddings, **kwargs)
        k = torch.arange(self.embedding_dim, **kwargs)
        return 2**0.5 * torch.cos(math.pi / 2 * k * x[:, None])


class ResidualBlock(GradientCheckpointingLayer):
    """x + conv2(silu(conv1(norm(x)))), the identity at initialization.

    The second convolution has a kernel of `kernel_size`, 1 or 3. With gradient checkpointing the
    backward pass computes the activations again.
    """

    def __init__(self, width: int, kernel_size: int):
        super().__init__()
        self.norm = LayerNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = ZeroConv2d(width, width, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(self.norm(x))))


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, 4 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(x), 2)


class Downsample(nn.Module):
    """(B, C_in, H, W) -> (B, C_out, ⌈H/2⌉, ⌈W/2⌉)."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        self.conv = nn.Conv2d(4 * width_in, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2))
        return self.conv(F.pixel_unshuffle(x, 2))


def apply_each(modules: Sequence[nn.Module], x: Tensor, method: str = "forward") -> Tensor:
    """Apply modules of equal shapes, each to its own input, in as few operations as one of them.

    Args:
        x: the input of each module, (S, ...).
        method: name of the method to call.

    Returns:
        the outputs, (S, ...).
    """
    if len(modules) == 1:
        return getattr(modules[0], method)(x[0])[None]
    template = _MethodCall(modules[0], method)
    parameters = [dict(module.named_parameters()) for module in modules]
    weights = {
        f"module.{name}": torch.stack([tensors[name] for tensors in parameters])
        for name in parameters[0]
    }
    return torch.vmap(partial(functional_call, template))(weights, x)


class _MethodCall(nn.Module):
    """A module whose forward pass is a method of another one, for `functional_call`."""

    def __init__(self, module: nn.Module, method: str):
        super().__init__()
        self.module = module
        self.method = method

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.module, self.method)(x)


def residual_blocks(width: int, num_layers: int, kernel_size: int) -> nn.Sequential:
    return nn.Sequential(*(ResidualBlock(width, kernel_size) for _ in range(num_layers)))


def init_weights(module: nn.Module):
    """Initialize one module by its type: unit variance forward, or zero.

    transformers calls it for leaves first, once for each module; loaded weights stay unchanged.
    """
    if isinstance(module, (ZeroConv2d, ZeroLinear, ResidualLinear, ZeroEmbedding)):
        for parameter in module.parameters():
            init.zeros_(parameter)
    elif isinstance(module, (nn.Linear, nn.Conv2d)):
        init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, PixelEmbedding):
        init.copy_(module.weight, module.ordinal_features())
    elif isinstance(module, SmallEmbedding):
        init.normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Embedding):
        init.normal_(module.weight)
    elif isinstance(module, nn.LayerNorm):
        init.ones_(module.weight)
        init.zeros_(module.bias)
