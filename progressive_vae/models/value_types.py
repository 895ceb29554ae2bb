"""The types of a finer grid's entries, and conversions between ranges of pixel values.

An entry is one color channel of a pixel, a code, or a block of its bits. Models see all of them as
indices 0 … V − 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..configuration.level import NUM_PIXEL_VALUES, ProgressiveVAELevelConfig
from ..configuration.validation import check_codes, has_readable_values
from .device_constant import bit_shifts

_HALF = (NUM_PIXEL_VALUES - 1) / 2  # 127.5


def uint8_to_signed(values: Tensor) -> Tensor:
    """0 … 255, of any dtype -> float32 in [−1, 1]."""
    return values.float() / _HALF - 1


def uint8_to_unit(values: Tensor) -> Tensor:
    """0 … 255, of any dtype -> float32 in [0, 1], the range of image libraries."""
    return values.float() / (NUM_PIXEL_VALUES - 1)


def unit_to_uint8(images: Tensor) -> Tensor:
    """Floats in [0, 1] -> the nearest values, uint8 in 0 … 255."""
    return (images * (NUM_PIXEL_VALUES - 1)).round().to(torch.uint8)


def signed_to_255(pixel_values: Tensor) -> Tensor:
    """Floats in [−1, 1] -> float32 in [0, 255]."""
    return (pixel_values.float() + 1) * _HALF


def signed_to_indices(pixel_values: Tensor) -> Tensor:
    """Floats in [−1, 1] -> the nearest values, int64 in 0 … 255."""
    return signed_to_255(pixel_values).round().long()


@dataclass(frozen=True)
class PixelValues:
    """Color channels of pixels: float (B, C, H, W) in [−1, 1], on the 256 values of an image."""

    channels: int

    def to_indices(self, finer: Tensor) -> Tensor:
        """Pixels -> int64 (B, C, H, W) in 0 … V − 1.

        Raises:
            ValueError: `finer` of another shape or dtype, or, on the CPU, outside its range.
        """
        if finer.ndim != 4 or finer.shape[1] != self.channels or not finer.numel():
            raise ValueError(
                f"expected finer of shape (B, {self.channels}, H, W), got {tuple(finer.shape)}"
            )
        if not finer.is_floating_point():
            raise ValueError(f"expected finer of a floating dtype in [-1, 1], got {finer.dtype}")
        if has_readable_values(finer):
            lowest = finer.min().item()
            highest = finer.max().item()
            if not (lowest >= -1 and highest <= 1):  # also catches NaN
                raise ValueError(f"expected finer in [-1, 1], got values in [{lowest}, {highest}]")
        return signed_to_indices(finer)

    def from_indices(self, indices: Tensor) -> Tensor:
        """The inverse."""
        return uint8_to_signed(indices)


@dataclass(frozen=True)
class CodeValues:
    """Codes of the finer level: int64 (B, H, W) in 0 … V − 1."""

    num_values: int

    def to_indices(self, finer: Tensor) -> Tensor:
        """Codes -> int64 (B, 1, H, W).

        Raises:
            ValueError: as `PixelValues.to_indices`.
        """
        check_codes(finer, self.num_values, name="finer")
        return finer[:, None]

    def from_indices(self, indices: Tensor) -> Tensor:
        """The inverse."""
        return indices[:, 0]


@dataclass(frozen=True)
class BlocksOfCodes:
    """Codes of the finer level, int64 (B, H, W), as blocks of bits, the most significant first.

    Args:
        num_blocks: C, at each position.
        bits: of a block, which has V = 2^bits values.
    """

    num_blocks: int
    bits: int

    def to_indices(self, finer: Tensor) -> Tensor:
        """Codes -> int64 (B, C, H, W) in 0 … V − 1.

        Raises:
            ValueError: as `PixelValues.to_indices`.
        """
        check_codes(finer, 2 ** (self.bits * self.num_blocks), name="finer")
        return self.split(finer)

    def split(self, codes: Tensor) -> Tensor:
        """`to_indices` without checks."""
        return (codes[:, None] >> self._shifts(codes.device)) & (2**self.bits - 1)

    def from_indices(self, indices: Tensor) -> Tensor:
        """The inverse."""
        return (indices << self._shifts(indices.device)).sum(1)

    def _shifts(self, device: torch.device) -> Tensor:
        return self.bits * bit_shifts(self.num_blocks, device)[:, None, None]


def make_value_type(
    config: ProgressiveVAELevelConfig,
) -> PixelValues | CodeValues | BlocksOfCodes:
    """The type of the entries of a level's finer grid.

    The grid's channels are `config.value_channels`, its number of values `config.num_values`.
    """
    if config.is_finest:
        return PixelValues(config.value_channels)
    if config.bits_per_block:
        return BlocksOfCodes(config.value_channels, config.bits_per_block)
    return CodeValues(config.num_values)
