"""Sliced Wasserstein distances between images with known differences."""

import pytest
import torch
import torch.nn.functional as F

from progressive_vae.evaluation import sliced_wasserstein as metric
from progressive_vae.evaluation.sliced_wasserstein import (
    laplacian_pyramid,
    patches_of,
    sliced_wasserstein,
)


@pytest.fixture(autouse=True)
def all_directions(monkeypatch):
    monkeypatch.setattr(metric, "NUM_DIRECTIONS", 512)


def smooth(count: int, seed: int, shape: tuple[int, int] = (5, 5)) -> torch.Tensor:
    """Colored clouds with a little texture, 64×64."""
    generator = torch.Generator().manual_seed(seed)
    clouds = torch.rand(count, 3, *shape, generator=generator)
    clouds = F.interpolate(clouds, (64, 64), mode="bilinear", align_corners=True)
    return clouds + 0.05 * torch.randn(count, 3, 64, 64, generator=generator)


def distances(one, two):
    sets = (patches_of(images.split(20), len(images)) for images in (one, two))
    return sliced_wasserstein(*sets)


def test_a_pyramid_adds_up_to_its_image():
    images = smooth(40, 0)
    pyramid = laplacian_pyramid(images)
    assert [level.shape[-1] for level in pyramid] == [64, 32, 16]
    image = pyramid[-1]
    for level in reversed(pyramid[:-1]):
        size = level.shape[-2:]
        image = level + F.interpolate(image, size, mode="bilinear", align_corners=False)
    assert torch.allclose(image, images, atol=1e-5)


@pytest.mark.slow
def test_each_scale_measures_its_own_difference():
    real, others = smooth(40, 0), smooth(40, 1)
    same = distances(real, others)
    assert distances(real, real) == [0.0, 0.0, 0.0]
    stripes = distances(
        real, others + 0.05 * (torch.arange(64) % 2)
    )  # one pixel wide: texture only
    assert stripes[0] > 3 * same[0] and stripes[2] < 2 * same[2]
    bands = distances(real, smooth(40, 1, (5, 1)))  # same texture, other shapes
    assert bands[2] > 2 * same[2] and bands[0] < 2 * same[0]


def test_images_smaller_than_a_patch_raise():
    assert len(patches_of([torch.rand(3, 1, 8, 8)], 3)) == 1
    with pytest.raises(ValueError, match="at least 7×7"):
        patches_of([torch.rand(3, 1, 5, 7)], 3)
