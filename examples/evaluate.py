# /// script
# requires-python = ">=3.10"
# dependencies = ["progressive-vae[train]"]
#
# [tool.uv.sources]
# progressive-vae = { path = "..", editable = true }
# ///
"""Evaluate a pipeline on held-out images: bits/dim, Fréchet distance, label accuracy and
rate–distortion.

    python examples/evaluate.py
        the project's Fashion-MNIST model, on the complete test set.

    python examples/evaluate.py --model you/photos --train_data_dir photos

Writes `evaluation.json`, `evaluation.md` and `rate_distortion.png` into `--output_dir`, and caches
of the images, the samples and the classifiers into its folder `cache`. Fréchet distance, precision
and recall are in the features of a small classifier of the dataset's labels, or with
`--features inception` of torchmetrics' Inception network (`pip install torch-fidelity`, which
downloads its weights); `--features none` leaves them out. The sliced Wasserstein distance of
patches needs neither labels nor a network. Label accuracies need the classifier.

The images must be held out: if the dataset has no evaluation split, pass the `--eval_fraction` of
the training; after training with `--streaming`, pass images that it did not train on.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import disable_progress_bars
from jsonargparse import ArgumentParser

from progressive_vae import ProgressiveVAEPipeline
from progressive_vae.data.args import TRAIN_ONLY_SETTINGS, DataSettings
from progressive_vae.data.code_cache import GridDataset, cached
from progressive_vae.data.dataset import pixel_batches, read_images
from progressive_vae.data.source import open_dataset
from progressive_vae.evaluation.image_codecs import compare_with_codecs, image_files
from progressive_vae.evaluation.image_metrics import (
    Classifier,
    ClassifierFeatures,
    Inception,
    accuracy,
    cached_classifier,
    cached_samples,
    sample_labeled,
)
from progressive_vae.evaluation.likelihood import evaluate, label_accuracy, psnr_of, rate_distortion
from progressive_vae.evaluation.sample_quality import (
    BATCH_SIZE,
    compute_stats,
    distances,
    unit_batches,
)
from progressive_vae.models.value_types import uint8_to_unit
from progressive_vae.paths import expand_home, make_folder, replacing
from progressive_vae.scripts import default_device, run_script
from progressive_vae.serialization import write_json, write_text
from progressive_vae.training.cli import read_flags
from progressive_vae.training.lock import locked


@dataclass
class Arguments:
    """
    Args:
        model: a pipeline's folder, or its repository on the Hub.
        features: classifier (of the labels), inception or none.
        num_drawn: number of samples for the distances.
        num_drawn_to_learn_from: samples to train a classifier on; 0: none.
        classifier_steps: for each classifier.
        num_images_of_curve: number of images for rate–distortion.
        output_dir: for results and caches.
        seed: of samples, reconstructions and classifiers.
    """

    model: str = str(Path(__file__).parent / "fashion_mnist")
    features: str = "classifier"
    num_drawn: int = 10_000
    num_drawn_to_learn_from: int = 60_000
    classifier_steps: int = 4000
    num_images_of_curve: int = 1000
    output_dir: str = "runs/evaluation"
    seed: int = 0

    def __post_init__(self):
        self.model = expand_home(self.model, "model")
        self.output_dir = expand_home(self.output_dir, "output_dir")


def cache(
    arguments: Arguments, images: DataSettings, pipe: ProgressiveVAEPipeline
) -> dict[str, GridDataset]:
    """Return the images of both splits, which must have the model's shape."""
    source = open_dataset(images)
    caches = {}
    print("\n".join(source.notes))
    for split, table in source.splits.items():
        manifest = replace(source.manifests[split], shape=pipe.image_shape)
        rows = read_images(table, shape=pipe.image_shape, **source.read_options(split))
        folder = Path(arguments.output_dir) / "cache" / split
        caches[split] = cached(folder, manifest, pixel_batches(rows))
    return caches


def samples_of(arguments: Arguments, pipe: ProgressiveVAEPipeline, count: int) -> GridDataset:
    """Return a cache of samples at temperature 1, with equally many of each class."""
    folder = Path(arguments.output_dir) / "cache" / f"samples_{count}"
    factors = [getattr(pipe, name) for name in pipe.factor_names]
    batches = sample_labeled(pipe, count, arguments.seed)
    return cached_samples(folder, factors, pipe.image_shape, count, arguments.seed, batches)


def extractor_of(arguments: Arguments, data: dict[str, GridDataset]) -> torch.nn.Module | None:
    """Return a network from images (B, C, H, W) in [0, 1] to features (B, F)."""
    if arguments.features == "none":
        return None
    if arguments.features == "inception":
        from torchmetrics.image.fid import FrechetInceptionDistance

        inception = FrechetInceptionDistance(feature=2048, normalize=True).inception
        return Inception(inception)
    if arguments.features != "classifier":
        raise ValueError(
            "expected features to be 'classifier', 'inception' or 'none', "
            f"got {arguments.features!r}"
        )
    return ClassifierFeatures(classifier_of(arguments, data["train"], "classifier"))


def classifier_of(arguments: Arguments, data: GridDataset, name: str) -> Classifier:
    path = Path(arguments.output_dir) / "cache" / f"{name}.safetensors"
    return cached_classifier(path, data, arguments.classifier_steps, arguments.seed)


def distances_of(
    arguments: Arguments,
    pipe: ProgressiveVAEPipeline,
    extractor: torch.nn.Module | None,
    data: dict[str, GridDataset],
    samples: GridDataset,
) -> dict[str, dict]:
    """Return distances to held-out images: of training images, of the held-out images'
    reconstructions from z_1 … z_k for each k, and of samples."""
    count = min(len(samples), len(data["test"]))
    generator = torch.Generator().manual_seed(arguments.seed)

    def reconstruct(level: int) -> Iterator[torch.Tensor]:
        """Yield reconstructions from z_1 … z_level, conditioned on the labels of the images, as
        samples are conditioned on labels."""
        is_conditional = any(finer.config.num_classes for finer in pipe.levels[level - 1 :])
        for images, labels in data["test"].batches(BATCH_SIZE):
            codes = pipe.encode(images.to(torch.uint8))
            condition = {}
            if is_conditional and labels.min() >= 0:
                condition["class_labels"] = labels.tolist()
            yield pipe.decode(codes[:level], "pt", generator, **condition)

    real = compute_stats(unit_batches(data["test"]), count, extractor)
    train_images = data["train"].sample(count, arguments.seed).split(BATCH_SIZE)
    sources = {
        f"{count} training images": (uint8_to_unit(part) for part in train_images),
        **{f"reconstructions from z_{k}": reconstruct(k) for k in range(pipe.num_levels, 0, -1)},
        "samples": unit_batches(samples),
    }
    return {
        name: distances(real, compute_stats(batches, count, extractor))
        for name, batches in sources.items()
    }


def plot(curves: dict[str, list[tuple[float, float]]], path: Path):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, points in curves.items():
        rates, errors = zip(*sorted(points), strict=True)
        axes.plot(rates, [psnr_of(error) for error in errors], "o-", ms=4, label=name)
    axes.set(xscale="log", xlabel="bits per dimension", ylabel="PSNR in dB")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")
    plt.close(figure)


def report(metrics: dict) -> str:
    """Return the metrics as Markdown."""
    lines = ["| factor | bits/dim |", "|---|---|"]
    lines += [f"| {name} | {bits:.4f} |" for name, bits in metrics["bits_per_dim"].items()]
    lines += [f"| {name} | {bits:.4f} |" for name, bits in metrics["lossless_files"].items()]
    title = f"Fréchet distance ({metrics['features']})"
    lines += [
        "",
        f"| images | patches, fine to coarse | {title} | precision | recall |",
        "|---|---|---|---|---|",
    ]
    for name, row in metrics["distances"].items():
        cells = [", ".join(f"{distance:.1f}" for distance in row["sliced_wasserstein"])]
        if "frechet_distance" in row:
            cells += [f"{row['frechet_distance']:.4f}"]
            cells += [f"{row['precision']:.3f}", f"{row['recall']:.3f}"]
        lines.append(f"| {name} | " + " | ".join([*cells, "", "", ""][:4]) + " |")
    if "accuracy" in metrics:
        lines += ["", "| accuracy on held-out images | |", "|---|---|"]
        lines += [f"| {name} | {100 * a:.2f} % |" for name, a in metrics["accuracy"].items()]
    lines += [
        "",
        "| codes | bits/dim | PSNR, SSIM of a reconstruction | of the mean of 8 | of the preview |",
        "|---|---|---|---|---|",
    ]
    for name, row in metrics["rate_distortion"].items():
        cells = [
            f"{row['psnr' + kind]:.2f}, {row.get('ssim' + kind, math.nan):.3f}"
            if "psnr" + kind in row
            else ""
            for kind in ("", "_of_mean", "_of_preview")
        ]
        rate = f"| z_1 … z_{name.removeprefix('level_')} | {row['bits_per_dim']:.4f} | "
        lines.append(rate + " | ".join(cells) + " |")
    if "beside_files" in metrics:
        lines += files_table(metrics["beside_files"])
    return "\n".join(lines)


def files_table(rows: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """Return a table of the bytes and PSNR of previews and of image files that are no larger."""
    kinds = list(next(iter(rows.values())))
    lines = [
        "",
        "| bytes, PSNR of | " + " | ".join(["the preview", *kinds[1:]]) + " |",
        "|---" * (len(kinds) + 1) + "|",
    ]
    for name, row in rows.items():
        cells = [f"{row[kind]['bytes']:.1f}, {row[kind]['psnr']:.2f}" for kind in kinds]
        lines.append(f"| z_1 … z_{name.removeprefix('level_')} | " + " | ".join(cells) + " |")
    return lines


def main(words: list[str]):
    parser = ArgumentParser(
        exit_on_error=False, description="Evaluate a pipeline on held-out images."
    )
    parser.add_class_arguments(Arguments)
    parser.add_class_arguments(DataSettings, skip=set(TRAIN_ONLY_SETTINGS))
    flags = read_flags(parser, words)
    data_flags = {f.name: flags.pop(f.name) for f in fields(DataSettings) if f.name in flags}
    arguments = Arguments(**flags)
    if not {"dataset_name", "train_data_dir"} & set(data_flags):
        data_flags["dataset_name"] = "zalando-datasets/fashion_mnist"
    output_dir = make_folder(arguments.output_dir, "output_dir")
    disable_progress_bars()
    with locked(output_dir, PartialState()):
        measure(arguments, DataSettings(**data_flags))


def measure(arguments: Arguments, data_settings: DataSettings):
    """Write all metrics to `evaluation.json` and `evaluation.md`, and plot rate–distortion."""
    output_dir = Path(arguments.output_dir)
    pipe = ProgressiveVAEPipeline.from_pretrained(arguments.model)
    pipe.to(default_device()).set_progress_bar_config(disable=True)
    data = cache(arguments, data_settings, pipe)
    test = data["test"]
    metrics = {
        "model": Path(arguments.model).name,
        "num_images": len(test),
        "features": arguments.features,
        "seed": arguments.seed,
        **evaluate(pipe, test),
    }

    # Sample quality.
    extractor = extractor_of(arguments, data)
    samples = samples_of(arguments, pipe, min(arguments.num_drawn, len(data["train"])))
    metrics["distances"] = distances_of(arguments, pipe, extractor, data, samples)
    if pipe.labels and arguments.features == "classifier" and test.has_labels:
        metrics["accuracy"] = accuracies(arguments, pipe, data, samples)

    # Rate–distortion of the codes, beside that of image codecs.
    images = test.batch(slice(0, arguments.num_images_of_curve))[0].to(torch.uint8)
    rows = rate_distortion(pipe, images, seed=arguments.seed)
    metrics["rate_distortion"] = rows
    metrics["lossless_files"], codec_curves = image_files(images)
    kinds = {"a reconstruction": "mse", "mean of 8 reconstructions": "mse_of_mean"}
    if pipe.stack.has_previews:
        kinds["the preview"] = "mse_of_preview"
        num_dims = math.prod(pipe.image_shape)
        metrics["beside_files"] = compare_with_codecs(rows, codec_curves, num_dims)
    curves = {
        f"z_1 … z_k, {name}": [(row["bits_per_dim"], row[mse]) for row in rows.values()]
        for name, mse in kinds.items()
    }
    metrics["curves"] = curves | codec_curves
    write_json(output_dir / "evaluation.json", metrics)
    plot(metrics["curves"], output_dir / "rate_distortion.png")
    write_text(output_dir / "evaluation.md", report(metrics) + "\n")
    print(f"{report(metrics)}\n\nwrote {output_dir}")


def accuracies(
    arguments: Arguments,
    pipe: ProgressiveVAEPipeline,
    data: dict[str, GridDataset],
    samples: GridDataset,
) -> dict[str, float]:
    """Return the accuracy on real images, on their reconstructions and on samples of a classifier
    of real images; and on real images of a classifier of samples."""
    test = data["test"]
    classifier = classifier_of(arguments, data["train"], "classifier")
    result = {"trained on real images": accuracy(classifier, test)}
    for name, share in label_accuracy(pipe, classifier, test, arguments.seed).items():
        prefix, _, level = name.rpartition("level_")
        if level.isdecimal():
            kind = "previews" if prefix else "reconstructions"
            result[f"the same, on {kind} from z_{level}"] = share
    result["the same, on samples"] = accuracy(classifier, samples)
    if count := arguments.num_drawn_to_learn_from:
        student = classifier_of(arguments, samples_of(arguments, pipe, count), "student")
        result[f"trained on {count} samples"] = accuracy(student, test)
    return result


if __name__ == "__main__":
    run_script(main)
