# /// script
# requires-python = ">=3.10"
# dependencies = ["progressive-vae[train]"]
#
# [tool.uv.sources]
# progressive-vae = { path = "..", editable = true }
# ///
"""Quality and speed for the same training time, beside what one writes in an afternoon.

    python examples/benchmark.py --train_minutes 30

trains two models for so many minutes each, and measures both: a progressive VAE of a
recipe of examples/train.py, and one grid of codes under a decoder with squared error and a causal
transformer as its prior. It prints distances of drawn images to held-out ones (in the features of a
classifier of the data set's labels, which must be there, and of patches), how many of them are of
the class asked for, and how well a classifier that has seen only such images tells real ones;
images/s drawn (at batch 1 and 250, whole and by factor), encoded and trained on, and the
floating-point operations of an image as a share of what products of large matrices reach on this
machine. Results are written to `--output_dir`, with drawn images of both in `samples.png`; what is
there is not trained again. `--model` adds the figures of a saved pipeline.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from baselines.vqvae_transformer import VQVAETransformer
from jsonargparse import ArgumentParser
from PIL.Image import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from progressive_vae import ProgressiveVAEPipeline
from progressive_vae.data.code_cache import GridDataset
from progressive_vae.data.source import open_dataset
from progressive_vae.evaluation.image_metrics import (
    Classifier,
    ClassifierFeatures,
    accuracy,
    cached_classifier,
    cached_samples,
    sample_labeled,
)
from progressive_vae.evaluation.sample_quality import BATCH_SIZE, distances, see, stored
from progressive_vae.evaluation.throughput import (
    has_bf16,
    matrix_rate,
    operations,
    rate,
    speeds_of,
    training_operations,
)
from progressive_vae.image_processor import from_pixel_values
from progressive_vae.models.value_types import uint8_to_signed, uint8_to_unit
from progressive_vae.paths import expand_home, make_folder
from progressive_vae.scripts import run_script, save_image
from progressive_vae.serialization import read_json, write_json, write_text
from progressive_vae.training import train
from progressive_vae.training.cli import read_flags
from progressive_vae.training.lock import locked
from progressive_vae.training.recipe import read_recipe
from progressive_vae.training.report import device_name
from progressive_vae.training.run import Run, make_accelerator
from progressive_vae.visualization import has_previews, image_grid

_ANEW = "delete the folder and begin anew"
MATRIX_RATE = "matrix_rate.json"  # of products as in the training, by its threads
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
RECIPE = Path(__file__).parent / "configs" / "fashion_mnist.yaml"


@dataclass
class Arguments:
    """
    Args:
        config: the recipe, whose shares of the time count, not its steps.
        dataset_name: in place of the recipe's.
        train_data_dir: likewise.
        train_minutes: of each of the two models.
        num_drawn: images for each distance.
        num_drawn_to_learn_from: drawn images that a classifier learns from; 0: none.
        classifier_steps: of each classifier.
        model: one more pipeline to measure.
        output_dir: for models and results.
        seed: of both.
        cpu: leave other devices alone.
    """

    config: str = str(RECIPE)
    dataset_name: str | None = None
    train_data_dir: str | None = None
    train_minutes: float = 30
    num_drawn: int = 10_000
    num_drawn_to_learn_from: int = 10_000
    classifier_steps: int = 4000
    model: str | None = None
    output_dir: str = "runs/benchmark"
    seed: int = 0
    cpu: bool = False

    def __post_init__(self):
        self.output_dir = expand_home(self.output_dir, "output_dir")
        if self.model is not None:
            self.model = expand_home(self.model, "model")


def afternoon(
    folder: Path, run: Run, minutes: float, dtype: torch.dtype
) -> tuple[VQVAETransformer, dict[str, float]]:
    """Trained, or as it was saved in `folder`; and images a second of its training."""
    channels, height, width = run.image_shape
    size = height // 4, width // 4
    device = run.accelerator.device
    model = VQVAETransformer(channels, len(run.class_names), size, run.settings.seed, device)
    if (folder / "costs.json").is_file():
        for name, part in model.parts().items():
            part.load_state_dict(load_file(folder / f"{name}.safetensors"))
        return model, read_json(folder / "costs.json", _ANEW)
    costs = model.fit(run.pixels["train"], 60 * minutes, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in model.parts().items():
        state = {key: value.contiguous().clone() for key, value in part.state_dict().items()}
        save_file(state, folder / f"{name}.safetensors")
    write_json(folder / "costs.json", costs)
    return model, costs


def drawn_by(
    arguments: Arguments,
    name: str,
    models: list[nn.Module],
    shape: tuple[int, int, int],
    draw: Callable[[int, int], Iterator[tuple[Tensor, Tensor]]],
    count: int,
) -> GridDataset:
    """So many drawn images, kept."""
    folder, seed = Path(arguments.output_dir) / "drawn" / f"{name}_{count}", arguments.seed
    return cached_samples(folder, models, shape, count, seed, draw(count, seed))


def drawn_by_ours(
    arguments: Arguments,
    name: str,
    pipe: ProgressiveVAEPipeline,
    count: int,
    preview: bool = False,
) -> GridDataset:
    factors, name = [getattr(pipe, each) for each in pipe.factor_names], name + "_preview" * preview
    draw = partial(sample_labeled, pipe, preview=preview)
    return drawn_by(arguments, name, factors, pipe.image_shape, draw, count)


@dataclass
class Yardstick:
    """How near drawn images are to held-out ones, and whether they are of the class asked for."""

    arguments: Arguments
    classifier: Classifier
    test: GridDataset

    def __post_init__(self):
        self.num_drawn = min(self.arguments.num_drawn, len(self.test))
        self.extractor = ClassifierFeatures(self.classifier)
        self.real = see(stored(self.test), self.num_drawn, self.extractor)

    def of_images(self, batches: Iterable[Tensor]) -> dict[str, float]:
        found = distances(self.real, see(batches, self.num_drawn, self.extractor))
        scales = enumerate(found["sliced_wasserstein"], 1)
        return {
            "Fréchet distance": found["frechet_distance"],
            "precision": found["precision"],
            "recall": found["recall"],
            **{f"distance of patches, scale {i}": distance for i, distance in scales},
        }

    def of_drawn(self, draw: Callable[[int], GridDataset]) -> dict[str, float]:
        drawn, count = draw(self.num_drawn), self.arguments.num_drawn_to_learn_from
        figures = self.of_images(stored(drawn))
        if drawn.batch([0])[1].item() < 0:  # the model knows no classes
            return figures
        told = "accuracy on drawn images, of the class asked for"
        figures[told] = accuracy(self.classifier, drawn)
        if count:
            seen, steps, seed = draw(count), self.arguments.classifier_steps, self.arguments.seed
            device = next(self.classifier.parameters()).device
            learned = cached_classifier(f"{seen.folder}.safetensors", seen, steps, seed, device)
            told = f"accuracy on test images, learned from {count} drawn ones"
            figures[told] = accuracy(learned, self.test)
        return figures


@torch.no_grad()
def speeds_of_afternoon(
    model: VQVAETransformer, images: Tensor, costs: dict[str, float]
) -> dict[str, float]:
    pixel_values, count = uint8_to_signed(images.to(model.device)), len(images)
    some = torch.arange(count) % model.num_classes
    return {
        "drawn, batch 1": rate(lambda: model.sample(some[:1], False), 1),
        f"drawn, batch {count}": rate(lambda: model.sample(some, False), count),
        f"drawn with a key-value cache, batch {count}": rate(
            lambda: model.sample(some, True), count
        ),
        "encoded": rate(lambda: model.vae(pixel_values), count),
        "GFLOP to draw an image": operations(lambda: model.sample(some[:8], False)) / 8e9,
        **{f"trained on, {name}": value for name, value in costs.items()},
    }


def speeds_of_ours(
    pipe: ProgressiveVAEPipeline,
    images: Tensor,
    costs: dict,
    dtype: torch.dtype = torch.float32,
    matrix_rate_in_training: float = math.nan,
) -> dict[str, float]:
    figures, gflop = speeds_of(pipe, images), training_operations(pipe, images[:8])
    for phase, cost in costs.items():
        if phase in gflop:
            figures[f"trained on, {phase}"] = cost["images_per_second"]
            share = gflop[phase] * 1e9 * cost["images_per_second"] / matrix_rate_in_training
            figures[f"share of the rate of {NAMES[dtype]} products, training {phase}"] = share
    share = figures["GFLOP to draw an image"] * 1e9 * figures[f"drawn, batch {len(images)}"]
    of_products = matrix_rate(torch.float32, pipe.device)
    figures["share of the rate of fp32 products, drawing"] = share / of_products
    return figures


def speeds_of_previews(pipe: ProgressiveVAEPipeline, count: int) -> dict[str, float]:
    def draw(count: int):
        return pipe(num_images_per_prompt=count, batch_size=count, preview=True, output_type="pt")

    return {f"drawn, batch {size}": rate(partial(draw, size), size) for size in (1, count)}


def picture_of(models: list[GridDataset], num_classes: int, columns: int) -> Image:
    """A row for each class, at most ten, and in it so many images of each model."""
    whole = slice(0, columns * num_classes)
    sides = [drawn.batch(whole)[0].unflatten(0, (columns, num_classes)) for drawn in models]
    rows = torch.cat(sides).movedim(1, 0)[:10].flatten(0, 1)  # (10 · columns · models, C, H, W)
    return image_grid(from_pixel_values(uint8_to_signed(rows), "pil"), columns * len(models))


def table(columns: dict[str, dict[str, float]]) -> str:
    rows = list(dict.fromkeys(name for column in columns.values() for name in column))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        figures = [column.get(row) for column in columns.values()]
        cells = ["" if x is None else f"{x:.0f}" if x >= 1000 else f"{x:.4g}" for x in figures]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(words: list[str]):
    parser = ArgumentParser(
        exit_on_error=False, description="Quality and speed for the same training time."
    )
    parser.add_class_arguments(Arguments)
    arguments = Arguments(**read_flags(parser, words))
    output_dir = make_folder(arguments.output_dir, "output_dir")
    on_cpu = arguments.cpu or not torch.accelerator.is_available()
    with locked(output_dir, PartialState(cpu=on_cpu)):
        compare(arguments)


def compare(arguments: Arguments):
    """Train both, unless that was done before, and measure them."""
    output_dir, seed, minutes = Path(arguments.output_dir), arguments.seed, arguments.train_minutes
    folder = output_dir / "progressive_vae"
    data = {"dataset_name": arguments.dataset_name, "train_data_dir": arguments.train_data_dir}
    run_settings = {"output_dir": str(folder), "seed": seed, "max_train_minutes": minutes,
                    "report_to": "none"}  # fmt: skip
    overrides = {"data": {name: value for name, value in data.items() if value is not None}}
    recipe = read_recipe(arguments.config, {**overrides, "run": run_settings})
    source = open_dataset(recipe.data)
    names = source.class_names
    if not names:
        raise ValueError(
            "expected a data set with labels, as distances are in the features of a classifier of "
            f"them, got {source.manifests['train'].dataset}"
        )
    made = {"recipe": recipe.sections, "dataset": source.manifests["train"].dataset}
    path = output_dir / "settings.json"
    if path.is_file() and (found := read_json(path, _ANEW)) != made:
        raise ValueError(f"expected models of {made} in {output_dir}, got those of {found}")
    write_json(path, made)
    accelerator = make_accelerator(recipe.run, arguments.cpu)
    device = accelerator.device
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    train(recipe.sections, accelerator=accelerator)
    if not (folder / MATRIX_RATE).is_file():  # what is measured later may have other threads
        write_json(folder / MATRIX_RATE, matrix_rate(dtype, device))
    pixels = source.pixels(folder / "cache" / "pixels", accelerator)
    run = Run(recipe.run, accelerator, len(recipe.levels), pixels, names)
    flat, flat_costs = afternoon(output_dir / "afternoon", run, minutes, dtype)
    pipe = loaded(folder, device)
    classifier = cached_classifier(
        output_dir / "classifier.safetensors", pixels["train"], arguments.classifier_steps, seed,
        device,
    )  # fmt: skip
    yardstick = Yardstick(arguments, classifier, pixels["test"])
    sample = pixels["train"].sample(yardstick.num_drawn, seed)
    images = pixels["test"].batch(slice(0, 250))[0].to(torch.uint8)
    ours = partial(drawn_by_ours, arguments, "progressive_vae", pipe)
    theirs = partial(drawn_by, arguments, "afternoon", [*flat.parts().values()], run.image_shape,
                     flat.sample_labeled)  # fmt: skip
    columns = {
        f"progressive VAE, {minutes:g} minutes": {
            **yardstick.of_drawn(ours),
            **speeds_of_ours(pipe, images, run.phases(), dtype,
                             read_json(folder / MATRIX_RATE, _ANEW, float)),
        },
        f"afternoon VQ-VAE, {minutes:g} minutes": {
            **yardstick.of_drawn(theirs),
            **speeds_of_afternoon(flat, images, flat_costs),
        },
        f"{len(sample)} training images": yardstick.of_images(
            uint8_to_unit(part) for part in sample.split(BATCH_SIZE)
        ),
    }  # fmt: skip
    if has_previews(pipe):  # which are expected pictures, as the other's are
        columns["its previews"] = yardstick.of_drawn(partial(ours, preview=True))
        columns["its previews"] |= speeds_of_previews(pipe, len(images))
    if arguments.model is not None:
        other = loaded(arguments.model, device)
        columns[Path(arguments.model).name] = {
            **yardstick.of_drawn(partial(drawn_by_ours, arguments, "model", other)),
            **speeds_of_ours(other, images, {}),
        }
    kinds = [torch.float32, *([torch.bfloat16] if has_bf16(device) else [])]
    rates = (f"{matrix_rate(kind, device) / 1e9:.0f} GFLOP/s in {NAMES[kind]}" for kind in kinds)
    text = (
        f"{table(columns)}\n\n{device_name(device)}, torch {torch.__version__}, seed "
        f"{seed}; distances of {yardstick.num_drawn} images to the test split, in the "
        "features of a small classifier, and of patches, of which scale 1 is the finest; the "
        f"classifier tells {100 * accuracy(classifier, pixels['test']):.1f} % of the test split; "
        f"trained in {NAMES[dtype]}; images/s where no unit is named; products of large matrices: "
        f"{', '.join(rates)}\n"
    )
    write_json(output_dir / "benchmark.json", columns)
    write_text(output_dir / "benchmark.md", text)
    if per_class := min(6, yardstick.num_drawn // len(names)):
        models = [ours, *([partial(ours, preview=True)] if has_previews(pipe) else []), theirs]
        drawn = [model(yardstick.num_drawn) for model in models]
        save_image(picture_of(drawn, len(names), per_class), output_dir / "samples.png")
    print(text)


def loaded(folder: str | Path, device: torch.device) -> ProgressiveVAEPipeline:
    pipe = ProgressiveVAEPipeline.from_pretrained(folder).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


if __name__ == "__main__":
    run_script(main)
