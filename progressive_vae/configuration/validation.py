"""Grid sizes of a stack of levels, and checks that its parts and codes fit together."""

import itertools
import math

import torch
from torch import Tensor

from .level import MAX_RASTER_POSITIONS, MAX_TRANSFORMER_SIDE, ProgressiveVAELevelConfig
from .prior import ProgressiveVAEPriorConfig

MAX_LEVELS = 8


def grid_sizes(
    configs: list[ProgressiveVAELevelConfig], image_size: tuple[int, int]
) -> list[tuple[int, int]]:
    """Return [(H_1, W_1) … (H_N, W_N), (H, W)]: each level's codes, by ceiling division, then the
    image.

    Args:
        configs: of [level_1 … level_N].
        image_size: (H, W).

    Raises:
        ValueError: the finest level's tokenizer is for images of another size.
    """
    sizes = [(image_size[0], image_size[1])]
    for config in reversed(configs):
        sizes.insert(0, config.codes_size(sizes[0]))
    return sizes


def check_parts(
    prior: ProgressiveVAEPriorConfig | None,
    slots: list[ProgressiveVAELevelConfig | None],
    image_size: list[int] | tuple[int, ...] | None,
) -> list[int]:
    """Check that a prior and levels fit together, and return the image size [H, W].

    Args:
        prior: config of the prior, if there is one.
        slots: configs of [level_1 … level_8], `None` for levels that are not there.
        image_size: [H, W]; `None`: computed from the prior's grid.

    Raises:
        ValueError: the parts do not fit together or do not fit the image size.
    """
    configs = check_levels(slots)
    check_classes([prior, *configs])
    check_condition_dims([prior, *configs])
    return check_image_size(image_size, configs, prior)


def check_levels(slots: list[ProgressiveVAELevelConfig | None]) -> list[ProgressiveVAELevelConfig]:
    """Return the configs of [level_1 … level_N] out of those of [level_1 … level_8].

    Raises:
        ValueError: a level is missing between others, or does not fit the next.
    """
    indices = [i for i, config in enumerate(slots, 1) if config is not None]
    if not indices or indices != list(range(1, len(indices) + 1)):
        raise ValueError(f"expected levels 1 … N without a gap, got levels {indices}")
    configs = [config for config in slots if config is not None]
    for i, (config, finer) in enumerate(itertools.pairwise(configs), 1):
        if config.num_symbols != finer.codebook_size:
            raise ValueError(
                f"expected level_{i} with num_symbols={finer.codebook_size}, the codebook_size "
                f"of level_{i + 1}, got {config.num_symbols}"
            )
    if not configs[-1].is_finest:
        raise ValueError(
            f"expected level_{indices[-1]}, the finest, with num_channels, got a level whose "
            f"finer grid has num_symbols={configs[-1].num_symbols}"
        )
    return configs


def check_codes(
    codes: Tensor, codebook_size: int, size: tuple[int, ...] | None = None, name: str = "codes"
):
    """Raise a `ValueError` unless codes are int64 (B, H, W) in 0 … K − 1, of `size` (H, W) if it
    is not `None`.

    Their range is checked where that costs no wait for a device, by `has_readable_values`.
    """
    expected = "(B, H, W)" if size is None else f"(B, {size[0]}, {size[1]})"
    if codes.ndim != 3 or not codes.numel() or (size and tuple(codes.shape[1:]) != tuple(size)):
        raise ValueError(f"expected {name} of shape {expected}, got {tuple(codes.shape)}")
    if codes.dtype != torch.long:
        raise ValueError(f"expected {name} of dtype torch.int64, got {codes.dtype}")
    if has_readable_values(codes):
        check_code_range(codes, codebook_size, name)


def check_code_range(codes: Tensor, codebook_size: int, name: str = "codes"):
    """Raise a `ValueError` unless codes are in 0 … K − 1; it waits for the codes' device."""
    lowest, highest = int(codes.min()), int(codes.max())
    if lowest < 0 or highest >= codebook_size:
        raise ValueError(
            f"expected {name} in 0 … {codebook_size - 1}, got values in {lowest} … {highest}"
        )


def has_readable_values(tensor: Tensor) -> bool:
    """Whether reading a tensor's values makes nobody wait: on the CPU, outside compiled graphs."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_grids(
    codes: list[Tensor], configs: list[ProgressiveVAELevelConfig], sizes: list[tuple[int, int]]
):
    """Raise a `ValueError` unless `codes` are grids [z_1 … z_k] of one batch.

    Args:
        configs: of [level_1 … level_N].
        sizes: [(H_1, W_1) … (H_N, W_N)]; further entries are ignored.
    """
    if not 1 <= len(codes) <= len(configs):
        raise ValueError(f"expected codes of 1 … {len(configs)} levels, got {len(codes)}")
    for i, (z, config, size) in enumerate(zip(codes, configs, sizes, strict=False), 1):
        if z.ndim != 3 or tuple(z.shape[1:]) != size or len(z) != len(codes[0]):
            raise ValueError(
                f"expected codes of level {i} of shape ({len(codes[0])}, {size[0]}, {size[1]}), "
                f"got {tuple(z.shape)}"
            )
        check_codes(z, config.codebook_size, name=f"codes of level {i}")
        if not has_readable_values(z):
            check_code_range(z, config.codebook_size, f"codes of level {i}")


def check_classes(configs: list[ProgressiveVAELevelConfig | ProgressiveVAEPriorConfig | None]):
    """Raise a `ValueError` unless all class-conditional parts have the same classes."""
    names = [config.id2label for config in configs if config is not None and config.num_classes]
    if any(other != names[0] for other in names):
        raise ValueError(f"expected one id2label in all class-conditional parts, got {names}")


def check_condition_dims(
    configs: list[ProgressiveVAELevelConfig | ProgressiveVAEPriorConfig | None],
):
    """Raise a `ValueError` unless all parts with `condition_dim` have the same."""
    dims = [config.condition_dim for config in configs if config is not None]
    dims = [dim for dim in dims if dim is not None]
    if len({*dims}) > 1:
        raise ValueError(f"expected one condition_dim in all parts that have one, got {dims}")


def check_image_size(
    image_size: list[int] | tuple[int, ...] | None,
    configs: list[ProgressiveVAELevelConfig],
    prior: ProgressiveVAEPriorConfig | None,
) -> list[int]:
    """Return the image size [H, W], computed from the prior's grid if `image_size` is `None`.

    Raises:
        ValueError: neither an image size nor a prior; an image size that is not two positive
            integers; a prior of another z_1; a grid that is too large for its decoder; or a
            lattice much coarser than the grid, which would be padded to its stride.
    """
    if image_size is None:
        if prior is None:
            raise ValueError("expected image_size=[H, W] of a pipeline without a prior, got None")
        size = (prior.grid_size[0], prior.grid_size[1])
        for config in configs:
            size = config.finer_size(size)
        image_size = [*size]
    is_pair = isinstance(image_size, (list, tuple)) and len(image_size) == 2
    if not is_pair or any(int(n) != n or n < 1 for n in image_size):
        raise ValueError(f"expected image_size of two positive integers, got {image_size}")
    height, width = (int(n) for n in image_size)
    sizes = grid_sizes(configs, (height, width))
    for i, (config, finer) in enumerate(zip(configs, sizes[1:], strict=True), 1):
        if config.ordering == "raster" and math.prod(finer) > MAX_RASTER_POSITIONS:
            raise ValueError(
                f"expected level_{i} to have a finer grid of at most {MAX_RASTER_POSITIONS} "
                f"positions for ordering='raster', got {finer[0]}×{finer[1]}"
            )
        if config.decoder_type == "transformer" and max(finer) > MAX_TRANSFORMER_SIDE:
            raise ValueError(
                f"expected level_{i} to have a finer grid of at most {MAX_TRANSFORMER_SIDE} rows "
                f"and columns for decoder_type='transformer', got {finer[0]}×{finer[1]}"
            )
        padded_size = max(config.downsample, 2 ** math.ceil(math.log2(max(finer))))
        if config.ordering == "lattice" and 2 ** ((config.num_groups or 1) // 3) > padded_size:
            largest = 1 + 3 * int(math.log2(padded_size))
            raise ValueError(
                f"expected level_{i} to have num_groups <= {largest} for lattices of a finer grid "
                f"of {finer[0]}×{finer[1]}, got {config.num_groups}"
            )
    if prior is not None:
        expected = (configs[0].codebook_size, sizes[0])
        got = (prior.codebook_size, tuple(prior.grid_size))
        if got != expected:
            raise ValueError(
                f"expected prior with (codebook_size, grid_size)={expected} to fit level_1 and "
                f"image_size={[height, width]}, got {got}"
            )
    return [height, width]
