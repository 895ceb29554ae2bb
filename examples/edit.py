# /// script
# requires-python = ">=3.10"
# dependencies = ["progressive-vae"]
#
# [tool.uv.sources]
# progressive-vae = { path = "..", editable = true }
# ///
"""Draw pictures anew in part, and save what came of it as one picture.

python examples/edit.py
    with the Fashion-MNIST model that comes with the project, on images that it has drawn itself,
    one of each class, which it is told: half a minute on one CPU core.

python examples/edit.py --model you/pictures --images pictures

Rows: the images, what is known of them, four inpaintings, two variations that keep z_1 and two that
keep z_N, and the ways from the first three images to the last three, in as many steps as there are
columns.
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
        metadata={"help": "a folder of pictures of the model's size; drawn ones if not given"},
    )
    num_images: int = field(default=10, metadata={"help": "columns, 4 or more"})
    num_candidates: list[int] = field(
        default_factory=lambda: [64],
        metadata={"help": "of each inpainting: one number, or one for each factor"},
    )
    temperature: float = field(default=1.0, metadata={"help": "of variations and paths"})
    seed: int = 0
    output: str = "editing.png"

    def __post_init__(self):
        self.model = expand_home(self.model, "model")
        self.output = expand_home(self.output, "output")
        if self.images is not None:
            self.images = expand_home(self.images, "images")


def holes(count: int, size: tuple[int, int]) -> Tensor:
    """The right, the lower, the left half, the middle, and so on, bool (count, H, W)."""
    (height, width), masks = size, torch.zeros(count, *size, dtype=torch.bool)
    for i, mask in enumerate(masks):
        places = [
            mask[:, width // 2 :], mask[height // 2 :], mask[:, : width // 2],
            mask[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4],
        ]  # fmt: skip
        places[i % len(places)].fill_(True)
    return masks


def main(words: list[str]):
    arguments = HfArgumentParser(Arguments).parse_args_into_dataclasses(
        words, look_for_args_file=False
    )[0]
    count, seed = arguments.num_images, arguments.seed
    if count < 4:
        raise ValueError(f"expected num_images >= 4, got {count}")
    check_image_path(arguments.output, "output")
    pipe = ProgressiveVAEPipeline.from_pretrained(arguments.model)
    pipe.to(default_device()).set_progress_bar_config(disable=True)

    def noise(number: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed + i) for i in range(number)]

    classes: dict = {}
    if arguments.images is None:
        if pipe.labels:
            classes = {"class_labels": [i % len(pipe.labels) for i in range(count)]}
        times = 1 if classes else count
        images = pipe(**classes, num_images_per_prompt=times, generator=noise(count)).images
    else:
        paths = sorted(path for path in Path(arguments.images).iterdir() if path.is_file())[:count]
        images = [PIL.Image.open(path) for path in paths]
        if len(images) < 4:
            raise ValueError(f"expected 4 images or more in {arguments.images}, got {len(images)}")
        count = len(images)
    start = time.perf_counter()
    pixel_values = torch.cat(list(pixel_value_batches(images, pipe.image_shape, count)))
    masks = holes(count, pipe.image_shape[1:])
    rows = from_pixel_values(pixel_values, "pil")
    rows += from_pixel_values(pixel_values.masked_fill(masks[:, None], 0), "pil")
    candidates = arguments.num_candidates
    drawn = pipe.inpaint(
        images, masks, num_images_per_prompt=NUM_INPAINTINGS,
        num_candidates=candidates[0] if len(candidates) == 1 else candidates,
        generator=noise(NUM_INPAINTINGS * count), **classes,
    ).images  # fmt: skip
    rows += [image for i in range(NUM_INPAINTINGS) for image in drawn[i::NUM_INPAINTINGS]]
    told = {"temperature": arguments.temperature}
    for level in sorted({1, pipe.num_levels}):
        knows = any(part.config.num_classes for part in pipe.levels[level - 1 :])
        drawn = pipe.variations(
            images,
            level,
            NUM_VARIATIONS,
            generator=noise(NUM_VARIATIONS * count),
            **told,
            **(classes if knows else {}),
        ).images
        rows += [image for i in range(NUM_VARIATIONS) for image in drawn[i::NUM_VARIATIONS]]
    half = min(NUM_PATHS, count // 2)
    rows += pipe.interpolate(
        images[:half], images[-half:], steps=count, generator=noise(half), **told
    ).images
    save_image(image_grid(rows, count), arguments.output)
    print(f"drew {len(rows) // count - 2} rows of {count} in {time.perf_counter() - start:.1f} s")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    run_script(main)
