"""Colors that a pixel can copy from pixels of earlier groups, and the weights of the copies.

Pixel art has few colors: a pixel mostly has the color of a neighbor, or one that occurs elsewhere
in the image. A copy is of the whole color, not of one channel after the other.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import AlignedLinear, ZeroLinear

KEY_DIM = 32
CHANNEL_BITS = 8
COLOR_BITS = 32  # of a packed color; the bits above hold a count
NUM_NEAREST = 4
NO_COLOR = -1


class Palette(NamedTuple):
    """The colors that are most frequent in the earlier groups of an image.

    Args:
        colors: int64 (B, C, M).
        log_frequencies: of each color among all pixels of these groups, float32 (B, M); −∞ where
            the image has fewer colors.
    """

    colors: Tensor
    log_frequencies: Tensor

    @classmethod
    def of_pixels(cls, packed: Tensor, num_channels: int, size: int) -> "Palette":
        """That of packed colors, (B, n), of which `NO_COLOR` does not count."""
        ordered = packed.sort(1).values
        is_first = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True)
        rank = is_first.long().cumsum(1) - 1  # of the color among the image's colors
        is_color = ordered != NO_COLOR
        counts = torch.zeros_like(ordered).scatter_add(1, rank, is_color.long())
        # Count and color in one integer, so that equal counts have an order.
        keys = (counts.gather(1, rank) << COLOR_BITS) | ordered
        keys = torch.where(is_first & is_color, keys, 0)
        keys = F.pad(keys, (0, max(0, size - keys.shape[1]))).topk(size, 1).values
        frequencies = (keys >> COLOR_BITS).float() / is_color.sum(1, keepdim=True)
        return cls(unpack_colors(keys & (2**COLOR_BITS - 1), num_channels), frequencies.log())


class ColorSources(NamedTuple):
    """The colors that n pixels can copy.

    Args:
        nearest: the nearest values of earlier groups, int64 (4, B, C, n).
        palette: of the earlier groups.
    """

    nearest: Tensor
    palette: Palette

    @property
    def colors(self) -> Tensor:
        """Those of the nearest pixels, then the palette's: int64 (B, C, n, 4 + M)."""
        nearest = self.nearest.movedim(0, -1)
        palette = self.palette.colors[:, :, None].expand(-1, -1, nearest.shape[2], -1)
        return torch.cat([nearest, palette], -1)


class ColorPointer(nn.Module):
    """Log-weights of a `CopyMixture`: pointers to the nearest pixels and to a palette.

    A nearest pixel has a logit of its own. That of a color of the palette is a query times the
    color's key (pointer networks, Vinyals et al. 2015), plus a multiple of its log frequency.
    """

    def __init__(self, width: int):
        super().__init__()
        self.query = ZeroLinear(width, KEY_DIM)
        # The nearest pixels, no copy, and offset and slope of the palette's frequencies.
        self.scores = ZeroLinear(width, NUM_NEAREST + 3)

    def forward(self, features: Tensor, keys: Tensor, palette: Palette) -> Tensor:
        """Features (B, n, width), keys (B, M, `KEY_DIM`) -> float32 (B, n, 4 + M + 1)."""
        nearest, base, offset, slope = (
            self.scores(features).float().split([NUM_NEAREST, 1, 1, 1], -1)
        )
        logits = (self.query(features) @ keys.mT).float() * KEY_DIM**-0.5
        is_missing = (palette.log_frequencies == -torch.inf)[:, None]
        frequencies = palette.log_frequencies[:, None].masked_fill(is_missing, 0.0)
        logits = logits + offset + (1 + slope) * frequencies
        logits = logits.masked_fill(is_missing, -torch.inf)
        return torch.cat([nearest, logits, base], -1).log_softmax(-1)


class ColorKeys(nn.Module):
    """The keys of colors, from embeddings of their channels: (B, C, M, E) -> (B, M, `KEY_DIM`)."""

    def __init__(self, num_channels: int, embed_dim: int):
        super().__init__()
        self.hidden = AlignedLinear(num_channels * embed_dim, KEY_DIM)
        self.out = nn.Linear(KEY_DIM, KEY_DIM)

    def forward(self, embedded: Tensor) -> Tensor:
        return self.out(F.silu(self.hidden(embedded.transpose(1, 2).flatten(2))))


def pack_colors(values: Tensor) -> Tensor:
    """(B, C, ...) -> (B, ...), one integer for all channels of a color."""
    channels = values.unbind(1)
    packed = channels[0]
    for channel in channels[1:]:
        packed = (packed << CHANNEL_BITS) | channel
    return packed


def unpack_colors(packed: Tensor, num_channels: int) -> Tensor:
    """(B, ...) -> (B, C, ...)."""
    shifts = [CHANNEL_BITS * i for i in reversed(range(num_channels))]
    return torch.stack([(packed >> shift) & (2**CHANNEL_BITS - 1) for shift in shifts], 1)
