"""Images of noise, and image files."""

import io

import numpy as np
import PIL.Image
import torch


def random_images(count: int = 12) -> list[PIL.Image.Image]:
    rng = np.random.default_rng(0)
    return [PIL.Image.fromarray(x) for x in rng.integers(0, 256, (count, 8, 8, 3), np.uint8)]


def noise_images(count, size, channels=3):
    """Noise and flat colors, first and last values among them."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (count, channels, *size), generator=generator, dtype=torch.uint8)
    noise[0], noise[-1] = 0, 255
    return noise


def as_png(image: PIL.Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def bomb() -> bytes:
    """A file of some kilobytes, and of 100 million pixels."""
    return as_png(PIL.Image.new("1", (10_000, 10_000)))


def photograph() -> PIL.Image.Image:
    """Not of the model's size, colors or shape."""
    x = np.linspace(0, 255, 120 * 80 * 3).reshape(80, 120, 3)
    return PIL.Image.fromarray(x.astype(np.uint8))
