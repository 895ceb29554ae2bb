"""Convolution nets on (B, C, H, W) in channels_last."""

import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer


@lru_cache
@torch.inference_mode(False)  # of what is made with it a gradient may be asked later
def cached_constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers as float32 on a device, where they stay: a copy each time would make the host wait
    for all that the device has yet to do."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def dithered(x: Tensor, scale: float) -> Tensor:
    """(B, D, H, W) and a pattern of a period of 4×4, whose root mean square is `scale`.

    Added before a quantizer and taken away after it (by −scale), it leaves sixteen different errors
    where the same latent is found all over, and who sees the neighbors can take their mean:
    subtractive dither (Roberts 1962, "Picture coding using pseudo-random noise").
    """
    if not scale:
        return x
    height, width = x.shape[-2:]
    pattern = _pattern(x.shape[1], x.device).repeat(1, math.ceil(height / 4), math.ceil(width / 4))
    return x + scale * pattern[:, :height, :width].to(x)


@lru_cache
@torch.inference_mode(False)  # of what is made with it a gradient may be asked later
def _pattern(dim: int, device: torch.device) -> Tensor:
    cell = np.random.RandomState(0).uniform(-1, 1, (dim, 4, 4))  # a frozen stream
    return torch.from_numpy(cell / np.sqrt(np.mean(cell**2))).float().to(device)


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of (B, C, H, W): free of transposes in channels_last, where
    group norm costs a third of a training step."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ZeroConv2d(nn.Conv2d):
    """A convolution that starts at zero."""


class ZeroLinear(nn.Linear):
    """A linear map that starts at zero."""


class AlignedLinear(nn.Linear):
    """A linear map of any number of features: libraries of matrix products say another last digit
    in other rows where it does not fill the registers of a processor."""

    def forward(self, x: Tensor) -> Tensor:
        missing = (0, -self.in_features % 16)
        return F.linear(F.pad(x, missing), F.pad(self.weight, missing), self.bias)


class ZeroEmbedding(nn.Embedding):
    """A table of vectors that start at zero."""


class PixelEmbedding(nn.Embedding):
    """A vector for each pixel value; near values start near."""

    def ordinal_features(self) -> Tensor:
        """√2 cos(π k x / 2) for x in [0, 2]: (V, E)."""
        kind = {"dtype": torch.float32, "device": self.weight.device}
        x = torch.linspace(0, 2, self.num_embeddings, **kind)
        k = torch.arange(self.embedding_dim, **kind)
        return 2**0.5 * torch.cos(math.pi / 2 * k * x[:, None])


class ResidualBlock(GradientCheckpointingLayer):
    """x + conv(silu(conv(norm(x)))), the identity at initialization;
    the second convolution mixes channels alone unless its kernel is 3×3.

    With gradient checkpointing the backward pass computes the activations again."""

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


def residual_blocks(width: int, num_layers: int, kernel_size: int) -> nn.Sequential:
    return nn.Sequential(*(ResidualBlock(width, kernel_size) for _ in range(num_layers)))


def init_weights(module: nn.Module):
    """Unit variance forward, zero where the type says so; leaves loaded weights alone.

    transformers visits leaves first and nothing twice: a module says by its own type how it starts.
    """
    if isinstance(module, (ZeroConv2d, ZeroLinear)):
        init.zeros_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, ZeroEmbedding):
        init.zeros_(module.weight)
    elif isinstance(module, (nn.Linear, nn.Conv2d)):
        init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        init.zeros_(module.bias)
    elif isinstance(module, PixelEmbedding):
        init.copy_(module.weight, module.ordinal_features())
    elif isinstance(module, nn.Embedding):
        init.normal_(module.weight)
    elif isinstance(module, nn.LayerNorm):
        init.ones_(module.weight)
        init.zeros_(module.bias)
