# /// script
# requires-python = ">=3.10"
# dependencies = ["progressive-vae[train]"]
#
# [tool.uv.sources]
# progressive-vae = { path = "..", editable = true }
# ///
"""Small experiments; each prints a table in Markdown.

    python examples/ablations.py image_codecs zalando-datasets/fashion_mnist
        PSNR and bytes of images decoded from codes, beside lossy image files.

    python examples/ablations.py few_images photos --num_images 100 --minutes 10
        bits/dim of models trained on few images, with more and more augmentation.

    python examples/ablations.py quantizers uoft-cs/cifar10 --minutes 10
        previews and code use of a level with each quantizer, trained for the same time.

    python examples/ablations.py factors zalando-datasets/fashion_mnist
        metrics of images of which more and more factors are sampled.

    python examples/ablations.py speed --batch_sizes [8,64]
        images per second of sampling and of training, on a GPU where there is one.

A dataset is an id on the Hub or a local path. Its images must have the size of the model.
"""

import math
from dataclasses import fields, replace
from functools import partial
from itertools import repeat
from pathlib import Path

import PIL.features
import torch
from jsonargparse import auto_cli
from torch import Tensor

from progressive_vae import ProgressiveVAELevel, ProgressiveVAEPipeline
from progressive_vae.data.args import DataSettings
from progressive_vae.data.code_cache import cached
from progressive_vae.data.dataset import pixel_batches, read_images
from progressive_vae.data.source import open_dataset
from progressive_vae.evaluation.image_codecs import as_arrays, lossy_curves, rate_and_distortion
from progressive_vae.evaluation.image_metrics import cached_classifier
from progressive_vae.evaluation.likelihood import psnr_of, rate_distortion
from progressive_vae.evaluation.sliced_wasserstein import patches_of, sliced_wasserstein
from progressive_vae.evaluation.throughput import rate
from progressive_vae.hub.repository import METRICS
from progressive_vae.models.value_types import uint8_to_signed, uint8_to_unit, unit_to_uint8
from progressive_vae.scripts import default_device, print_markdown_table, run_script
from progressive_vae.serialization import read_json
from progressive_vae.training import train
from progressive_vae.training.report import device_name
from progressive_vae.training.sections import LevelSection
from progressive_vae.training.yaml_files import read_yaml

EXAMPLES = Path(__file__).parent
MODEL = str(EXAMPLES / "fashion_mnist")
RECIPE = str(EXAMPLES / "configs" / "color_64.yaml")
AVIF = range(0, 60, 6)  # qualities
# Each row of `few_images` adds an augmentation.
AUGMENTATIONS = {
    "none": {"random_flip": False, "random_rotation": False, "random_channel_permutation": False},
    "flip": {"random_flip": True},
    "flip, rotation": {"random_rotation": True},
    "flip, rotation, channel permutation": {"random_channel_permutation": True},
}

# Rows of `quantizers`: fields of the config.
QUANTIZERS = {
    "vq": {},
    "vq, rotation trick": {"quantizer_gradient": "rotation"},
    "vq, DiVeQ": {"quantizer_gradient": "diveq"},
    "fsq": {"quantizer": "fsq"},
    "lfq": {"quantizer": "lfq"},
    "bsq": {"quantizer": "bsq"},
}


def image_codecs(
    dataset_name: str,
    model: str = MODEL,
    num_images: int = 100,
    num_samples: int = 8,
    seed: int = 0,
):
    """Compare images decoded from codes with lossy image files, on held-out images.

    Each row has codes z_1 … z_k, and of each format the smallest files that are as good. Decoded
    images are previews, or the mean of reconstructions if there are no auxiliary decoders. JPEG-XL
    needs the package imagecodecs, AVIF a Pillow that supports it.

    Args:
        dataset_name: id on the Hub or a local path.
        model: a pipeline's folder, or its repository on the Hub.
        num_images: a random subset of the split "test".
        num_samples: reconstructions of a mean.
        seed: of the reconstructions.
    """
    pipe = loaded(model)
    images = held_out_images(dataset_name, num_images, pipe)
    has_previews = pipe.stack.has_previews
    kind = "mse_of_preview" if has_previews else "mse_of_mean"
    codes = rate_distortion(pipe, images, 1 if has_previews else num_samples, seed)

    # Files of several qualities, as (bits/dim, mean squared error).
    arrays = as_arrays(images)
    curves = lossy_curves(arrays)
    if PIL.features.check("avif"):
        curves["AVIF"] = [rate_and_distortion("AVIF", arrays, {"quality": q}) for q in AVIF]

    def cell(point: tuple[float, float] | None) -> str:
        """Return the bytes of an image, and the PSNR in dB."""
        if point is None:
            return ""
        return f"{point[0] * math.prod(pipe.image_shape) / 8:.1f}, {psnr_of(point[1]):.2f}"

    lines = [["bytes, PSNR", "preview" if has_previews else f"mean of {num_samples}", *curves]]
    for name, row in codes.items():
        point = row["bits_per_dim"], row[kind]
        best = [
            min((file for file in files if file[1] <= point[1]), default=None)
            for files in curves.values()
        ]
        lines.append([f"z_1 … z_{name.removeprefix('level_')}", *map(cell, [point, *best])])
    lines.append(["the smallest files", "", *(cell(min(files)) for files in curves.values())])
    black = [0 * arrays[0]]
    options = [{"distance": 25} if name == "JPEG-XL" else {"quality": 0} for name in curves]
    files = [rate_and_distortion(*arguments) for arguments in zip(curves, repeat(black), options)]
    lines.append(["a black image, bytes", "", *(cell(file).split(",")[0] for file in files)])
    print_markdown_table(lines)


def few_images(
    dataset_name: str,
    num_images: int = 100,
    minutes: float = 10,
    recipe: str = RECIPE,
    output_dir: str = "runs/few_images",
    seed: int = 0,
):
    """Train the finest level of a recipe, and a prior over its codes, on few images.

    Each row adds an augmentation. Bits/dim are those of the held-out images.

    Args:
        dataset_name: id on the Hub or a local path.
        num_images: a random subset of the split "train".
        minutes: training time of each row.
        recipe: YAML file, whose finest level is trained.
        output_dir: for the models; rows that are there are not trained again.
        seed: of the training.
    """
    settings = read_yaml(Path(recipe))
    finest = max(name for name in settings if name.startswith("level_"))
    data = {"dataset_name": dataset_name, "max_train_samples": num_images}
    lines = [["augmentation", "prior", "level_1", "total"]]
    for name, augmentation in AUGMENTATIONS.items():
        data |= augmentation
        folder = Path(output_dir) / name.replace(", ", "_").replace(" ", "_")
        sections = {
            "levels": settings.get("levels", {}),
            "level_1": settings[finest],
            "data": data,
            "run": {**settings.get("run", {}), "seed": seed},
        }
        train(sections, output_dir=folder, max_train_minutes=minutes)
        bits = read_json(folder / METRICS, "train the row again")["bits_per_dim"]
        lines.append([name, *(f"{bits[factor]:.4f}" for factor in lines[0][1:])])
    print_markdown_table(lines)


def quantizers(
    dataset_name: str,
    codebook_size: int = 256,
    minutes: float = 10,
    num_images: int = 500,
    recipe: str = RECIPE,
    output_dir: str = "runs/quantizers",
    seed: int = 0,
):
    """Train encoder, codebook and auxiliary decoder of a recipe's finest level by each quantizer.

    PSNR is that of the previews of held-out images.

    Args:
        dataset_name: id on the Hub or a local path.
        codebook_size: K, a power of two.
        minutes: training time of each row.
        num_images: a random subset of the split "test".
        recipe: YAML file.
        output_dir: for the models; rows that are there are not trained again.
        seed: of the training.
    """
    settings = read_yaml(Path(recipe))
    finest = settings[max(name for name in settings if name.startswith("level_"))]
    level = {**settings.get("levels", {}), **finest, "codebook_size": codebook_size}
    names = {field.name for field in fields(LevelSection)} - {"encoder_fit", "num_groups"}
    level = {name: value for name, value in level.items() if name in names}
    level |= {"decoder_type": "auxiliary", "pixel_distribution": "categorical", "palette_size": 0}
    level |= {"dither": 0.0, "class_conditional": False}
    level |= {"fit": {**finest["encoder_fit"], "time_share": 0.95}}
    lines = [["quantizer", "PSNR", "codes used", "perplexity", "steps"]]
    for name, row in QUANTIZERS.items():
        folder = Path(output_dir) / name.replace(", ", "_").replace(" ", "_")
        sections = {
            "level_1": {**level, **row},
            "prior": {"fit": {"time_share": 0.05}},
            "data": {**settings.get("data", {}), "dataset_name": dataset_name},
            "run": {**settings.get("run", {}), "seed": seed},
        }
        train(sections, output_dir=folder, max_train_minutes=minutes)
        pipe = loaded(str(folder))
        images = held_out_images(dataset_name, num_images, pipe)
        psnr = rate_distortion(pipe, images, 1, seed)["level_1"]["psnr_of_preview"]
        metrics = read_json(folder / METRICS, "train the row again")
        use = metrics["codes"]["level_1"]
        cells = [f"{psnr:.2f}", f"{use['codes_used']} of {codebook_size}"]
        cells += [f"{use['codebook_perplexity']:.1f}", str(metrics["phases"]["level_1"]["steps"])]
        lines.append([name, *cells])
    print_markdown_table(lines)


def factors(
    dataset_name: str,
    model: str = MODEL,
    num_images: int = 450,
    classifier_steps: int = 600,
    output_dir: str = "runs/factors",
    seed: int = 0,
):
    """Sample more and more factors, from the pixels to z_1, and compare with the images.

    A row's factor and all finer ones are sampled from the exact distribution given the classes;
    coarser codes are those of held-out images. Rows of codes are previews, so that the difference
    between two rows is what the factor of the lower one loses. PSNR is that of the mean squared
    error. The accuracy is that of a classifier of the training images, if the model has classes;
    distances of patches are sliced Wasserstein distances (×1000), the finest scale first.

    Args:
        dataset_name: id on the Hub or a local path.
        model: a pipeline's folder, or its repository on the Hub.
        num_images: a random subset of the split "test".
        classifier_steps: of the classifier.
        output_dir: for a cache of the images and the classifier.
        seed: of the samples and the classifier.
    """
    pipe = loaded(model)
    if not pipe.stack.has_previews:
        raise ValueError(f"expected model with auxiliary decoders on all levels, got {model}")
    source = open_dataset(DataSettings(dataset_name=dataset_name, max_eval_samples=num_images))
    if pipe.labels and [*pipe.labels] != source.class_names:
        raise ValueError(
            f"expected dataset_name with the classes {[*pipe.labels]}, got {source.class_names}"
        )
    cache = Path(output_dir) / "cache"
    data = {}
    for split in ("train", "test"):
        manifest = replace(source.manifests[split], shape=pipe.image_shape)
        rows = read_images(
            source.splits[split], shape=pipe.image_shape, **source.read_options(split)
        )
        data[split] = cached(cache / split, manifest, pixel_batches(rows))
    pixels, labels = data["test"].batch(list(range(len(data["test"]))))
    images = uint8_to_unit(pixels)
    patches = patches_of([images], len(images), seed)
    classifier = None
    if pipe.labels:
        path = cache / "classifier.safetensors"
        classifier = cached_classifier(path, data["train"], classifier_steps, seed)

    def cells_of(result: Tensor) -> list[str]:
        psnr = psnr_of(255**2 * (result - images).square().mean().item())
        distances = sliced_wasserstein(patches, patches_of([result], len(images), seed + 1))
        cells = [f"{psnr:.2f}", ", ".join(f"{distance:.1f}" for distance in distances)]
        if classifier is not None:
            is_right = classifier(uint8_to_signed(unit_to_uint8(result))).argmax(1) == labels
            cells.append(f"{is_right.float().mean().item():.1%}")
        return cells

    class_labels = labels.tolist() if pipe.labels else None

    def sample_finer(codes: list[Tensor], preview: bool) -> Tensor:
        # Without labels and codes, nothing else tells the number of images.
        num_images_per_prompt = len(images) if not codes and class_labels is None else 1
        return pipe(
            class_labels,
            num_images_per_prompt,
            codes=codes or None,
            temperature=1.0,
            preview=preview,
            output_type="pt",
            generator=torch.Generator().manual_seed(seed),
        ).images.cpu()

    codes = pipe.encode(images)
    columns = ["sampled", "PSNR", "distances of patches", "accuracy"]
    lines = [columns[: 3 + (classifier is not None)]]
    lines.append(["the images", *cells_of(images)])
    lines.append(["pixels", *cells_of(sample_finer(codes, preview=False))])
    for count in range(len(codes), -1, -1):
        name = f"codes from z_{count + 1} on" if count < len(codes) else "no codes"
        lines.append([f"{name}, preview", *cells_of(sample_finer(codes[:count], preview=True))])
    print_markdown_table(lines)


def held_out_images(dataset_name: str, num_images: int, pipe: ProgressiveVAEPipeline) -> Tensor:
    """Return images of the split "test", uint8 (B, C, H, W)."""
    source = open_dataset(DataSettings(dataset_name=dataset_name, max_eval_samples=num_images))
    rows = read_images(source.splits["test"], shape=pipe.image_shape, **source.read_options("test"))
    return torch.cat([batch for batch, _ in pixel_batches(rows)]).to(torch.uint8)


def speed(model: str = MODEL, batch_sizes: tuple[int, ...] = (8, 64), bf16: bool = True):
    """Measure images per second of sampling, and of training steps of the finest level.

    A step is the encoder, the loss, its gradient and AdamW, on random images.

    Args:
        model: a pipeline's folder, or its repository on the Hub.
        batch_sizes: images of a batch.
        bf16: autocast of the training steps.
    """
    pipe = loaded(model)
    level = pipe.levels[-1]
    optimizer = torch.optim.AdamW(level.parameters())
    lines = [["images/s", "sampling", "training step of the finest level"]]
    for size in batch_sizes:
        sampling = rate(partial(sample, pipe, size), size)
        level.train().requires_grad_(True)
        finer = 2 * torch.rand(size, *pipe.image_shape, device=pipe.device) - 1
        training = rate(partial(train_step, level, optimizer, finer, bf16), size)
        level.eval()
        lines.append([f"batch {size}", f"{sampling:.1f}", f"{training:.1f}"])
    print_markdown_table(lines)
    print(f"\n{device_name(pipe.device)}, torch {torch.__version__}")


def sample(pipe: ProgressiveVAEPipeline, count: int):
    pipe(num_images_per_prompt=count, batch_size=count, output_type="pt")


def train_step(
    level: ProgressiveVAELevel, optimizer: torch.optim.Optimizer, finer: Tensor, bf16: bool
):
    with torch.autocast(finer.device.type, torch.bfloat16, enabled=bf16):
        loss = level(finer).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def loaded(model: str) -> ProgressiveVAEPipeline:
    pipe = ProgressiveVAEPipeline.from_pretrained(model)
    pipe.to(default_device()).set_progress_bar_config(disable=True)
    return pipe


def main(words: list[str]):
    auto_cli([image_codecs, few_images, quantizers, factors, speed], args=words)


if __name__ == "__main__":
    run_script(main)
