# /// script
# requires-python = ">=3.10"
# dependencies = ["progressive-vae"]
#
# [tool.uv.sources]
# progressive-vae = { path = "..", editable = true }
# ///
"""Inpaint, vary and interpolate images, and save the results as one grid.

python examples/edit.py
    with the project's Fashion-MNIST model, on its own samples, one of each class; edits are
    conditioned on the class. Half a minute on one CPU core.

python examples/edit.py --model you/photos --images photos

Rows: the images; the images with their masked regions in gray; four inpaintings; two variations
with fixed z_1 and two with fixed z_1 … z_N; interpolations from the first three images to the last
three, in as many steps as there are columns.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import PIL.Image
import torch
from torch import Tensor
from transformers import HfArgumentParser

from progressive_vae import ProgressiveVAEPipeline
from progressive_vae.image_processor import from_pixel_values, pixel_value_batches
from progressive_vae.paths import expand_home
from progressive_vae.scripts import check_image_path, default_device, run_script, save_image
from progressive_vae.visualization import image_grid

NUM_INPAINTINGS, NUM_VARIATIONS, NUM_PATHS = 4, 2, 3


@dataclass
class Arguments:
    model: str = field(
        default=str(Path(__file__).parent / "fashion_mnist"),
        metadata={"help": "a pipeline's folder, or its repository on the Hub"},
    )
    images: str | None = field(
        default=None,
        metadata={"help": "a folder of images of the model's size; samples by default"},
    )
    num_images: int = field(default=10, metadata={"help": "columns, 4 or more"})
    num_candidates: list[int] = field(
        default_factory=lambda: [64],
        metadata={"help": "particles of each inpainting: one number, or one for each factor"},
    )
    temperature: float | None = field(
        default=None, metadata={"help": "of variations and interpolations; by default the model's"}
    )
    seed: int = 0
    output: str = "editing.png"

    def __post_init__(self):
        self.model = expand_home(self.model, "model")
        self.output = expand_home(self.output, "output")
        if self.images is not None:
            self.images = expand_home(self.images, "images")


def make_masks(count: int, height: int, width: int) -> Tensor:
    """Return masks of the right, lower and left half and of the center, in turn: bool (count, H,
    W)."""
    masks = torch.zeros(count, height, width, dtype=torch.bool)
    masks[0::4, :, width // 2 :] = True
    masks[1::4, height // 2 :] = True
    masks[2::4, :, : width // 2] = True
    masks[3::4, height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = True
    return masks


def open_images(folder: Path, count: int) -> list[PIL.Image.Image]:
    """Return the first `count` images of a folder, of which there must be at least 4."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())[:count]
    if len(paths) < 4:
        raise ValueError(f"expected 4 images or more in {folder}, got {len(paths)}")
    return [PIL.Image.open(path) for path in paths]


def make_generators(seed: int, count: int) -> list[torch.Generator]:
    """Return one generator for each of `count` results."""
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def images_and_condition(
    pipe: ProgressiveVAEPipeline, arguments: Arguments
) -> tuple[list[PIL.Image.Image], dict[str, list[int]]]:
    """Return the images to edit, and their class labels as keyword arguments, if there are any."""
    count = arguments.num_images
    if arguments.images is not None:
        return open_images(Path(arguments.images), count), {}
    condition = {}
    if pipe.labels:
        condition = {"class_labels": [i % len(pipe.labels) for i in range(count)]}
    images = pipe(
        **condition,
        num_images_per_prompt=1 if condition else count,
        generator=make_generators(arguments.seed, count),
    ).images
    return images, condition


def edit(
    pipe: ProgressiveVAEPipeline,
    images: list[PIL.Image.Image],
    condition: dict[str, list[int]],
    arguments: Arguments,
) -> list[PIL.Image.Image]:
    """Return the rows of the grid, one result of each image in a row."""
    count = len(images)
    seed = arguments.seed
    # The images and the masked images.
    pixel_values = torch.cat(list(pixel_value_batches(images, pipe.image_shape, count)))
    masks = make_masks(count, *pipe.image_shape[1:])
    rows = from_pixel_values(pixel_values, "pil")
    rows += from_pixel_values(pixel_values.masked_fill(masks[:, None], 0), "pil")
    # The pipeline returns the results of each image together.
    num_particles = arguments.num_candidates
    inpaintings = pipe.inpaint(
        images,
        masks,
        num_images_per_prompt=NUM_INPAINTINGS,
        num_particles=num_particles[0] if len(num_particles) == 1 else num_particles,
        generator=make_generators(seed, NUM_INPAINTINGS * count),
        **condition,
    ).images
    for i in range(NUM_INPAINTINGS):
        rows += inpaintings[i::NUM_INPAINTINGS]
    for level in sorted({1, pipe.num_levels}):
        is_conditional = any(part.config.num_classes for part in pipe.levels[level - 1 :])
        variations = pipe.variations(
            images,
            level,
            NUM_VARIATIONS,
            generator=make_generators(seed, NUM_VARIATIONS * count),
            temperature=arguments.temperature,
            **(condition if is_conditional else {}),
        ).images
        for i in range(NUM_VARIATIONS):
            rows += variations[i::NUM_VARIATIONS]
    num_pairs = min(NUM_PATHS, count // 2)
    rows += pipe.interpolate(
        images[:num_pairs],
        images[-num_pairs:],
        steps=count,
        generator=make_generators(seed, num_pairs),
        temperature=arguments.temperature,
    ).images
    return rows


def main(words: list[str]):
    arguments = HfArgumentParser(Arguments).parse_args_into_dataclasses(
        words, look_for_args_file=False
    )[0]
    if arguments.num_images < 4:
        raise ValueError(f"expected num_images >= 4, got {arguments.num_images}")
    check_image_path(arguments.output, "output")
    pipe = ProgressiveVAEPipeline.from_pretrained(arguments.model)
    pipe.to(default_device()).set_progress_bar_config(disable=True)
    images, condition = images_and_condition(pipe, arguments)
    count = len(images)
    start = time.perf_counter()
    rows = edit(pipe, images, condition, arguments)
    save_image(image_grid(rows, count), arguments.output)
    seconds = time.perf_counter() - start
    print(f"sampled {len(rows) // count - 2} rows of {count} in {seconds:.1f} s")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    run_script(main)
