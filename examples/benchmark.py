# /// script
# requires-python = ">=3.10"
# dependencies = ["progressive-vae[train]"]
#
# [tool.uv.sources]
# progressive-vae = { path = "..", editable = true }
# ///
"""Compare sample quality and speed with a baseline at equal training time.

    python examples/benchmark.py --train_minutes 30

trains a progressive VAE by a recipe of examples/train.py, and as baseline a VQ-VAE of one code
grid, trained with squared error, under a causal transformer as prior. For both it prints:

- Fréchet distance, precision and recall of samples in the features of a classifier of the dataset's
  labels, and the sliced Wasserstein distance of patches;
- the classifier's accuracy on conditional samples, and the classification accuracy score: accuracy
  on test images of a classifier trained on samples only;
- images/s sampled (at batch sizes 1 and 250, in total and by factor), encoded and trained on, and
  FLOP/s as a share of the FLOP/s of large matrix products on this machine.

It writes the results to `--output_dir`, with samples of both models in `samples.png`, and does not
train again what is there. `--model` adds a column for a saved pipeline.
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
from progressive_vae.evaluation.sample_quality import (
    BATCH_SIZE,
    compute_stats,
    distances,
    unit_batches,
)
from progressive_vae.evaluation.throughput import (
    count_flops,
    matrix_rate,
    rate,
    speeds_of,
    training_flops,
)
from progressive_vae.image_processor import from_pixel_values
from progressive_vae.models.value_types import uint8_to_signed, uint8_to_unit
from progressive_vae.paths import expand_home, make_folder
from progressive_vae.scripts import run_script, save_image
from progressive_vae.serialization import read_json, write_json, write_text
from progressive_vae.training import train
from progressive_vae.training.budget import TimeBudget
from progressive_vae.training.cli import read_flags
from progressive_vae.training.lock import locked
from progressive_vae.training.muon import has_bf16
from progressive_vae.training.recipe import Recipe, read_recipe
from progressive_vae.training.report import device_name
from progressive_vae.training.run import Run, make_accelerator
from progressive_vae.visualization import image_grid

_REMEDY = "delete the folder and start again"
MATRIX_RATE = "matrix_rate.json"  # FLOP/s in the precision of the training, and with its threads
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
RECIPE = Path(__file__).parent / "configs" / "fashion_mnist.yaml"


@dataclass
class Arguments:
    """
    Args:
        config: recipe of the progressive VAE. Its shares of the training time are used, and its
            numbers of steps are ignored.
        dataset_name: replaces that of the recipe.
        train_data_dir: replaces that of the recipe.
        train_minutes: for each of the two models, of which the same part is for metrics.
        num_drawn: number of samples for each metric.
        num_drawn_to_learn_from: samples to train a classifier on; 0: none.
        classifier_steps: for each classifier.
        model: another pipeline to measure.
        output_dir: for models and results.
        seed: of both models.
        cpu: use the CPU only.
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


def trained_baseline(
    folder: Path, run: Run, minutes: float, dtype: torch.dtype
) -> tuple[VQVAETransformer, dict[str, float]]:
    """Return the baseline, trained or read from `folder`, and images/s of its training."""
    channels, height, width = run.image_shape
    size = height // 4, width // 4
    device = run.accelerator.device
    model = VQVAETransformer(channels, len(run.class_names), size, run.settings.seed, device)
    if (folder / "costs.json").is_file():
        for name, part in model.parts().items():
            part.load_state_dict(load_file(folder / f"{name}.safetensors"))
        return model, read_json(folder / "costs.json", _REMEDY)
    costs = model.fit(run.pixels["train"], TimeBudget(minutes).fit_seconds, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in model.parts().items():
        state = {key: value.contiguous().clone() for key, value in part.state_dict().items()}
        save_file(state, folder / f"{name}.safetensors")
    write_json(folder / "costs.json", costs)
    return model, costs


def samples_of(
    arguments: Arguments,
    name: str,
    models: list[nn.Module],
    shape: tuple[int, int, int],
    sample: Callable[[int, int], Iterator[tuple[Tensor, Tensor]]],
    count: int,
) -> GridDataset:
    """Return a cache of `count` samples of a model."""
    folder = Path(arguments.output_dir) / "samples" / f"{name}_{count}"
    batches = sample(count, arguments.seed)
    return cached_samples(folder, models, shape, count, arguments.seed, batches)


def samples_of_pipeline(
    arguments: Arguments,
    name: str,
    pipe: ProgressiveVAEPipeline,
    count: int,
    preview: bool = False,
) -> GridDataset:
    """Return a cache of `count` samples of a pipeline, or of previews from sampled codes."""
    factors = [getattr(pipe, factor) for factor in pipe.factor_names]
    sample = partial(sample_labeled, pipe, preview=preview)
    name = f"{name}_preview" if preview else name
    return samples_of(arguments, name, factors, pipe.image_shape, sample, count)


@dataclass
class SampleMetrics:
    """Metrics of sample quality against held-out images."""

    arguments: Arguments
    classifier: Classifier
    test: GridDataset

    def __post_init__(self):
        self.num_samples = min(self.arguments.num_drawn, len(self.test))
        self.extractor = ClassifierFeatures(self.classifier)
        self.real = compute_stats(unit_batches(self.test), self.num_samples, self.extractor)

    def of_images(self, batches: Iterable[Tensor]) -> dict[str, float]:
        """Return the distances of images (b, C, H, W) in [0, 1]."""
        metrics = distances(self.real, compute_stats(batches, self.num_samples, self.extractor))
        scales = enumerate(metrics["sliced_wasserstein"], 1)
        return {
            "Fréchet distance": metrics["frechet_distance"],
            "precision": metrics["precision"],
            "recall": metrics["recall"],
            **{f"distance of patches, scale {i}": distance for i, distance in scales},
        }

    def of_samples(self, sample: Callable[[int], GridDataset]) -> dict[str, float]:
        """Return the distances of samples and, for a conditional model, accuracies.

        Args:
            sample: returns this number of samples.
        """
        samples = sample(self.num_samples)
        metrics = self.of_images(unit_batches(samples))
        if samples.batch([0])[1].item() < 0:  # the model is unconditional
            return metrics
        metrics["accuracy on samples"] = accuracy(self.classifier, samples)
        if count := self.arguments.num_drawn_to_learn_from:
            train = sample(count)
            student = cached_classifier(
                f"{train.folder}.safetensors",
                train,
                self.arguments.classifier_steps,
                self.arguments.seed,
                next(self.classifier.parameters()).device,
            )
            name = f"accuracy on test images, trained on {count} samples"
            metrics[name] = accuracy(student, self.test)
        return metrics


@torch.no_grad()
def baseline_speeds(
    model: VQVAETransformer, images: Tensor, costs: dict[str, float]
) -> dict[str, float]:
    """Return images/s and GFLOP of the baseline, as `pipeline_speeds`."""
    pixel_values = uint8_to_signed(images.to(model.device))
    count = len(images)
    labels = torch.arange(count) % model.num_classes
    return {
        "sampled, batch 1": rate(lambda: model.sample(labels[:1], False), 1),
        f"sampled, batch {count}": rate(lambda: model.sample(labels, False), count),
        f"sampled with a KV cache, batch {count}": rate(lambda: model.sample(labels, True), count),
        "encoded": rate(lambda: model.vae.encode(pixel_values), count),
        "GFLOP to sample an image": count_flops(lambda: model.sample(labels[:8], False)) / 8e9,
        **{f"trained on, {name}": value for name, value in costs.items()},
    }


def pipeline_speeds(
    pipe: ProgressiveVAEPipeline,
    images: Tensor,
    costs: dict,
    dtype: torch.dtype = torch.float32,
    matrix_rate_in_training: float = math.nan,
) -> dict[str, float]:
    """Return images/s, GFLOP, and FLOP/s as a share of those of large matrix products.

    Args:
        images: uint8 (B, C, H, W), to encode.
        costs: "images_per_second" of each phase of training.
        dtype: of the training.
        matrix_rate_in_training: FLOP/s of matrix products in `dtype`.
    """
    metrics = speeds_of(pipe, images)
    gflop = training_flops(pipe, images[:8])
    for phase, cost in costs.items():
        if phase in gflop:
            images_per_second = cost["images_per_second"]
            share = gflop[phase] * 1e9 * images_per_second / matrix_rate_in_training
            metrics[f"trained on, {phase}"] = images_per_second
            metrics[f"share of {DTYPE_NAMES[dtype]} matrix FLOP/s, training {phase}"] = share
    images_per_second = metrics[f"sampled, batch {len(images)}"]
    flops = metrics["GFLOP to sample an image"] * 1e9 * images_per_second
    share = flops / matrix_rate(torch.float32, pipe.device)
    metrics["share of fp32 matrix FLOP/s, sampling"] = share
    return metrics


def preview_speeds(pipe: ProgressiveVAEPipeline, count: int) -> dict[str, float]:
    def sample(size: int):
        return pipe(num_images_per_prompt=size, batch_size=size, preview=True, output_type="pt")

    return {f"sampled, batch {size}": rate(partial(sample, size), size) for size in (1, count)}


def sample_image(models: list[GridDataset], num_classes: int, columns: int) -> Image:
    """Return a grid with a row for each class, at most ten, and `columns` samples of each model."""
    first = slice(0, columns * num_classes)
    parts = [samples.batch(first)[0].unflatten(0, (columns, num_classes)) for samples in models]
    rows = torch.cat(parts).movedim(1, 0)[:10].flatten(0, 1)  # (10 · columns · models, C, H, W)
    return image_grid(from_pixel_values(uint8_to_signed(rows), "pil"), columns * len(models))


def table(columns: dict[str, dict[str, float]]) -> str:
    """Return the metrics of each column as Markdown."""
    rows = list(dict.fromkeys(name for column in columns.values() for name in column))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        values = [column.get(row) for column in columns.values()]
        cells = ["" if x is None else f"{x:.0f}" if x >= 1000 else f"{x:.4g}" for x in values]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(words: list[str]):
    parser = ArgumentParser(
        exit_on_error=False, description="Compare with a baseline at equal training time."
    )
    parser.add_class_arguments(Arguments)
    arguments = Arguments(**read_flags(parser, words))
    output_dir = make_folder(arguments.output_dir, "output_dir")
    on_cpu = arguments.cpu or not torch.accelerator.is_available()
    with locked(output_dir, PartialState(cpu=on_cpu)):
        compare(arguments)


def measure(
    arguments: Arguments,
    metrics: SampleMetrics,
    run: Run,
    pipe: ProgressiveVAEPipeline,
    baseline: VQVAETransformer,
    baseline_costs: dict[str, float],
    dtype: torch.dtype,
) -> tuple[dict[str, dict], list[Callable[..., Tensor]]]:
    """Return a column of metrics for each model, by its title, and functions that sample from the
    models that were trained here."""
    minutes = arguments.train_minutes
    train_images = run.pixels["train"].sample(metrics.num_samples, arguments.seed)
    images = run.pixels["test"].batch(slice(0, 250))[0].to(torch.uint8)
    sample = partial(samples_of_pipeline, arguments, "progressive_vae", pipe)
    sample_baseline = partial(
        samples_of,
        arguments,
        "baseline",
        [*baseline.parts().values()],
        run.image_shape,
        baseline.sample_labeled,
    )
    training_rate = read_json(run.output_dir / MATRIX_RATE, _REMEDY, float)
    columns = {
        f"progressive VAE, {minutes:g} minutes": {
            **metrics.of_samples(sample),
            **pipeline_speeds(pipe, images, run.phases(), dtype, training_rate),
        },
        f"baseline VQ-VAE, {minutes:g} minutes": {
            **metrics.of_samples(sample_baseline),
            **baseline_speeds(baseline, images, baseline_costs),
        },
        f"{len(train_images)} training images": metrics.of_images(
            uint8_to_unit(part) for part in train_images.split(BATCH_SIZE)
        ),
    }
    samplers = [sample, sample_baseline]
    if pipe.stack.has_previews:  # expected images, as those of the baseline
        sample_previews = partial(sample, preview=True)
        samplers.insert(1, sample_previews)
        columns["its previews"] = {
            **metrics.of_samples(sample_previews),
            **preview_speeds(pipe, len(images)),
        }
    if arguments.model is not None:
        other = loaded(arguments.model, run.accelerator.device)
        columns[Path(arguments.model).name] = {
            **metrics.of_samples(partial(samples_of_pipeline, arguments, "model", other)),
            **pipeline_speeds(other, images, {}),
        }
    return columns, samplers


def compare(arguments: Arguments):
    """Train both models unless they are trained already, measure them, and write the results."""
    output_dir = Path(arguments.output_dir)
    seed = arguments.seed
    minutes = arguments.train_minutes
    folder = output_dir / "progressive_vae"
    recipe = recipe_of(arguments, folder)
    source = open_dataset(recipe.data)
    dataset = source.manifests["train"].dataset
    if not source.class_names:
        raise ValueError(f"expected a dataset with labels to train a classifier on, got {dataset}")
    check_settings(output_dir, {"recipe": recipe.sections, "dataset": dataset})

    # Train.
    accelerator = make_accelerator(recipe.run, arguments.cpu)
    device = accelerator.device
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    train(recipe, accelerator=accelerator)
    if not (folder / MATRIX_RATE).is_file():  # a later call may have other threads
        write_json(folder / MATRIX_RATE, matrix_rate(dtype, device))
    pixels = source.pixels(folder / "cache" / "pixels", accelerator)
    run = Run(recipe.run, accelerator, len(recipe.levels), pixels, source.class_names)
    baseline, baseline_costs = trained_baseline(output_dir / "baseline", run, minutes, dtype)
    pipe = loaded(folder, device)
    classifier = cached_classifier(
        output_dir / "classifier.safetensors",
        pixels["train"],
        arguments.classifier_steps,
        seed,
        device,
    )

    # Measure: one column of the table for each model.
    metrics = SampleMetrics(arguments, classifier, pixels["test"])
    columns, samplers = measure(arguments, metrics, run, pipe, baseline, baseline_costs, dtype)

    # Write.
    text = f"{table(columns)}\n\n{conditions(metrics, device, dtype)}\n"
    write_json(output_dir / "benchmark.json", columns)
    write_text(output_dir / "benchmark.md", text)
    num_classes = len(source.class_names)
    if per_class := min(6, metrics.num_samples // num_classes):
        samples = [model(metrics.num_samples) for model in samplers]
        save_image(sample_image(samples, num_classes, per_class), output_dir / "samples.png")
    print(text)


def recipe_of(arguments: Arguments, folder: Path) -> Recipe:
    """Return the recipe with the dataset, seed and training time of the arguments."""
    data = {"dataset_name": arguments.dataset_name, "train_data_dir": arguments.train_data_dir}
    run = {
        "output_dir": str(folder),
        "seed": arguments.seed,
        "max_train_minutes": arguments.train_minutes,
        "report_to": "none",
    }
    overrides = {name: value for name, value in data.items() if value is not None}
    return read_recipe(arguments.config, {"data": overrides, "run": run})


def check_settings(output_dir: Path, settings: dict):
    """Write the settings of the models in `output_dir`.

    Raises:
        ValueError: it holds models of other settings.
    """
    path = output_dir / "settings.json"
    if path.is_file() and (previous := read_json(path, _REMEDY)) != settings:
        raise ValueError(f"expected models of {settings} in {output_dir}, got those of {previous}")
    write_json(path, settings)


def conditions(metrics: SampleMetrics, device: torch.device, dtype: torch.dtype) -> str:
    """Return a line about the machine, the precision and the metrics."""
    dtypes = [torch.float32, *([torch.bfloat16] if has_bf16(device) else [])]
    rates = (
        f"{matrix_rate(kind, device) / 1e9:.0f} GFLOP/s in {DTYPE_NAMES[kind]}" for kind in dtypes
    )
    classifier_accuracy = accuracy(metrics.classifier, metrics.test)
    return (
        f"{device_name(device)}, torch {torch.__version__}, seed {metrics.arguments.seed}; "
        f"distances of {metrics.num_samples} images to the test split, in the features of a small "
        f"classifier with an accuracy of {100 * classifier_accuracy:.1f} % on the test "
        f"split, and of patches, of which scale 1 is the finest; trained in {DTYPE_NAMES[dtype]}; "
        f"images/s where no unit is named; large matrix products: {', '.join(rates)}"
    )


def loaded(folder: str | Path, device: torch.device) -> ProgressiveVAEPipeline:
    pipe = ProgressiveVAEPipeline.from_pretrained(folder).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


if __name__ == "__main__":
    run_script(main)
