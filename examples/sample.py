# /// script
# requires-python = ">=3.10"
# dependencies = ["progressive-vae"]
#
# [tool.uv.sources]
# progressive-vae = { path = "..", editable = true }
# ///
"""Sample images from a pipeline and save them as one grid.

python examples/sample.py
    ten of each class of the project's Fashion-MNIST model, in seconds.

python examples/sample.py --model you/digits --class_labels 3 8 --guidance_scale 1.5
python examples/sample.py --model you/captions --prompt "a red house" "a boat" --guidance_scale 3
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser

from progressive_vae import ProgressiveVAEPipeline
from progressive_vae.paths import expand_home
from progressive_vae.scripts import check_image_path, default_device, run_script, save_image
from progressive_vae.visualization import image_grid


@dataclass
class Arguments:
    model: str = field(
        default=str(Path(__file__).parent / "fashion_mnist"),
        metadata={"help": "a pipeline's folder, or its repository on the Hub"},
    )
    class_labels: list[str] | None = field(
        default=None, metadata={"help": "names or ids of classes; all by default"}
    )
    prompt: list[str] | None = field(
        default=None, metadata={"help": "texts, of a model that is conditioned on them"}
    )
    negative_prompt: str | None = field(
        default=None, metadata={"help": "a text that guidance leads away from"}
    )
    num_images_per_prompt: int = field(
        default=10, metadata={"help": "images of each class or text"}
    )
    guidance_scale: float | None = field(
        default=None, metadata={"help": "of classifier-free guidance; by default the model's"}
    )
    temperature: float | None = field(
        default=None, metadata={"help": "by default the model's; 1: its exact distribution"}
    )
    top_p: float | None = None
    preview: bool = field(
        default=False, metadata={"help": "sample codes only, and show their preview"}
    )
    seed: int = 0
    output: str = "samples.png"

    def __post_init__(self):
        self.model = expand_home(self.model, "model")
        self.output = expand_home(self.output, "output")


def main(words: list[str]):
    arguments = HfArgumentParser(Arguments).parse_args_into_dataclasses(
        words, look_for_args_file=False
    )[0]
    check_image_path(arguments.output, "output")
    pipe = ProgressiveVAEPipeline.from_pretrained(arguments.model)
    pipe.to(default_device()).set_progress_bar_config(disable=True)
    labels = [
        int(name) if name.isdigit() and name not in pipe.labels else name
        for name in arguments.class_labels or ([] if arguments.prompt else pipe.labels)
    ] or None
    rows = arguments.prompt or labels or ["no class"]
    count = arguments.num_images_per_prompt * len(rows)
    start = time.perf_counter()
    images = pipe(
        labels,
        prompt=arguments.prompt,
        negative_prompt=arguments.negative_prompt,
        num_images_per_prompt=arguments.num_images_per_prompt,
        guidance_scale=arguments.guidance_scale,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        preview=arguments.preview,
        generator=[torch.Generator().manual_seed(arguments.seed + i) for i in range(count)],
    ).images
    seconds = time.perf_counter() - start
    save_image(image_grid(images, arguments.num_images_per_prompt), arguments.output)
    print(f"sampled {count} images in {seconds:.1f} s, one row for {rows}")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    run_script(main)
