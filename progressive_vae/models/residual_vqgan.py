"""VQGANs without attention: residual blocks of convolutions without bias.

`"maskgit"` is the network of MaskGIT (Chang et al. 2022), which MaskBit (Weber et al. 2024) has
with strided convolutions. `"open_magvit2"` is that of Open-MAGVIT2 (Luo et al. 2024).
"""

from collections import OrderedDict
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6


def residual_encoder(fields: dict[str, Any]) -> nn.Module:
    """Return the encoder: pixels (B, C, H, W) -> latents (B, D, H_N, W_N).

    Args:
        fields: those of `ResidualDecoder`.
    """
    network, num_blocks = fields["network"], fields["num_res_blocks"]
    widths = [fields["base_channels"] * factor for factor in fields["channel_multiplier"]]
    width_in = fields["base_channels"]
    conv_in = nn.Conv2d(fields["num_channels"], width_in, 3, padding=1, bias=False)
    stages: list[nn.Module] = []
    for i, width in enumerate(widths):
        stage: OrderedDict[str, nn.Module] = OrderedDict()
        stage["block"] = _blocks(num_blocks, width_in, width, network)
        if i < len(widths) - 1:
            stage["downsample"] = _Downsample(width, network)
        stages.append(nn.Sequential(stage))
        width_in = width
    return nn.Sequential(
        OrderedDict(
            conv_in=conv_in,
            down=nn.Sequential(*stages),
            mid=_blocks(num_blocks, width_in, width_in, network),
            norm_out=nn.GroupNorm(32, width_in, EPS),
            act=nn.SiLU(),
            conv_out=nn.Conv2d(width_in, fields["latent_channels"], 1),
        )
    )


class ResidualDecoder(nn.Module):
    """Code vectors (B, D, H_N, W_N) -> pixels (B, C, H, W).

    That of Open-MAGVIT2 is conditioned on mean and standard deviation of the code vectors of an
    image, by adaptive group norms before each resolution.

    Args:
        fields: `network`, `num_channels`, `base_channels`, `channel_multiplier`, `num_res_blocks`
            and `latent_channels`, D.
    """

    def __init__(self, fields: dict[str, Any]):
        super().__init__()
        network, num_blocks = fields["network"], fields["num_res_blocks"]
        widths = [fields["base_channels"] * factor for factor in fields["channel_multiplier"]]
        width_in = widths[-1]
        self.conv_in = nn.Conv2d(fields["latent_channels"], width_in, 3, padding=1)
        self.mid = _blocks(num_blocks, width_in, width_in, network)
        self.up = nn.ModuleList()  # the coarsest is the first
        for i, width in reversed([*enumerate(widths)]):
            self.up.append(_UpStage(fields, width_in, width, is_finest=i == 0))
            width_in = width
        self.norm_out = nn.GroupNorm(32, width_in, EPS)
        self.conv_out = nn.Conv2d(width_in, fields["num_channels"], 3, padding=1)

    def forward(self, quantized: Tensor) -> Tensor:
        x = self.mid(self.conv_in(quantized))
        for stage in self.up:
            x = stage(x, quantized)
        return self.conv_out(F.silu(self.norm_out(x)))


class _UpStage(nn.Module):
    def __init__(self, fields: dict[str, Any], width_in: int, width: int, is_finest: bool):
        super().__init__()
        network = fields["network"]
        self.adaptive: nn.Module | None = None
        if network == "open_magvit2":
            self.adaptive = _AdaptiveGroupNorm(fields["latent_channels"], width_in)
        self.block = _blocks(fields["num_res_blocks"], width_in, width, network)
        self.upsample = nn.Identity() if is_finest else _upsample(width, network)

    def forward(self, x: Tensor, quantized: Tensor) -> Tensor:
        if self.adaptive is not None:
            x = self.adaptive(x, quantized)
        return self.upsample(self.block(x))


class _Block(nn.Module):
    """A residual block. Where the width changes, MaskGIT's shortcut is a map of the block's branch,
    that of Open-MAGVIT2 of the input."""

    def __init__(self, width_in: int, width: int, network: str):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, width_in, EPS)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(32, width, EPS)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.is_of_branch = network == "maskgit"
        self.nin_shortcut: nn.Module | None = None
        if width != width_in:
            shortcut_in = width if self.is_of_branch else width_in
            self.nin_shortcut = nn.Conv2d(shortcut_in, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv1(F.silu(self.norm1(x)))
        branch = self.conv2(F.silu(self.norm2(branch)))
        if self.nin_shortcut is not None:
            x = self.nin_shortcut(branch if self.is_of_branch else x)
        return x + branch


def _blocks(count: int, width_in: int, width: int, network: str) -> nn.Sequential:
    return nn.Sequential(*(_Block(width if i else width_in, width, network) for i in range(count)))


class _Downsample(nn.Conv2d):
    """A convolution of stride 2. MaskGIT's pads images with zeros at their ends only."""

    def __init__(self, width: int, network: str):
        self.pads_ends = network == "maskgit"
        super().__init__(width, width, 3, stride=2, padding=0 if self.pads_ends else 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)) if self.pads_ends else x)


def _upsample(width: int, network: str) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if network == "maskgit":
        layers["resize"] = nn.Upsample(scale_factor=2)
        layers["conv"] = nn.Conv2d(width, width, 3, padding=1)
    else:
        layers["conv"] = nn.Conv2d(width, 4 * width, 3, padding=1)
        layers["shuffle"] = _DepthToSpace()
    return nn.Sequential(layers)


class _DepthToSpace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return depth_to_space(x, 2)


def depth_to_space(x: Tensor, factor: int) -> Tensor:
    """(B, factor²·C, H, W) -> (B, C, factor·H, factor·W); the C channels of a pixel follow each
    other."""
    x = x.unflatten(1, (factor**2, -1)).transpose(1, 2).flatten(1, 2)
    return F.pixel_shuffle(x, factor)


class _AdaptiveGroupNorm(nn.Module):
    """A group norm whose scale and shift depend on the code vectors (B, D, H_N, W_N)."""

    def __init__(self, latent_channels: int, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, EPS, affine=False)
        self.gamma = nn.Linear(latent_channels, width)
        self.beta = nn.Linear(latent_channels, width)

    def forward(self, x: Tensor, quantized: Tensor) -> Tensor:
        vectors = quantized.flatten(2)
        scale = self.gamma((vectors.var(-1) + EPS).sqrt())
        shift = self.beta(vectors.mean(-1))
        return scale[..., None, None] * self.norm(x) + shift[..., None, None]
