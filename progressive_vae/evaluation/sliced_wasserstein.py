"""How near drawn pictures are to real ones, scale by scale, without labels or other networks: the
sliced Wasserstein distance of patches of Laplacian pyramids (Karras et al. 2018, progressive GAN).

The finest scale tells of sharpness and texture, the coarsest of the large shapes.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 7  # of a patch
NUM_PATCHES, NUM_PER_IMAGE = 2**16, 128  # of a scale at most, and of an image
NUM_DIRECTIONS = 512


def laplacian_pyramid(images: Tensor) -> list[Tensor]:
    """Images (B, C, H, W) -> what each scale adds to the next coarser one, the finest first; the
    coarsest, the last in which patches have room to differ, is an image."""
    levels = [images]
    while min(levels[-1].shape[-2:]) >= 4 * SIDE:
        levels.append(_blurred(levels[-1])[..., ::2, ::2])
    finer = [
        fine - F.interpolate(coarse, fine.shape[-2:], mode="bilinear", align_corners=False)
        for fine, coarse in zip(levels, levels[1:], strict=False)
    ]
    return [*finer, levels[-1]]


def _blurred(images: Tensor) -> Tensor:
    """By the binomial filter of 5×5."""
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=images.device) / 16
    kernel = (row[:, None] * row).expand(images.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), kernel, groups=images.shape[1])


def patches_of(batches: Iterable[Tensor], num_images: int, seed: int = 0) -> list[Tensor]:
    """Random patches (n, C, 7, 7) of each scale, the finest first, of images in [0, 1].

    Raises:
        ValueError: images that have no room for a patch.
    """
    generator = torch.Generator().manual_seed(seed)
    count = max(1, min(NUM_PER_IMAGE, NUM_PATCHES // num_images))
    scales: list[list[Tensor]] = []
    for images in batches:
        if min(images.shape[-2:]) < SIDE:
            raise ValueError(f"expected images of at least {SIDE}×{SIDE}, got {images.shape[-2:]}")
        found = [_random_patches(level, count, generator) for level in laplacian_pyramid(images)]
        scales = scales or [[] for _ in found]
        for parts, part in zip(scales, found, strict=True):
            parts.append(part)
    return [torch.cat(parts) for parts in scales]


def _random_patches(level: Tensor, count: int, generator: torch.Generator) -> Tensor:
    windows = level.unfold(2, SIDE, 1).unfold(3, SIDE, 1)  # (B, C, h, w, 7, 7)
    shape = (len(level), count)
    y = torch.randint(windows.shape[2], shape, generator=generator)
    x = torch.randint(windows.shape[3], shape, generator=generator)
    rows = torch.arange(len(level))[:, None]
    return windows[rows, :, y, x].flatten(0, 1)  # (B·count, C, 7, 7)


def sliced_wasserstein(real: list[Tensor], drawn: list[Tensor], seed: int = 0) -> list[float]:
    """Of equally many patches of two sets at each scale: 1000 times the mean distance of their
    sorted projections on random directions, each color with mean 0 and variance 1."""
    generator, distances = torch.Generator().manual_seed(seed), []
    for ours, theirs in zip(real, drawn, strict=True):
        count = min(len(ours), len(theirs))
        directions = torch.randn(ours[0].numel(), NUM_DIRECTIONS, generator=generator)
        directions = directions / directions.norm(dim=0)
        projected = [
            (_normalized(part[:count]).flatten(1) @ directions).sort(0).values
            for part in (ours, theirs)
        ]
        distances.append(1000 * (projected[0] - projected[1]).abs().mean().item())
    return distances


def _normalized(patches: Tensor) -> Tensor:
    variance, mean = torch.var_mean(patches, (0, 2, 3), keepdim=True)
    return (patches - mean) / (variance.sqrt() + 1e-8)
