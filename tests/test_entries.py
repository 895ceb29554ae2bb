import torch

from progressive_vae import ProgressiveVAELevelConfig
from progressive_vae.models.value_types import make_value_type, signed_to_indices, uint8_to_signed


def test_pixels_and_their_values():
    entries = make_value_type(ProgressiveVAELevelConfig(num_channels=3))
    values = torch.arange(768).view(1, 3, 16, 16) % 256
    pixels = entries.from_values(values)
    assert (pixels.min(), pixels.max()) == (-1, 1) and pixels.dtype == torch.float32
    assert torch.equal(entries.to_values(pixels), values)
    assert torch.equal(entries.to_values(pixels.double()), values)
    assert torch.equal(uint8_to_signed(values.to(torch.uint8)), pixels)
    assert torch.equal(signed_to_indices(pixels), values)


def test_symbols_are_their_own_values():
    entries, codes = make_value_type(ProgressiveVAELevelConfig(num_symbols=5)), torch.ones(2, 3, 4)
    values = entries.to_values(codes.long())
    assert values.shape == (2, 1, 3, 4)
    assert torch.equal(entries.from_values(values), codes.long())
