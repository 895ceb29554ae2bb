"""Convolution nets on (B, C, H, W) in channels_last; no probability in here."""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, C, H, W): free of transposes in channels_last, where
    group norm costs a third of a training step."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(norm(x)))), the identity at initialisation."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = ChannelNorm(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

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


def residual_blocks(width: int, num_layers: int) -> nn.Sequential:
    return nn.Sequential(*(ResidualBlock(width) for _ in range(num_layers)))


def init_weights(module: nn.Module):
    """Unit variance forward, residual branches at zero; leaves loaded weights alone."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        init.normal_(module.weight)
    elif isinstance(module, nn.LayerNorm):
        init.ones_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, ResidualBlock):
        init.zeros_(module.conv2.weight)
