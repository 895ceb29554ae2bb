import torch

from progressive_vae import ProgressiveVAELevelConfig
from progressive_vae.models.value_types import make_value_type, signed_to_indices, uint8_to_signed


def test_pixels_and_their_indices():
    value_type = make_value_type(ProgressiveVAELevelConfig(num_channels=3))
    indices = torch.arange(768).view(1, 3, 16, 16) % 256
    pixels = value_type.from_indices(indices)
    assert (pixels.min(), pixels.max()) == (-1, 1) and pixels.dtype == torch.float32
    assert torch.equal(value_type.to_indices(pixels), indices)
    assert torch.equal(value_type.to_indices(pixels.double()), indices)
    assert torch.equal(uint8_to_signed(indices.to(torch.uint8)), pixels)
    assert torch.equal(signed_to_indices(pixels), indices)


def test_codes_are_their_own_indices():
    value_type = make_value_type(ProgressiveVAELevelConfig(num_symbols=5))
    codes = torch.ones(2, 3, 4, dtype=torch.long)
    indices = value_type.to_indices(codes)
    assert indices.shape == (2, 1, 3, 4)
    assert torch.equal(value_type.from_indices(indices), codes)
