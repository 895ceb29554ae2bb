"""All held-out figures of a pipeline: bits, Fréchet distances, classes, rate and distortion.

    python examples/evaluate.py
        the Fashion-MNIST model that comes with the project, on the whole test set.

    python examples/evaluate.py --model you/pictures --train_data_dir pictures

Writes `evaluation.json`, `evaluation.md` and `rate_distortion.png` into `--output_dir`, where the
caches of the images, the drawn images and the classifier stay too. Distances are in the features of
a small classifier of the data set's own labels, or with `--features inception` in those of
torchmetrics' Inception network (`pip install torch-fidelity`; its weights are fetched);
`--features none` leaves them out. What classes are kept is told by the classifier alone.

The images must be held out: give the `--eval_fraction` of the training where its data set has no
split for evaluation, and after `--streaming` name images that it has not seen.
"""

import hashlib
import io
import math
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from accelerate import PartialState
from datasets import disable_progress_bars
from transformers import HfArgumentParser

from progressive_vae import ProgressiveVAEPipeline
from progressive_vae.saved import write_json
from progressive_vae.training.codes import GridDataset, Manifest, cached
from progressive_vae.training.data import (
    find_image_column,
    find_labels,
    load_images,
    pixel_batches,
    read_images,
)
from progressive_vae.training.evaluation import (
    Classifier,
    ClassifierFeatures,
    accuracy,
    cached_classifier,
    draw_labelled,
    evaluate,
    features_of,
    frechet_distance,
    label_accuracy,
    precision_recall,
    psnr_of,
    rate_distortion,
)
from progressive_vae.training.run import locked

LOSSY = {"JPEG": range(1, 40, 4), "WebP": range(0, 60, 6), "JPEG-XL": range(25, 5, -2)}
LOSSLESS = {
    "PNG": {"optimize": True},
    "WebP": {"lossless": True, "quality": 100, "method": 6},
    "JPEG-XL": {"lossless": True, "effort": 9},
}


@dataclass
class Arguments:
    model: str = field(
        default=str(Path(__file__).parent / "fashion_mnist"),
        metadata={"help": "a pipeline's folder, or its repository on the Hub"},
    )
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    train_data_dir: str | None = None
    train_split: str = "train"
    eval_split: str = "test"
    eval_fraction: float = field(
        default=0.1,
        metadata={"help": "held out of the training split where there is no eval_split"},
    )
    image_column: str | None = None
    label_column: str | None = None
    resolution: int | None = None
    center_crop: bool = False
    max_eval_samples: int | None = None
    features: str = field(
        default="classifier", metadata={"help": "classifier (of labels), inception or none"}
    )
    num_drawn: int = field(default=10_000, metadata={"help": "images drawn for the distances"})
    num_drawn_to_learn_from: int = field(
        default=60_000, metadata={"help": "drawn images that a classifier learns from; 0: none"}
    )
    classifier_steps: int = 4000
    num_images_of_curve: int = field(default=1000, metadata={"help": "of rate and distortion"})
    output_dir: str = "runs/evaluation"
    seed: int = 0


def cache(arguments: Arguments, pipe: ProgressiveVAEPipeline) -> dict[str, GridDataset]:
    """The images of both splits."""
    splits = load_images(
        arguments.dataset_name,
        arguments.dataset_config_name,
        arguments.train_data_dir,
        arguments.train_split,
        arguments.eval_split,
        arguments.eval_fraction,
    )
    splits = {name: table.shuffle(seed=0) for name, table in splits.items()}  # folders are sorted
    limit = arguments.max_eval_samples
    if limit is not None and limit < len(splits["test"]):
        splits["test"] = splits["test"].select(range(limit))
    column = find_image_column(splits["train"], arguments.image_column)
    label_column, _ = find_labels(splits, arguments.label_column)
    sizes, found = (arguments.resolution, arguments.center_crop), {}
    for split, table in splits.items():
        content = f"{arguments.dataset_name or arguments.train_data_dir} ({table._fingerprint}"
        manifest = Manifest("", f"{content}; {sizes})", split, pipe.image_shape, 256)
        folder = Path(arguments.output_dir) / "cache" / split
        images = read_images(table, column, label_column, pipe.image_shape, *sizes)
        found[split] = cached(folder, manifest, pixel_batches(images))
    return found


def drawn_images(arguments: Arguments, pipe: ProgressiveVAEPipeline, count: int) -> GridDataset:
    """Images drawn at temperature 1, their classes in turn; kept, as they take minutes."""
    digest = hashlib.sha256()
    for name in pipe.factor_names:
        for value in getattr(pipe, name).state_dict().values():
            digest.update(value.float().cpu().numpy().tobytes())
    weights = digest.hexdigest()
    manifest = Manifest(weights, f"drawn {arguments.seed}", str(count), pipe.image_shape, 256)
    folder = Path(arguments.output_dir) / "cache" / f"drawn_{count}"
    return cached(folder, manifest, draw_labelled(pipe, count, arguments.seed))


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


class Inception(torch.nn.Module):
    """torchmetrics' Inception network on grey or coloured images in [0, 1]."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network((images.expand(-1, 3, -1, -1) * 255).round().to(torch.uint8))


def distances(
    arguments: Arguments,
    pipe: ProgressiveVAEPipeline,
    extractor: torch.nn.Module,
    data: dict[str, GridDataset],
    drawn: GridDataset,
) -> dict[str, dict[str, float]]:
    """To held-out images: of as many training images, of those that are drawn again from the true
    z_k of the very same held-out images, for each k, and of those drawn from nothing; with
    precision and recall."""
    count = min(len(drawn), len(data["test"]))
    generator = torch.Generator().manual_seed(arguments.seed)

    def again(level: int):
        """Levels that know classes are told those of the images, as for what is drawn from nothing
        they are told the one asked for."""
        is_told = any(finer.config.num_classes for finer in pipe.levels[level - 1 :])
        for images, labels in data["test"].batches(250):
            codes = pipe.encode(images.to(torch.uint8))
            told = {"class_labels": labels.tolist()} if is_told and labels.min() >= 0 else {}
            yield pipe.decode(codes[:level], "pt", generator, **told)

    def features(batches) -> torch.Tensor:
        return features_of(extractor, islice(batches, math.ceil(count / 250)))[:count]

    def stored(images: GridDataset):
        return (grids / 255 for grids, _ in images.batches(250))

    real = features(stored(data["test"]))
    sources = {
        f"{count} training images": stored(data["train"]),
        **{f"true z_{k}": again(k) for k in range(pipe.num_levels, 0, -1)},
        "nothing": stored(drawn),
    }
    rows = {}
    for name, batches in sources.items():
        of_these = features(batches)
        rows[name] = {
            "frechet_distance": frechet_distance(real, of_these),
            **precision_recall(real, of_these),
        }
    return rows


def image_files(images: torch.Tensor) -> tuple[dict[str, float], dict[str, list]]:
    """Of image files, one file an image: bits/dim of lossless ones, and (bits/dim, mean squared
    error) of lossy ones at low qualities."""
    arrays = [image.squeeze(0).numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
              for image in images]  # fmt: skip
    curves: dict[str, list[tuple[float, float]]] = {}
    lossless = {}
    for name, options in LOSSLESS.items():
        with suppress(ImportError):  # imagecodecs is not there
            bits, squares = file_figures(name, arrays, options)
            assert squares == 0
            lossless[f"{name} files of {len(images)} images"] = bits
    for name, qualities in LOSSY.items():
        for quality in qualities:
            with suppress(ImportError):
                options = {"distance": quality} if name == "JPEG-XL" else {"quality": quality}
                curves.setdefault(name, []).append(file_figures(name, arrays, options))
    return lossless, {name: points for name, points in curves.items() if points}


def file_figures(name: str, arrays: list[np.ndarray], options: dict) -> tuple[float, float]:
    """Bits/dim, and the mean squared error of the pixels that are read again."""
    bits = squares = 0.0
    for array in arrays:
        if name == "JPEG-XL":
            import imagecodecs

            file = imagecodecs.jpegxl_encode(array, **{"effort": 7, **options})
            seen = imagecodecs.jpegxl_decode(file)
        else:
            buffer = io.BytesIO()
            PIL.Image.fromarray(array).save(buffer, name, **options)
            file = buffer.getvalue()
            seen = np.asarray(PIL.Image.open(buffer).convert("L" if array.ndim == 2 else "RGB"))
        bits += 8 * len(file)
        squares += float(((seen.reshape(array.shape) - array.astype(float)) ** 2).sum())
    count = sum(array.size for array in arrays)
    return bits / count, squares / count


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
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def report(metrics: dict) -> str:
    """The figures as Markdown."""
    lines = ["| factor | bits/dim |", "|---|---|"]
    lines += [f"| {name} | {bits:.4f} |" for name, bits in metrics["bits_per_dim"].items()]
    lines += [f"| {name} | {bits:.4f} |" for name, bits in metrics["lossless_files"].items()]
    if "distances" in metrics:
        title = f"Fréchet distance ({metrics['features']})"
        lines += ["", f"| images from | {title} | precision | recall |", "|---|---|---|---|"]
    for name, row in metrics.get("distances", {}).items():
        figures = (row["frechet_distance"], row["precision"], row["recall"])
        lines.append(f"| {name} | {figures[0]:.4f} | {figures[1]:.3f} | {figures[2]:.3f} |")
    if "accuracy" in metrics:
        lines += ["", "| accuracy on held-out images | |", "|---|---|"]
        lines += [f"| {name} | {100 * a:.2f} % |" for name, a in metrics["accuracy"].items()]
    lines += [
        "",
        "| from | bits/dim | PSNR of a draw | PSNR of a mean of draws |",
        "|---|---|---|---|",
    ]
    for name, row in metrics["rate_distortion"].items():
        lines.append(
            f"| z_1 … z_{name.removeprefix('level_')} | {row['bits_per_dim']:.4f} | "
            f"{row['psnr']:.2f} | {row['psnr_of_mean']:.2f} |"
        )
    return "\n".join(lines)


def main(words: list[str]):
    arguments = HfArgumentParser(
        Arguments, description="All held-out figures of a pipeline."
    ).parse_args_into_dataclasses(words, look_for_args_file=False)[0]
    if arguments.dataset_name is None and arguments.train_data_dir is None:
        arguments.dataset_name = "zalando-datasets/fashion_mnist"
    output_dir = Path(arguments.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    disable_progress_bars()
    with locked(output_dir, PartialState()):
        measure(arguments)


def measure(arguments: Arguments):
    """All figures, in `evaluation.json` and `evaluation.md`, and the plot."""
    output_dir = Path(arguments.output_dir)
    pipe = ProgressiveVAEPipeline.from_pretrained(arguments.model)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    data = cache(arguments, pipe)
    test, num_drawn = data["test"], min(arguments.num_drawn, len(data["train"]))
    extractor = extractor_of(arguments, data)
    metrics = {
        "model": Path(arguments.model).name,
        "num_images": len(test),
        "features": arguments.features,
        "seed": arguments.seed,
        **evaluate(pipe, test),
    }
    if extractor is not None:
        drawn = drawn_images(arguments, pipe, num_drawn)
        metrics["distances"] = distances(arguments, pipe, extractor, data, drawn)
    if pipe.labels and arguments.features == "classifier":
        real = classifier_of(arguments, data["train"], "classifier")
        metrics["accuracy"] = {"learned from the training split": accuracy(real, test)}
        for name, share in label_accuracy(pipe, real, test, arguments.seed).items():
            if name != "images":
                metrics["accuracy"][f"the same, on images drawn again from {name}"] = share
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
    metrics["curves"] = curves
    write_json(output_dir / "evaluation.json", metrics)
    plot(curves, output_dir / "rate_distortion.png")
    (output_dir / "evaluation.md").write_text(report(metrics) + "\n")
    print(f"{report(metrics)}\n\nwrote {output_dir}")


if __name__ == "__main__":
    main(sys.argv[1:])
