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

    python examples/evaluate.py --tune_sampling --model runs/fashion_mnist
        first chooses the sampling settings of the model in that folder, and writes them there.

Settings are chosen by the distance of samples to training images, with `--num_tuning_evaluations`
times `--num_tuning_samples` samples: the Fréchet distance, with classes that of features and labels
together, or with `--features none` the sliced Wasserstein distance. Metrics are then those of the
exact distribution and of the settings.

The images must be held out: if the dataset has no evaluation split, pass the `--eval_fraction` of
the training; after training with `--streaming`, pass images that it did not train on.
"""

import json
import math
import shlex
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
    frechet_distance,
    frechet_joint_distance,
    sample_labeled,
)
from progressive_vae.evaluation.likelihood import evaluate, label_accuracy, psnr_of, rate_distortion
from progressive_vae.evaluation.sample_quality import (
    BATCH_SIZE,
    compute_stats,
    distances,
    unit_batches,
)
from progressive_vae.evaluation.sampling_search import search_sampling
from progressive_vae.evaluation.sliced_wasserstein import sliced_wasserstein
from progressive_vae.hub.repository import INDEX, METRICS, metric_files, write_card
from progressive_vae.models.value_types import uint8_to_unit
from progressive_vae.paths import expand_home, make_folder, replacing
from progressive_vae.scripts import default_device, run_script
from progressive_vae.serialization import read_json, write_json, write_text
from progressive_vae.training.cli import read_flags
from progressive_vae.training.lock import locked
from progressive_vae.training.report import without_paths
from progressive_vae.visualization import sample_grid

EXACT = "samples"
BY_SETTINGS = "samples by the sampling settings"


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
        tune_sampling: choose the sampling settings, and write them to the model's folder.
        num_tuning_evaluations: settings to try, at most.
        num_tuning_samples: samples for each of them.
        output_dir: for results and caches.
        seed: of samples, reconstructions and classifiers.
    """

    model: str = str(Path(__file__).parent / "fashion_mnist")
    features: str = "classifier"
    num_drawn: int = 10_000
    num_drawn_to_learn_from: int = 60_000
    classifier_steps: int = 4000
    num_images_of_curve: int = 1000
    tune_sampling: bool = False
    num_tuning_evaluations: int = 30
    num_tuning_samples: int = 4000
    output_dir: str = "runs/evaluation"
    seed: int = 0

    def __post_init__(self):
        self.model = expand_home(self.model, "model")
        self.output_dir = expand_home(self.output_dir, "output_dir")
        if self.tune_sampling and not (Path(self.model) / INDEX).is_file():
            raise ValueError(
                f"expected model to be the folder of a pipeline for tune_sampling, got {self.model}"
            )
        for name in ("num_tuning_evaluations", "num_tuning_samples"):
            if getattr(self, name) < 2:
                raise ValueError(f"expected {name} >= 2, got {getattr(self, name)}")


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


def samples_of(
    arguments: Arguments, pipe: ProgressiveVAEPipeline, count: int, name: str = EXACT
) -> GridDataset:
    """Return a cache of samples, with equally many of each class.

    Args:
        name: `EXACT` or `BY_SETTINGS`.
    """
    folder = Path(arguments.output_dir) / "cache" / f"{name.replace(' ', '_')}_{count}"
    factors = [getattr(pipe, factor) for factor in pipe.factor_names]
    sampling = pipe.config["sampling"] if name == BY_SETTINGS else None
    batches = sample_labeled(pipe, count, arguments.seed, by_defaults=name == BY_SETTINGS)
    return cached_samples(
        folder, factors, pipe.image_shape, count, arguments.seed, batches, sampling
    )


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


def tune(
    arguments: Arguments,
    pipe: ProgressiveVAEPipeline,
    extractor: torch.nn.Module | None,
    train: GridDataset,
) -> dict:
    """Choose the sampling settings by the distance of samples to training images, write them to
    the model's index, and return them with an explanation."""
    count = min(arguments.num_tuning_samples, len(train))
    generator = torch.Generator().manual_seed(arguments.seed)
    rows = torch.randperm(len(train), generator=generator)[:count]
    images, labels = train.batch(rows.tolist())
    real = compute_stats(
        (uint8_to_unit(part) for part in images.split(BATCH_SIZE)), count, extractor
    )
    is_joint = bool(pipe.labels) and int(labels.min()) >= 0
    sampled_labels = labels if is_joint else None

    def distance() -> float:
        # Other noise than that of the samples whose metrics are reported.
        batches = sample_labeled(
            pipe, count, arguments.seed + 1, by_defaults=True, labels=sampled_labels
        )
        units = (uint8_to_unit(part) for part, _ in batches)
        stats = compute_stats(units, count, extractor)
        if extractor is None:
            distances = sliced_wasserstein(real.patches, stats.patches)
            result = sum(distances) / len(distances)
        else:
            assert real.features is not None and stats.features is not None
            if is_joint:
                result = frechet_joint_distance(real.features, labels, stats.features, labels)
            else:
                result = frechet_distance(real.features, stats.features)
        print(f"{json.dumps(pipe.config['sampling'])}: {result:.4f}", flush=True)
        return result

    settings, trials = search_sampling(pipe, distance, arguments.num_tuning_evaluations)
    index = Path(arguments.model) / INDEX
    write_json(index, {**read_json(index, "save the pipeline again"), "sampling": settings})
    kind = "Fréchet joint" if is_joint else "Fréchet"
    kind = "sliced Wasserstein" if extractor is None else kind
    return {
        "settings": settings,
        "explanation": f"Chosen among {len(trials)} settings by the {kind} distance of {count:,} "
        f"samples to as many training images: {min(d for _, d in trials):.4f}, against "
        f"{trials[0][1]:.4f} of the exact distribution.",
    }


def write_tuning(arguments: Arguments, pipe: ProgressiveVAEPipeline, tuning: dict, metrics: dict):
    """Write to the model's folder what the settings change: its metrics, samples and card."""
    folder = Path(arguments.model)
    if metric_files(folder):
        held_out = {}
        for title, name in (("exact distribution", EXACT), ("these settings", BY_SETTINGS)):
            row = dict(metrics["distances"][name])
            scales = enumerate(row.pop("sliced_wasserstein"), 1)
            column = {key.replace("frechet", "Fréchet").replace("_", " "): row[key] for key in row}
            column |= {f"distance of patches, scale {i}": value for i, value in scales}
            held_out[title] = column | metrics.get("accuracy_of", {}).get(name, {})
        saved = read_json(folder / METRICS, "delete it")
        write_json(folder / METRICS, {**saved, "sampling": {**tuning, "held_out": held_out}})
        with replacing(folder / "samples.png") as temporary:
            sample_grid(pipe, arguments.seed).save(temporary, "PNG")
    write_card(folder)


def distances_of(
    arguments: Arguments,
    pipe: ProgressiveVAEPipeline,
    extractor: torch.nn.Module | None,
    data: dict[str, GridDataset],
    samples: dict[str, GridDataset],
) -> dict[str, dict]:
    """Return distances to held-out images: of training images, of the held-out images'
    reconstructions from z_1 … z_k for each k, and of samples."""
    count = min(len(samples[EXACT]), len(data["test"]))
    generator = torch.Generator().manual_seed(arguments.seed)

    def reconstruct(level: int) -> Iterator[torch.Tensor]:
        """Yield reconstructions from z_1 … z_level, conditioned on the labels of the images, as
        samples are conditioned on labels."""
        is_conditional = any(finer.config.num_classes for finer in pipe.levels[level - 1 :])
        for images, labels in data["test"].batches(BATCH_SIZE):
            codes = pipe.encode(images.to(torch.uint8))
            condition: dict[str, list[int]] = {}
            if is_conditional and labels.min() >= 0:
                condition["class_labels"] = labels.tolist()
            yield pipe.decode(codes[:level], "pt", generator, temperature=1.0, **condition)

    real = compute_stats(unit_batches(data["test"]), count, extractor)
    train_images = data["train"].sample(count, arguments.seed).split(BATCH_SIZE)
    sources = {
        f"{count} training images": (uint8_to_unit(part) for part in train_images),
        **{f"reconstructions from z_{k}": reconstruct(k) for k in range(pipe.num_levels, 0, -1)},
        **{name: unit_batches(images) for name, images in samples.items()},
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
        for name, row in metrics["accuracy_of"].items():
            lines += [f"| {key}: {name} | {100 * a:.2f} % |" for key, a in row.items()]
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
    command = shlex.join(["python", "examples/evaluate.py", *words])
    with locked(output_dir, PartialState()):
        measure(arguments, DataSettings(**data_flags), command)


def measure(arguments: Arguments, data_settings: DataSettings, command: str):
    """Write all metrics to `evaluation.json` and `evaluation.md`, and plot rate–distortion."""
    output_dir = Path(arguments.output_dir)
    pipe = ProgressiveVAEPipeline.from_pretrained(arguments.model)
    pipe.to(default_device()).set_progress_bar_config(disable=True)
    data = cache(arguments, data_settings, pipe)
    test = data["test"]
    metrics = {
        "model": Path(arguments.model).name,
        "features": arguments.features,
        "seed": arguments.seed,
        **evaluate(pipe, test),
    }

    # Sample quality, of the exact distribution and of the settings that the model comes with.
    extractor = extractor_of(arguments, data)
    tuning = {}
    if arguments.tune_sampling:
        tuning = tune(arguments, pipe, extractor, data["train"])
        tuning["command"] = without_paths(command)
    count = min(arguments.num_drawn, len(data["train"]))
    names = [EXACT, BY_SETTINGS] if pipe.config["sampling"] else [EXACT]
    samples = {name: samples_of(arguments, pipe, count, name) for name in names}
    metrics["sampling"] = pipe.config["sampling"]
    metrics["distances"] = distances_of(arguments, pipe, extractor, data, samples)
    if pipe.labels and arguments.features == "classifier" and test.has_labels:
        classifier = classifier_of(arguments, data["train"], "classifier")
        metrics["accuracy"] = accuracies(arguments, pipe, classifier, test)
        metrics["accuracy_of"] = {
            name: accuracies_of_samples(arguments, pipe, classifier, test, name, images)
            for name, images in samples.items()
        }
    if tuning:
        write_tuning(arguments, pipe, tuning, metrics)

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
    arguments: Arguments, pipe: ProgressiveVAEPipeline, classifier: Classifier, test: GridDataset
) -> dict[str, float]:
    """Return the accuracy on real images and their reconstructions of a classifier of real ones."""
    result = {"trained on real images": accuracy(classifier, test)}
    for name, share in label_accuracy(pipe, classifier, test, arguments.seed).items():
        prefix, _, level = name.rpartition("level_")
        if level.isdecimal():
            kind = "previews" if prefix else "reconstructions"
            result[f"the same, on {kind} from z_{level}"] = share
    return result


def accuracies_of_samples(
    arguments: Arguments,
    pipe: ProgressiveVAEPipeline,
    classifier: Classifier,
    test: GridDataset,
    name: str,
    samples: GridDataset,
) -> dict[str, float]:
    """Return the accuracy on samples of a classifier of real images; and the classification
    accuracy score, that on real images of a classifier of samples."""
    result = {"accuracy on samples": accuracy(classifier, samples)}
    if count := arguments.num_drawn_to_learn_from:
        learned_from = samples_of(arguments, pipe, count, name)
        student = classifier_of(arguments, learned_from, f"student_of_{name.replace(' ', '_')}")
        result[f"classification accuracy score, {count} samples"] = accuracy(student, test)
    return result


if __name__ == "__main__":
    run_script(main)
