"""PIL images, arrays or tensors to `pixel_values` and back: floats in [−1, 1]."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, TypeAlias

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from .arguments import as_integer
from .configuration.level import NUM_PIXEL_VALUES
from .image_files import MODES, convert_image, image_array, is_deep
from .models.value_types import signed_to_indices, uint8_to_signed

Images: TypeAlias = "PIL.Image.Image | np.ndarray | Tensor | Iterable"


def as_images(images: Any) -> np.ndarray | Tensor | Sequence:
    """Images as a sequence with a length: arrays and tensors unchanged, one PIL image as a list,
    other ordered iterables (tuples, columns of a data set, generators) as a list.

    Raises:
        ValueError: another type.
    """
    if isinstance(images, PIL.Image.Image):
        return [images]
    is_array = isinstance(images, (np.ndarray, Tensor)) and images.ndim > 0
    is_excluded = isinstance(images, (str, bytes, Mapping, Set, np.ndarray, Tensor))
    if not is_array and (is_excluded or not isinstance(images, Iterable)):
        raise ValueError(
            f"expected images as PIL images, arrays or tensors, got {[type(images).__name__]}"
        )
    return images if is_array or isinstance(images, Sequence) else list(images)


def pixel_value_batches(
    images: Images, shape: tuple[int, int, int], batch_size: int
) -> Iterator[Tensor]:
    """Batches of pixel values, float (b, C, H, W) in [−1, 1] on the 256 values.

    Args:
        images: one PIL image, or an iterable of them that `as_images` accepts; uint8 arrays
            (B, H, W, C) or (B, H, W), tensors (B, C, H, W), or lists of such without B, in
            0 … 255; or floats in [0, 1], which are rounded to 8 bits.
        shape: (C, H, W) that every image must have.

    Raises:
        ValueError: no images, or an image of another type, shape, dtype, mode or range; a
            batch_size below 1.
    """
    batch_size = as_integer("batch_size", batch_size, 1)
    images = as_images(images)
    if not len(images):
        raise ValueError("expected images, got a list of length 0")
    if isinstance(images, (np.ndarray, Tensor)):
        for start in range(0, len(images), batch_size):
            yield _pixel_values(_as_tensor(images[start : start + batch_size], shape), shape)
        return
    remaining = iter(images)  # a column of a data set is decoded batch by batch
    while batch := list(itertools.islice(remaining, batch_size)):
        _check_types(batch)
        yield _pixel_values(_as_tensor(batch, shape), shape)


def _check_types(images: list):
    """Raise a `ValueError` unless all are PIL images, or all are arrays, or all are tensors."""
    types = {type(image) for image in images}
    # Images from several files are of several classes of Pillow's.
    is_pil = all(issubclass(image_type, PIL.Image.Image) for image_type in types)
    is_array = len(types) == 1 and isinstance(images[0], (np.ndarray, Tensor))
    if not is_pil and not is_array:
        names = sorted(image_type.__name__ for image_type in types)
        raise ValueError(f"expected images as PIL images, arrays or tensors, got {names}")


def _as_tensor(images: np.ndarray | Tensor | list, shape: tuple[int, int, int]) -> Tensor:
    if isinstance(images, list) and isinstance(images[0], PIL.Image.Image):
        images = np.stack([_from_pil(image, shape) for image in images])
    elif isinstance(images, list):
        sizes = {tuple(image.shape) for image in images}
        if len(sizes) > 1:
            raise ValueError(f"expected images of one size, got {sorted(sizes)}")
        images = torch.stack(images) if isinstance(images[0], Tensor) else np.stack(images)
    if isinstance(images, np.ndarray):
        # Arrays of numpy may have negative strides or be read-only, which torch does not allow.
        return VaeImageProcessor.numpy_to_pt(np.require(images, requirements=["C", "W"]))
    return images


def _from_pil(image: PIL.Image.Image, shape: tuple[int, int, int]) -> np.ndarray:
    """uint8 (H, W, C)."""
    channels, height, width = shape
    mode = MODES.get(channels)
    conversion = convert_image(image, mode) if mode and not is_deep(image) else None
    if conversion is None or not conversion.is_lossless:
        steps = f" ({', '.join(conversion.steps)})" if conversion else ""
        raise ValueError(
            f"expected images whose pixels become {channels} channels of 8 bits without a loss, "
            f"got a PIL image of {image.mode!r}{steps}"
        )
    if image.size != (width, height):
        raise ValueError(
            f"expected images of (C, H, W) = {shape}, "
            f"got a PIL image of width {image.width} and height {image.height}"
        )
    return image_array(conversion.image).transpose(1, 2, 0)


def _pixel_values(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    if tuple(images.shape[1:]) != shape:
        raise ValueError(f"expected images of (C, H, W) = {shape}, got {tuple(images.shape[1:])}")
    if images.dtype == torch.uint8:
        return uint8_to_signed(images)
    if not images.is_floating_point():
        raise ValueError(f"expected images of dtype uint8 or float, got {images.dtype}")
    lowest, highest = images.min().item(), images.max().item()
    if not (lowest >= 0 and highest <= 1):  # also catches NaN
        raise ValueError(f"expected images in [0, 1], got values in [{lowest}, {highest}]")
    return uint8_to_signed((images.float() * (NUM_PIXEL_VALUES - 1)).round())


def resize_and_convert(
    image: PIL.Image.Image, shape: tuple[int, int, int]
) -> tuple[PIL.Image.Image, list[str]]:
    """An image with a pipeline's (C, H, W), and a description of each conversion step.

    The center crop is resized, transparency is composited on white, and deeper images are scaled
    to 8 bits by their own range of values.
    """
    channels, height, width = shape
    size = image.size
    converted, steps, _ = convert_image(image, MODES[channels], reduce_depth=True)
    if size != (width, height):
        converted = PIL.ImageOps.fit(converted, (width, height))
        steps.append(f"center crop resized from {size[0]}×{size[1]} to {width}×{height}")
    return converted, steps


def from_pixel_values(
    pixel_values: Tensor, output_type: str
) -> list[PIL.Image.Image] | np.ndarray | Tensor:
    """Pixel values (B, C, H, W) as `"pt"`, `"np"` (B, H, W, C), both in [0, 1], or `"pil"`."""
    if output_type != "pil":
        return VaeImageProcessor().postprocess(pixel_values.float(), output_type)
    # Not by diffusers: it squeezes gray images, and a side of length 1 with the channel.
    arrays = signed_to_indices(pixel_values).to(torch.uint8).movedim(1, -1).numpy()
    return [PIL.Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a) for a in arrays]
