"""Held-out figures: bits/dim per factor, code use, what each level says of the class, distances."""

import math
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..configuration.level import NUM_PIXEL_VALUES
from ..data.classes import NO_LABEL
from ..data.code_cache import GridDataset
from ..models.value_types import uint8_to_unit
from ..pipeline import ProgressiveVAEPipeline
from ..visualization import has_previews
from .image_metrics import Classifier

SSIM_WINDOW = 11


def code_use(counts: Tensor) -> dict[str, float]:
    """Of how often each of K codes occurs, (K,): codes used, and perplexity exp H(use), 1 … K."""
    probabilities = counts.double() / counts.sum()
    entropy = -torch.special.xlogy(probabilities, probabilities).sum()
    return {
        "codebook_size": len(counts),
        "codes_used": int((counts > 0).sum()),
        "codebook_perplexity": entropy.exp().item(),
    }


def evaluate(
    pipe: ProgressiveVAEPipeline, dataset: GridDataset, batch_size: int = 250
) -> dict[str, dict]:
    """Bits/dim per factor under the null class, and code use per level, over a whole split.

    Args:
        dataset: pixels, (C, H, W) of 0 … 255.

    Returns:
        `{"bits_per_dim": {factor: bits, "total": bits}, "codes": {level: code_use}}`, of the most
        probable codes; with stochastic encoders also `"bits_per_dim_of_drawn_codes"`, the bound
        E[−log2 P(s, z)] − H(P_Ψ) of one draw of the codes for each image.
    """
    counts = [torch.zeros(level.config.codebook_size, dtype=torch.long) for level in pipe.levels]
    terms: dict[str, Counter] = {"bits_per_dim": Counter()}
    generator = torch.Generator().manual_seed(0)
    if any(level.config.is_stochastic for level in pipe.levels):
        terms["bits_per_dim_of_drawn_codes"] = Counter()
    for images in _images(dataset, batch_size):
        for codes, count in zip(pipe.encode(images), counts, strict=True):
            count += torch.bincount(codes.flatten(), minlength=len(count))
        for name, sums in terms.items():
            is_drawn = name == "bits_per_dim_of_drawn_codes"
            nats = pipe.log_prob(images, generator=generator if is_drawn else None)
            sums.update({factor: value.double().sum().item() for factor, value in nats.items()})
    scale = -1 / (math.log(2) * len(dataset) * math.prod(pipe.image_shape))
    figures: dict[str, dict] = {
        name: {**{factor: nats * scale for factor, nats in sums.items()},
               "total": sum(sums.values()) * scale}
        for name, sums in terms.items()
    }  # fmt: skip
    codes_used = {f"level_{i}": code_use(count) for i, count in enumerate(counts, 1)}
    return {**figures, "codes": codes_used}


@torch.no_grad()
def label_accuracy(
    pipe: ProgressiveVAEPipeline,
    classifier: Classifier,
    dataset: GridDataset,
    seed: int = 0,
    batch_size: int = 250,
) -> dict[str, float]:
    """Accuracy of a classifier of real images on held-out images, and on the same images drawn
    again from their own z_1 … z_i, for each level i: whether the coarse codes say what it is.
    `preview_of_level_i` is that on previews from z_i, where there are any.

    Raises:
        ValueError: no image has a label.
    """
    generator = torch.Generator().manual_seed(seed)
    right: Counter[str] = Counter()
    count = 0
    if not dataset.has_labels:
        raise ValueError(f"expected labels in {dataset.folder}, got none")
    for grids, labels in dataset.batches(batch_size):
        count += int((labels != NO_LABEL).sum())
        for name, shown in _views(pipe, grids.to(torch.uint8), generator):
            right[name] += int((classifier(shown * 2 - 1).argmax(1) == labels).sum())
    return {name: number / count for name, number in right.items()}


def _views(
    pipe: ProgressiveVAEPipeline, images: Tensor, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """uint8 images, and what each level says of them, in [0, 1]."""
    codes, levels = pipe.encode(images), range(1, pipe.num_levels + 1)
    yield "images", uint8_to_unit(images)
    for i in levels:
        yield f"level_{i}", pipe.decode(codes[:i], "pt", generator)
    if has_previews(pipe):
        for i in levels:
            yield f"preview_of_level_{i}", pipe.preview(codes, i, "pt")


@torch.no_grad()
def rate_distortion(
    pipe: ProgressiveVAEPipeline,
    images: Tensor,
    num_draws: int = 8,
    seed: int = 0,
    batch_size: int = 250,
) -> dict[str, dict[str, float]]:
    """For each level k the bits/dim of z_1 … z_k, and what they tell of uint8 images (B, C, H, W).

    `mse` is the mean squared error, in squares of the 256 gray values, of one draw from z_1 … z_k;
    `mse_of_mean` that of the mean of `num_draws` draws, nearer to what a decoder that minimizes
    squared error would show; `mse_of_preview` that of what auxiliary decoders expect, where there
    are any. `psnr` is 10 log10(255² / mse) in dB, `ssim` the structural similarity (Wang et al.
    2004), likewise, of images that have room for its window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, Counter] = {f"level_{k}": Counter() for k in range(1, pipe.num_levels + 1)}
    for batch in images.split(batch_size):
        codes, nats = pipe.encode(batch), pipe.log_prob(batch)
        rate = 0.0
        for k, factor in enumerate(pipe.factor_names[:-1], 1):  # that of z_k
            rate -= nats[factor].double().sum().item() / math.log(2)
            shown = torch.stack(
                [pipe.decode(codes[:k], "pt", generator) * (NUM_PIXEL_VALUES - 1)
                 for _ in range(num_draws)]
            )  # fmt: skip
            views = {"": shown[0], "_of_mean": shown.mean(0)}
            if has_previews(pipe):
                views["_of_preview"] = pipe.preview(codes, k, "pt") * (NUM_PIXEL_VALUES - 1)
            sums[f"level_{k}"]["bits_per_dim"] += rate
            for kind, view in views.items():
                errors = {f"mse{kind}": (view - batch).square().sum().item()}
                if min(pipe.image_shape[1:]) >= SSIM_WINDOW:
                    alike = ssim(view, batch.float(), data_range=float(NUM_PIXEL_VALUES - 1))
                    errors[f"ssim{kind}"] = float(alike) * batch.numel()  # type: ignore[arg-type]
                sums[f"level_{k}"].update(errors)
    figures = {}
    for name, totals in sums.items():
        found = {key: value / images.numel() for key, value in totals.items()}
        psnr = {key.replace("mse", "psnr"): psnr_of(value) for key, value in found.items()
                if key.startswith("mse")}  # fmt: skip
        figures[name] = {**found, **psnr}
    return figures


def psnr_of(squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error of 256 gray values; 138 at most,
    where nothing differs."""
    return 10 * math.log10((NUM_PIXEL_VALUES - 1) ** 2 / max(squared_error, 1e-9))


def _images(dataset: GridDataset, batch_size: int) -> Iterator[Tensor]:
    total = math.ceil(len(dataset) / batch_size)
    for grids, _ in tqdm(dataset.batches(batch_size), total=total, desc="evaluate"):
        yield grids.to(torch.uint8)
