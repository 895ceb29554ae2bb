"""Forms of `P_Θ(finer | z)`: one walk over groups of positions, whatever the order.

The positions of the finer grid are split into groups. The walk predicts them in sequence:
positions inside a group are independent given z and all earlier groups, and the colours of one
pixel are predicted one after the other. A single network carries its state through all the groups
and takes in each group's values once they are known, so likelihood, sampling and coding cost one
pass, and no later value can be seen because it has not been put in yet.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration import ProgressiveVAELevelConfig
from .networks import ChannelNorm, PixelEmbedding, Upsample, ZeroLinear, residual_blocks

# What to do at one step of a walk: (group, channel, logits (B, h, w, V)) -> int64 (B, h, w).
Choose = Callable[["Group", int, Tensor], Tensor]


@dataclass(frozen=True)
class Group:
    """The positions `offset + stride · (y, x)` of the finer grid, predicted together."""

    stride: int
    offset: tuple[int, int] = (0, 0)

    def of(self, grid: Tensor) -> Tensor:
        """The view (..., H/stride, W/stride) of a grid (..., H, W) at this group's positions."""
        return grid[..., self.offset[0] :: self.stride, self.offset[1] :: self.stride]


def factorized_order(downsample: int) -> list[Group]:
    return [Group(stride=1)]


def lattice_order(downsample: int) -> list[Group]:
    """The coarse lattice, then each halving of its stride: diagonal, horizontal, vertical."""
    groups = [Group(downsample)]
    for stride in (2**k for k in range(int(math.log2(downsample)), 0, -1)):
        half = stride // 2
        groups += [Group(stride, (half * y, half * x)) for y, x in ((1, 1), (0, 1), (1, 0))]
    return groups


ORDERS = {"factorized": factorized_order, "lattice": lattice_order}


class Stage(nn.Module):
    """The part of the network that belongs to one group: refine, predict, take in."""

    def __init__(self, config: ProgressiveVAELevelConfig, num_upsamples: int, is_final: bool):
        super().__init__()
        width, channels = config.hidden_size, config.value_channels
        self.upsample = nn.Sequential(*(Upsample(width) for _ in range(num_upsamples)))
        self.blocks = residual_blocks(width, config.num_layers)
        self.head = nn.Sequential(ChannelNorm(width), nn.Conv2d(width, width, 1))
        self.logits = nn.ModuleList(ZeroLinear(width, config.num_values) for _ in range(channels))
        # Later colours see the earlier ones of the same pixel.
        self.colours = nn.ModuleList(
            nn.Linear(config.value_embed_dim, width) for _ in range(channels - 1)
        )
        if not is_final:
            self.take_in = nn.Conv2d(channels * config.value_embed_dim, width, 3, padding=1)


class Decoder(nn.Module):
    """`P_Θ(finer | z) = ∏_groups ∏_colours ∏_positions P(x | z, earlier groups and colours)`.

    Finer grids are int64 (B, C, H, W) with values 0 … V − 1: pixels with C colours and V = 256,
    or symbols with C = 1 and V = K_{i+1}.
    """

    def __init__(self, config: ProgressiveVAELevelConfig):
        super().__init__()
        self.config = config
        self.groups = ORDERS[config.decoder_order](config.downsample)
        embedding = PixelEmbedding if config.is_finest else nn.Embedding
        if len(self.groups) > 1 or config.value_channels > 1:  # else no value is ever looked at
            self.embedding = embedding(config.num_values, config.value_embed_dim)
        self.stem = nn.Conv2d(config.codebook_dim, config.hidden_size, 3, padding=1)
        strides = [config.downsample, *(group.stride for group in self.groups)]
        self.stages = nn.ModuleList(
            Stage(config, int(math.log2(before // group.stride)), group is self.groups[-1])
            for before, group in zip(strides, self.groups, strict=False)
        )

    def walk(self, quantized: Tensor, size: tuple[int, int], choose: Choose) -> Tensor:
        """Visit every group in order; `choose` supplies its values.

        Args:
            quantized: codebook[z] (B, D, h, w).
            size: (H, W) of the finer grid, with h = ⌈H / downsample⌉. The walk covers the grid
                padded to whole cells; what is chosen beyond (H, W) is replaced by 0.
            choose: called with (group, colour, logits (B, h_g, w_g, V)), returns the values of
                that colour at the group's positions, int64 (B, h_g, w_g).

        Returns:
            the chosen grid, int64 (B, C, H, W).
        """
        scale, channels = self.config.downsample, self.config.value_channels
        batch, _, height, width = quantized.shape
        inside = self.inside(quantized, size)
        grid = inside.new_zeros(batch, channels, height * scale, width * scale, dtype=torch.long)
        state = self.stem(quantized).contiguous(memory_format=torch.channels_last)
        for group, stage in zip(self.groups, self.stages, strict=True):
            state = stage.blocks(stage.upsample(state))
            features = stage.head(state).movedim(1, -1)  # (B, h_g, w_g, width)
            embedded: list[Tensor] = []
            is_final = group is self.groups[-1]
            for colour in range(channels):
                logits = stage.logits[colour](F.silu(features))
                values = choose(group, colour, logits) * group.of(inside)
                group.of(grid)[:, colour] = values
                if colour + 1 < channels or not is_final:
                    embedded.append(self.embedding(values))  # (B, h_g, w_g, E)
                if colour + 1 < channels:
                    features = features + stage.colours[colour](embedded[-1])
            if not is_final:
                state = state + stage.take_in(torch.cat(embedded, -1).movedim(-1, 1))
        return grid[..., : size[0], : size[1]]

    def inside(self, quantized: Tensor, size: tuple[int, int]) -> Tensor:
        """bool (h·downsample, w·downsample): true on the true positions of the padded grid."""
        height, width = (n * self.config.downsample for n in quantized.shape[-2:])
        rows = torch.arange(height, device=quantized.device) < size[0]
        return rows[:, None] & (torch.arange(width, device=quantized.device) < size[1])

    def log_prob(self, quantized: Tensor, finer: Tensor) -> Tensor:
        """log P_Θ(finer | z): (B, D, h, w), int64 (B, C, H, W) -> nats (B,)."""
        size = (finer.shape[-2], finer.shape[-1])
        inside = self.inside(quantized, size)
        padded = F.pad(finer, (0, inside.shape[1] - size[1], 0, inside.shape[0] - size[0]))
        terms = []

        def teacher(group: Group, colour: int, logits: Tensor) -> Tensor:
            values = group.of(padded)[:, colour]
            nats = F.cross_entropy(
                logits.flatten(0, 2).float(), values.flatten(), reduction="none"
            ).view(values.shape)
            terms.append(-(nats * group.of(inside)).sum((1, 2)))
            return values

        self.walk(quantized, size, teacher)
        return torch.stack(terms).sum(0)
