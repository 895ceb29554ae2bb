# /// script
# requires-python = ">=3.10"
# dependencies = ["progressive-vae[train]"]
#
# [tool.uv.sources]
# progressive-vae = { path = "..", editable = true }
# ///
"""All held-out figures of a pipeline: bits, Fréchet distances, classes, rate and distortion.

    python examples/evaluate.py
        the Fashion-MNIST model that comes with the project, on the whole test set.

    python examples/evaluate.py --model you/pictures --train_data_dir pictures

Writes `evaluation.json`, `evaluation.md` and `rate_distortion.png` into `--output_dir`, where the
caches of the images, the drawn images and the classifier stay too. Distances are in the features of
a small classifier of the data set's own labels, or with `--features inception` in those of
torchmetrics' Inception network (`pip install torch-fidelity`; its weights are fetched);
`--features none` leaves them out. Distances of patches, scale by scale, need neither labels nor a
network. What classes are kept is told by the classifier alone.

The images must be held out: give the `--eval_fraction` of the training where its data set has no
split for evaluation, and after `--streaming` name images that it has not seen.
"""

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import disable_progress_bars
from jsonargparse import ArgumentParser

from progressive_vae import ProgressiveVAEPipeline
from progressive_vae.data.args import OF_TRAINING_IMAGES, DataSettings
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
from progressive_vae.visualization import has_previews


@dataclass
class Arguments:
    """
    Args:
        model: a pipeline's folder, or its repository on the Hub.
        features: classifier (of labels), inception or none.
        num_drawn: images drawn for the distances.
        num_drawn_to_learn_from: drawn images that a classifier learns from; 0: none.
        classifier_steps: of each classifier.
        num_images_of_curve: of rate and distortion.
        output_dir: for figures, pictures and caches.
        seed: of everything.
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
    """The images of both splits, which have to be as the model's."""
    source, found = open_dataset(images), {}
    print("\n".join(source.notes))
    for split, table in source.splits.items():
        manifest = replace(source.manifests[split], shape=pipe.image_shape)
        rows = read_images(table, shape=pipe.image_shape, **source.read_options(split))
        folder = Path(arguments.output_dir) / "cache" / split
        found[split] = cached(folder, manifest, pixel_batches(rows))
    return found


def drawn_images(arguments: Arguments, pipe: ProgressiveVAEPipeline, count: int) -> GridDataset:
    """Images drawn at temperature 1, their classes in turn."""
    folder = Path(arguments.output_dir) / "cache" / f"drawn_{count}"
    factors = [getattr(pipe, name) for name in pipe.factor_names]
    drawn = sample_labeled(pipe, count, arguments.seed)
    return cached_samples(folder, factors, pipe.image_shape, count, arguments.seed, drawn)


def extractor_of(arguments: Arguments, data: dict[str, GridDataset]) -> torch.nn.Module | None:
    """(B, C, H, W) in [0, 1] -> (B, num_features)."""
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
    drawn: GridDataset,
) -> dict[str, dict]:
    """To held-out images: of as many training images, of those that are drawn again from the true
    z_k of the very same held-out images, for each k, and of those drawn from nothing."""
    count = min(len(drawn), len(data["test"]))
    generator = torch.Generator().manual_seed(arguments.seed)

    def again(level: int):
        """Levels that know classes are told those of the images, as for what is drawn from nothing
        they are told the one asked for."""
        is_told = any(finer.config.num_classes for finer in pipe.levels[level - 1 :])
        for images, labels in data["test"].batches(BATCH_SIZE):
            codes = pipe.encode(images.to(torch.uint8))
            told = {"class_labels": labels.tolist()} if is_told and labels.min() >= 0 else {}
            yield pipe.decode(codes[:level], "pt", generator, **told)

    real = compute_stats(unit_batches(data["test"]), count, extractor)
    sample = data["train"].sample(count, arguments.seed).split(BATCH_SIZE)
    sources = {
        f"{count} training images": (uint8_to_unit(part) for part in sample),
        **{f"true z_{k}": again(k) for k in range(pipe.num_levels, 0, -1)},
        "nothing": unit_batches(drawn),
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
    """The figures as Markdown."""
    lines = ["| factor | bits/dim |", "|---|---|"]
    lines += [f"| {name} | {bits:.4f} |" for name, bits in metrics["bits_per_dim"].items()]
    lines += [f"| {name} | {bits:.4f} |" for name, bits in metrics["lossless_files"].items()]
    title = f"Fréchet distance ({metrics['features']})"
    lines += ["", f"| images from | patches, fine to coarse | {title} | precision | recall |",
              "|---|---|---|---|---|"]  # fmt: skip
    for name, row in metrics["distances"].items():
        cells = [", ".join(f"{distance:.1f}" for distance in row["sliced_wasserstein"])]
        if "frechet_distance" in row:
            cells += [f"{row['frechet_distance']:.4f}", f"{row['precision']:.3f}",
                      f"{row['recall']:.3f}"]  # fmt: skip
        lines.append(f"| {name} | " + " | ".join([*cells, "", "", ""][:4]) + " |")
    if "accuracy" in metrics:
        lines += ["", "| accuracy on held-out images | |", "|---|---|"]
        lines += [f"| {name} | {100 * a:.2f} % |" for name, a in metrics["accuracy"].items()]
    lines += [
        "",
        "| from | bits/dim | PSNR, SSIM of a draw | of a mean of draws | of the preview |",
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
    """PSNR of previews, and of image files that are no larger; of the smallest where none are."""
    kinds = list(next(iter(rows.values())))
    lines = ["", "| bytes, PSNR of | " + " | ".join(["the preview", *kinds[1:]]) + " |",
             "|---" * (len(kinds) + 1) + "|"]  # fmt: skip
    for name, row in rows.items():
        cells = [f"{row[kind]['bytes']:.1f}, {row[kind]['psnr']:.2f}" for kind in kinds]
        lines.append(f"| z_1 … z_{name.removeprefix('level_')} | " + " | ".join(cells) + " |")
    return lines


def main(words: list[str]):
    parser = ArgumentParser(exit_on_error=False, description="All held-out figures of a pipeline.")
    parser.add_class_arguments(Arguments)
    parser.add_class_arguments(DataSettings, skip=set(OF_TRAINING_IMAGES))
    given = read_flags(parser, words)
    of_data = {f.name: given.pop(f.name) for f in fields(DataSettings) if f.name in given}
    arguments = Arguments(**given)
    if not {"dataset_name", "train_data_dir"} & set(of_data):
        of_data["dataset_name"] = "zalando-datasets/fashion_mnist"
    output_dir = make_folder(arguments.output_dir, "output_dir")
    disable_progress_bars()
    with locked(output_dir, PartialState()):
        measure(arguments, DataSettings(**of_data))


def measure(arguments: Arguments, images_of: DataSettings):
    """All figures, in `evaluation.json` and `evaluation.md`, and the plot."""
    output_dir = Path(arguments.output_dir)
    pipe = ProgressiveVAEPipeline.from_pretrained(arguments.model)
    pipe.to(default_device())
    pipe.set_progress_bar_config(disable=True)
    data = cache(arguments, images_of, pipe)
    test, num_drawn = data["test"], min(arguments.num_drawn, len(data["train"]))
    extractor = extractor_of(arguments, data)
    metrics = {
        "model": Path(arguments.model).name,
        "num_images": len(test),
        "features": arguments.features,
        "seed": arguments.seed,
        **evaluate(pipe, test),
    }
    drawn = drawn_images(arguments, pipe, num_drawn)
    metrics["distances"] = distances_of(arguments, pipe, extractor, data, drawn)
    if pipe.labels and arguments.features == "classifier" and test.has_labels:
        real = classifier_of(arguments, data["train"], "classifier")
        metrics["accuracy"] = {"learned from the training split": accuracy(real, test)}
        for name, share in label_accuracy(pipe, real, test, arguments.seed).items():
            view, _, level = name.rpartition("level_")
            if level.isdecimal():
                shown = f"previews from z_{level}" if view else f"images drawn again from {name}"
                metrics["accuracy"][f"the same, on {shown}"] = share
        told = "the same, on drawn images, of the class asked for"
        metrics["accuracy"][told] = accuracy(real, drawn)
        if count := arguments.num_drawn_to_learn_from:
            learned = classifier_of(arguments, drawn_images(arguments, pipe, count), "learned")
            metrics["accuracy"][f"learned from {count} drawn images"] = accuracy(learned, test)
    images = test.batch(slice(0, arguments.num_images_of_curve))[0].to(torch.uint8)
    metrics["rate_distortion"] = rate_distortion(pipe, images, seed=arguments.seed)
    rows = metrics["rate_distortion"].values()
    metrics["lossless_files"], of_files = image_files(images)
    curves = {
        "z_1 … z_k, a draw": [(row["bits_per_dim"], row["mse"]) for row in rows],
        "z_1 … z_k, mean of 8 draws": [(row["bits_per_dim"], row["mse_of_mean"]) for row in rows],
        **of_files,
    }
    if has_previews(pipe):
        curves["z_1 … z_k, the preview"] = [
            (row["bits_per_dim"], row["mse_of_preview"]) for row in rows
        ]
        num_dims = math.prod(pipe.image_shape)
        metrics["beside_files"] = compare_with_codecs(
            metrics["rate_distortion"], of_files, num_dims
        )
    metrics["curves"] = curves
    write_json(output_dir / "evaluation.json", metrics)
    plot(curves, output_dir / "rate_distortion.png")
    write_text(output_dir / "evaluation.md", report(metrics) + "\n")
    print(f"{report(metrics)}\n\nwrote {output_dir}")


if __name__ == "__main__":
    run_script(main)
