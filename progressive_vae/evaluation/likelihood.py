"""Held-out likelihood in bits/dim, codebook use, label accuracy and rate–distortion of codes."""

import math
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..configuration.level import NUM_PIXEL_VALUES
from ..data.classes import NO_LABEL
from ..data.code_cache import GridDataset
from ..models.value_types import uint8_to_unit
from ..pipeline import ProgressiveVAEPipeline
from .image_metrics import Classifier

SSIM_WINDOW = 11  # pixels a side


def code_use(counts: Tensor) -> dict[str, float]:
    """Return the number of codes used, and the perplexity exp(entropy) of their use, 1 … K.

    Args:
        counts: (K,), how often each code occurs.
    """
    probabilities = counts.double() / counts.sum()
    entropy = -torch.special.xlogy(probabilities, probabilities).sum()
    return {
        "codebook_size": len(counts),
        "codes_used": int((counts > 0).sum()),
        "codebook_perplexity": entropy.exp().item(),
    }


def evaluate(
    pipe: ProgressiveVAEPipeline,
    dataset: GridDataset,
    batch_size: int = 250,
    max_images: int | None = None,
    seed: int = 0,
    deadline: float | None = None,
) -> dict[str, Any]:
    """Return bits/dim per factor under the null class, and codebook use per level, of a split.

    Args:
        dataset: pixels, (C, H, W) of 0 … 255.
        max_images: of a random subset; `None`: all images.
        seed: of the subset.
        deadline: `time.perf_counter()` at which the next batch is the last; `None`: no limit.

    Returns:
        `{"num_images": images, "bits_per_dim": {factor: bits, "total": bits}, "codes":
        {level: code_use}}`, of the most probable codes. With stochastic encoders also
        `"bits_per_dim_of_drawn_codes"`, the bound E[−log2 P(s, z)] − H(P_Ψ) of one sample of the
        codes for each image.
    """
    counts = [torch.zeros(level.config.codebook_size, dtype=torch.long) for level in pipe.levels]
    nats_of: dict[str, Counter] = {"bits_per_dim": Counter()}
    generator = torch.Generator().manual_seed(0)
    if any(level.config.is_stochastic for level in pipe.levels):
        nats_of["bits_per_dim_of_drawn_codes"] = Counter()
    # A part of the images is a random one: a split may be ordered by its classes.
    is_part = deadline is not None or (max_images is not None and max_images < len(dataset))
    rows = torch.arange(len(dataset))
    if is_part:
        rows = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    num_images = 0
    for part in tqdm(rows[:max_images].split(batch_size), desc="evaluate"):
        images = dataset.batch(part.tolist())[0].to(torch.uint8)
        for codes, count in zip(pipe.encode(images), counts, strict=True):
            count += torch.bincount(codes.flatten(), minlength=len(count))
        for name, sums in nats_of.items():
            is_sampled = name == "bits_per_dim_of_drawn_codes"
            nats = pipe.log_prob(images, generator=generator if is_sampled else None)
            sums.update({factor: value.double().sum().item() for factor, value in nats.items()})
        num_images += len(images)
        if deadline is not None and time.perf_counter() > deadline:
            break
    scale = -1 / (math.log(2) * num_images * math.prod(pipe.image_shape))
    metrics: dict[str, Any] = {"num_images": num_images}
    for name, sums in nats_of.items():
        metrics[name] = {factor: nats * scale for factor, nats in sums.items()}
        metrics[name]["total"] = sum(sums.values()) * scale
    metrics["codes"] = {f"level_{i}": code_use(count) for i, count in enumerate(counts, 1)}
    return metrics


@torch.no_grad()
def label_accuracy(
    pipe: ProgressiveVAEPipeline,
    classifier: Classifier,
    dataset: GridDataset,
    seed: int = 0,
    batch_size: int = 250,
) -> dict[str, float]:
    """Return the accuracy of a classifier of real images on held-out images and reconstructions.

    It measures whether coarse codes encode the class.

    Returns:
        The accuracy on "images", for each level i on reconstructions from z_1 … z_i ("level_i")
        and, with auxiliary decoders, on previews from z_i ("preview_of_level_i").

    Raises:
        ValueError: no image has a label.
    """
    generator = torch.Generator().manual_seed(seed)
    num_correct: Counter[str] = Counter()
    num_labeled = 0
    if not dataset.has_labels:
        raise ValueError(f"expected labels in {dataset.folder}, got none")
    for grids, labels in dataset.batches(batch_size):
        num_labeled += int((labels != NO_LABEL).sum())
        for name, images in _reconstructions(pipe, grids.to(torch.uint8), generator):
            predictions = classifier(images * 2 - 1).argmax(1)
            num_correct[name] += int((predictions == labels).sum())
    return {name: count / num_labeled for name, count in num_correct.items()}


def _reconstructions(
    pipe: ProgressiveVAEPipeline, images: Tensor, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """Yield uint8 images, their reconstructions and previews from each level, in [0, 1]."""
    codes = pipe.encode(images)
    levels = range(1, pipe.num_levels + 1)
    yield "images", uint8_to_unit(images)
    for i in levels:
        yield f"level_{i}", pipe.decode(codes[:i], "pt", generator, temperature=1.0)
    if pipe.stack.has_previews:
        for i in levels:
            yield f"preview_of_level_{i}", pipe.preview(codes, i, "pt")


@torch.no_grad()
def rate_distortion(
    pipe: ProgressiveVAEPipeline,
    images: Tensor,
    num_samples: int = 8,
    seed: int = 0,
    batch_size: int = 250,
) -> dict[str, dict[str, float]]:
    """Return rate and distortion of the codes z_1 … z_k for each level k.

    Args:
        images: uint8 (B, C, H, W).
        num_samples: reconstructions that are averaged for `mse_of_mean`.

    Returns:
        For each "level_k": `bits_per_dim` of z_1 … z_k; `mse`, in squares of the 256 gray values,
        of one reconstruction from z_1 … z_k; `mse_of_mean` of the mean of `num_samples`
        reconstructions, which approximates a decoder trained with squared error; and, with
        auxiliary decoders, `mse_of_preview`. For each `mse` also `psnr`, 10 log10(255² / mse) in
        dB, and `ssim`, the structural similarity (Wang et al. 2004), of images that are at least
        as large as its window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    generator = torch.Generator().manual_seed(seed)
    max_value = float(NUM_PIXEL_VALUES - 1)
    sums: dict[str, Any] = {f"level_{k}": Counter() for k in range(1, pipe.num_levels + 1)}
    for batch in images.split(batch_size):
        codes = pipe.encode(batch)
        nats = pipe.log_prob(batch)
        rate = 0.0
        for k, factor in enumerate(pipe.factor_names[:-1], 1):  # the factor of z_k
            rate -= nats[factor].double().sum().item() / math.log(2)
            samples = [
                pipe.decode(codes[:k], "pt", generator, temperature=1.0) for _ in range(num_samples)
            ]
            decoded = {"": samples[0], "_of_mean": torch.stack(samples).mean(0)}
            if pipe.stack.has_previews:
                decoded["_of_preview"] = pipe.preview(codes, k, "pt")
            sums[f"level_{k}"]["bits_per_dim"] += rate
            for kind, image in decoded.items():
                image = image * max_value
                errors = {f"mse{kind}": (image - batch).square().sum().item()}
                if min(pipe.image_shape[1:]) >= SSIM_WINDOW:
                    similarity = ssim(image, batch.float(), data_range=max_value)
                    errors[f"ssim{kind}"] = float(similarity) * batch.numel()  # type: ignore[arg-type]
                sums[f"level_{k}"].update(errors)
    metrics: dict[str, dict[str, float]] = {}
    for name, totals in sums.items():
        means = {key: value / images.numel() for key, value in totals.items()}
        psnr = {
            key.replace("mse", "psnr"): psnr_of(value)
            for key, value in means.items()
            if key.startswith("mse")
        }
        metrics[name] = {**means, **psnr}
    return metrics


def psnr_of(squared_error: float) -> float:
    """Return the peak signal-to-noise ratio in dB of a mean squared error of 256 gray values.

    It is 138 at most, for identical images.
    """
    return 10 * math.log10((NUM_PIXEL_VALUES - 1) ** 2 / max(squared_error, 1e-9))
