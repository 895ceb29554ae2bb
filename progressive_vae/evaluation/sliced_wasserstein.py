"""Sliced Wasserstein distance between patches of Laplacian pyramids (Karras et al. 2018,
"Progressive growing of GANs"). It needs neither labels nor a network.

The finest scale measures sharpness and texture, the coarsest one large shapes.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

PATCH_SIZE = 7
MAX_PATCHES = 2**16  # at each scale
MAX_PATCHES_PER_IMAGE = 128
NUM_DIRECTIONS = 512


def laplacian_pyramid(images: Tensor) -> list[Tensor]:
    """Return the Laplacian pyramid of images (B, C, H, W), the finest scale first.

    Each scale is the difference between an image and its coarser version, upsampled. The coarsest
    scale is an image of at least two patches a side.
    """
    levels = [images]
    while min(levels[-1].shape[-2:]) >= 4 * PATCH_SIZE:
        levels.append(_blur(levels[-1])[..., ::2, ::2])
    finer = [
        fine - F.interpolate(coarse, fine.shape[-2:], mode="bilinear", align_corners=False)
        for fine, coarse in zip(levels, levels[1:], strict=False)
    ]
    return [*finer, levels[-1]]


def _blur(images: Tensor) -> Tensor:
    """Blur images with the 5×5 binomial filter."""
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=images.device) / 16
    kernel = (row[:, None] * row).expand(images.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), kernel, groups=images.shape[1])


def patches_of(batches: Iterable[Tensor], num_images: int, seed: int = 0) -> list[Tensor]:
    """Return random patches (n, C, 7, 7) of each scale, the finest first.

    Args:
        batches: images (B, C, H, W) in [0, 1].
        num_images: in all batches, which bounds the number of patches an image.

    Raises:
        ValueError: images smaller than a patch.
    """
    generator = torch.Generator().manual_seed(seed)
    count = max(1, min(MAX_PATCHES_PER_IMAGE, MAX_PATCHES // num_images))
    patches: list[list[Tensor]] = []  # of each batch, of each scale
    for images in batches:
        height, width = images.shape[-2:]
        if min(height, width) < PATCH_SIZE:
            raise ValueError(
                f"expected images of at least {PATCH_SIZE}×{PATCH_SIZE}, got {height}×{width}"
            )
        pyramid = laplacian_pyramid(images)
        patches.append([_random_patches(scale, count, generator) for scale in pyramid])
    return [torch.cat(scale) for scale in zip(*patches, strict=True)]


def _random_patches(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` patches of each image (B, C, H, W): (B·count, C, 7, 7)."""
    windows = images.unfold(2, PATCH_SIZE, 1).unfold(3, PATCH_SIZE, 1)  # (B, C, h, w, 7, 7)
    shape = (len(images), count)
    y = torch.randint(windows.shape[2], shape, generator=generator)
    x = torch.randint(windows.shape[3], shape, generator=generator)
    rows = torch.arange(len(images))[:, None]
    return windows[rows, :, y, x].flatten(0, 1)  # (B·count, C, 7, 7)


def sliced_wasserstein(real: list[Tensor], samples: list[Tensor], seed: int = 0) -> list[float]:
    """Return the sliced Wasserstein distance between two sets of patches at each scale.

    It is 1000 times the mean absolute difference between sorted projections on random directions.

    Args:
        real: patches (n, C, 7, 7) of each scale; of two sets as many are compared as both have.
    """
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for real_patches, sample_patches in zip(real, samples, strict=True):
        count = min(len(real_patches), len(sample_patches))
        directions = torch.randn(real_patches[0].numel(), NUM_DIRECTIONS, generator=generator)
        directions = directions / directions.norm(dim=0)
        real_projections, sample_projections = (
            (_normalize(patches[:count]).flatten(1) @ directions).sort(0).values
            for patches in (real_patches, sample_patches)
        )
        distances.append(1000 * (real_projections - sample_projections).abs().mean().item())
    return distances


def _normalize(patches: Tensor) -> Tensor:
    """Scale each channel of all patches to mean 0 and variance 1."""
    variance, mean = torch.var_mean(patches, (0, 2, 3), keepdim=True)
    return (patches - mean) / (variance.sqrt() + 1e-8)
