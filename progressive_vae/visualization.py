"""Image grids: samples, code maps, and reconstructions of each level."""

import PIL.Image
import torch
from diffusers.utils import make_image_grid
from PIL.Image import Image
from torch import Tensor

from .image_processor import from_pixel_values
from .models.value_types import uint8_to_signed
from .pipeline import ProgressiveVAEPipeline


def image_grid(images: list[Image], columns: int) -> Image:
    """Rows of `columns` images with a thin gap; small ones are enlarged without interpolation."""
    width, height = images[0].size
    scale = max(1, 64 // max(width, height))
    gap = 2
    cells = []
    for image in images:
        cell = PIL.Image.new(image.mode, (width * scale + gap, height * scale + gap))
        cell.paste(image.resize((width * scale, height * scale), PIL.Image.Resampling.NEAREST))
        cells.append(cell)
    return make_image_grid(cells, len(cells) // columns, columns)


def code_map(codes: Tensor) -> Image:
    """A grid of codes, int64 (H_i, W_i), as an image with one color for each code."""
    hue = (codes * 0.618034) % 1.0  # golden ratio: colors of neighboring codes differ
    light = 0.55 + 0.45 * ((codes * 0.754878) % 1.0)
    hsv = torch.stack([hue, torch.full_like(hue, 0.55), light], -1)
    bands = (255 * hsv).round().to(torch.uint8).movedim(-1, 0).cpu().numpy()
    return PIL.Image.merge("HSV", [*map(PIL.Image.fromarray, bands)]).convert("RGB")


def sample_grid_size(pipe: ProgressiveVAEPipeline) -> tuple[int, int]:
    """Rows and columns of `sample_grid`: a row for each class (at most 10), or 10 rows of an
    unconditional model, of 10 samples, or of 5 with their previews."""
    rows = min(pipe.stack.require_prior().config.num_classes, 10) or 10
    return rows, 5 if pipe.stack.has_previews else 10


def sample_grid(pipe: ProgressiveVAEPipeline, seed: int = 0, columns: int | None = None) -> Image:
    """Rows of samples, by the pipeline's sampling settings.

    With auxiliary decoders a row starts with the previews of the samples' z_1, then of z_2 …, and
    ends with the samples: the first block that looks wrong shows which factor spoils an image.
    """
    rows, default_columns = sample_grid_size(pipe)
    columns = columns or default_columns
    generators = [torch.Generator().manual_seed(seed + i) for i in range(rows * columns)]
    if pipe.stack.require_prior().config.num_classes:
        output = pipe(list(range(rows)), num_images_per_prompt=columns, generator=generators)
    else:
        output = pipe(num_images_per_prompt=rows * columns, generator=generators)
    blocks = [output.images]
    if pipe.stack.has_previews:
        levels = range(1, pipe.num_levels + 1)
        blocks = [*(pipe.preview(output.codes, level) for level in levels), *blocks]
    return side_by_side([image_grid(images, columns) for images in blocks])


def side_by_side(images: list[Image]) -> Image:
    """Images of one size in a row, with a gap that is wider than that of `image_grid`."""
    width, height = images[0].size
    step = width + 8
    row = PIL.Image.new(images[0].mode, (step * len(images) - 8, height), "white")
    for i, image in enumerate(images):
        row.paste(image, (i * step, 0))
    return row


def reconstruction_grid(pipe: ProgressiveVAEPipeline, images: Tensor, seed: int = 0) -> Image:
    """One row for each level, from the coarsest to the finest, then the images themselves.

    Row i holds reconstructions of uint8 images (B, C, H, W) from their own z_1 … z_i. The rows of
    sampled reconstructions follow those of the auxiliary decoders' previews, if there are any.
    """
    codes = pipe.encode(images)
    rows: list[Image] = []
    if pipe.stack.has_previews:
        for level in range(1, pipe.num_levels + 1):
            rows += pipe.preview(codes, level)
    for level in range(1, pipe.num_levels + 1):
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(images))]
        rows += pipe.decode(codes[:level], generator=generators)
    rows += from_pixel_values(uint8_to_signed(images), "pil")
    return image_grid(rows, len(images))
