"""Held-out figures: bits/dim per factor, code use, what each level says of the class, distances."""

import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import PIL.Image
import torch
import torch.nn.functional as F
from diffusers.utils import make_image_grid
from PIL.Image import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..entries import as_pixel_values
from ..images import from_pixel_values
from ..pipeline import ProgressiveVAEPipeline
from .codes import GridDataset
from .streaming import PixelStream


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


class Classifier(nn.Sequential):
    """A small convolutional classifier of pixel values (B, C, H, W) in [−1, 1]: a yardstick."""

    def __init__(self, num_channels: int, num_classes: int, width: int = 32):
        super().__init__(
            nn.Conv2d(num_channels, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(2 * width, 4 * width, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * width, num_classes),
        )


def train_classifier(
    dataset: GridDataset | PixelStream,
    num_classes: int,
    max_train_steps: int = 1000,
    seed: int = 0,
) -> Classifier:
    """Fit the yardstick on a training split in batches of 128, for at most 20 epochs."""
    num_steps = max_train_steps
    count = dataset.limit if isinstance(dataset, PixelStream) else dataset.num_examples
    if count is not None:
        num_steps = min(num_steps, 20 * max(1, count // 128))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(dataset.manifest.shape[0], num_classes)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=num_steps)
        batches = islice(dataset.random_batches(128), num_steps)
        for images, labels in tqdm(batches, total=num_steps, desc="classifier"):
            loss = F.cross_entropy(model(as_pixel_values(images)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def cached_classifier(
    path: str | Path, dataset: GridDataset, max_train_steps: int, seed: int = 0
) -> Classifier:
    """What `train_classifier` made of this data set, read from the safetensors file `path`; it is
    written there first where there is none, or that of another data set, length or seed.

    Raises:
        ValueError: a data set without labels.
    """
    labels = dataset.table.unique("label")
    if min(labels) < 0:
        raise ValueError(f"expected labels in {dataset.folder} for a classifier, got none")
    identity = f"{dataset.manifest}, {max_train_steps} steps, seed {seed}"
    num_classes = max(labels) + 1
    if Path(path).is_file():
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("identity") == identity:
                classifier = Classifier(dataset.manifest.shape[0], num_classes)
                classifier.load_state_dict({key: file.get_tensor(key) for key in file.keys()})
                return classifier.eval()
    classifier = train_classifier(dataset, num_classes, max_train_steps, seed)
    temporary = Path(path).with_suffix(".incomplete")
    save_file(classifier.state_dict(), temporary, {"identity": identity})
    os.replace(temporary, path)
    return classifier


@torch.no_grad()
def label_accuracy(
    pipe: ProgressiveVAEPipeline,
    classifier: Classifier,
    dataset: GridDataset,
    seed: int = 0,
    batch_size: int = 250,
) -> dict[str, float]:
    """Accuracy of a classifier of real images on held-out images, and on the same images drawn
    again from their own z_1 … z_i, for each level i: whether the coarse codes say what it is."""
    generator = torch.Generator().manual_seed(seed)
    right = {"images": 0, **{f"level_{i}": 0 for i in range(1, pipe.num_levels + 1)}}
    for start in range(0, len(dataset), batch_size):
        grids, labels = dataset.batch(slice(start, start + batch_size))
        images, codes = grids.to(torch.uint8), pipe.encode(grids.to(torch.uint8))
        for name in right:
            level = 0 if name == "images" else int(name.removeprefix("level_"))
            shown = pipe.decode(codes[:level], "pt", generator) if level else images.float() / 255
            right[name] += int((classifier(shown * 2 - 1).argmax(1) == labels).sum())
    return {name: count / len(dataset) for name, count in right.items()}


class ClassifierFeatures(nn.Module):
    """The last features of a classifier, averaged over the picture: images (B, C, H, W) in [0, 1]
    -> (B, F)."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        modules = [*classifier]
        pool = [*map(type, modules)].index(nn.AdaptiveAvgPool2d)
        self.layers = nn.Sequential(*modules[:pool])

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images * 2 - 1).mean((2, 3))


@torch.no_grad()
def features_of(extractor: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """Features (n, F) of batches of images in [0, 1]."""
    return torch.cat([extractor(images) for images in batches])


class _Given(nn.Identity):
    """Features in place of images, for torchmetrics."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


def frechet_distance(real: Tensor, drawn: Tensor) -> float:
    """Fréchet distance of two sets of features (n, F) (Heusel et al. 2017). It falls with n, so
    only distances of equally many images are to be compared."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    # One process measures, and would wait for the others for ever.
    metric = FrechetInceptionDistance(feature=_Given(real.shape[1]), sync_on_compute=False)
    metric.update(real, real=True)
    metric.update(drawn, real=False)
    return metric.compute().item()


def precision_recall(real: Tensor, drawn: Tensor, num_neighbours: int = 3) -> dict[str, float]:
    """Of two sets of features (n, F): the share of drawn ones that lie among the real ones, and of
    real ones among the drawn ones.

    A point lies among a set if it is nearer to one of its points than that point's k-th neighbour
    in the set (Kynkäänniemi et al. 2019).
    """

    def share_among(points: Tensor, others: Tensor) -> float:
        radii = [
            torch.cdist(part, others).kthvalue(num_neighbours + 1).values
            for part in others.split(1000)
        ]
        radius = torch.cat(radii)  # the nearest neighbour of a point is itself
        inside = [(torch.cdist(part, others) <= radius).any(1) for part in points.split(1000)]
        return torch.cat(inside).double().mean().item()

    return {"precision": share_among(drawn, real), "recall": share_among(real, drawn)}


@torch.no_grad()
def rate_distortion(
    pipe: ProgressiveVAEPipeline,
    images: Tensor,
    num_draws: int = 8,
    seed: int = 0,
    batch_size: int = 250,
) -> dict[str, dict[str, float]]:
    """For each level k the bits/dim of z_1 … z_k, and what they tell of uint8 images (B, C, H, W).

    `mse` is the mean squared error, in squares of the 256 grey values, of one draw from z_1 … z_k;
    `mse_of_mean` that of the mean of `num_draws` draws, nearer to what a decoder that minimises
    squared error would show. `psnr` is 10 log10(255² / mse) in dB, likewise.
    """
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, Counter] = {f"level_{k}": Counter() for k in range(1, pipe.num_levels + 1)}
    for batch in images.split(batch_size):
        codes, nats = pipe.encode(batch), pipe.log_prob(batch)
        rate = 0.0
        for k, factor in enumerate(pipe.factor_names[:-1], 1):  # that of z_k
            rate -= nats[factor].double().sum().item() / math.log(2)
            shown = torch.stack(
                [pipe.decode(codes[:k], "pt", generator) * 255 for _ in range(num_draws)]
            )
            errors = {"mse": shown[0] - batch, "mse_of_mean": shown.mean(0) - batch}
            squares = {name: error.square().sum().item() for name, error in errors.items()}
            sums[f"level_{k}"].update({"bits_per_dim": rate, **squares})
    figures = {}
    for name, totals in sums.items():
        figures[name] = {key: value / images.numel() for key, value in totals.items()}
        for key, psnr in (("mse", "psnr"), ("mse_of_mean", "psnr_of_mean")):
            figures[name][psnr] = psnr_of(figures[name][key])
    return figures


def psnr_of(squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error of 256 grey values; 138 at most,
    where nothing differs."""
    return 10 * math.log10(255**2 / max(squared_error, 1e-9))


def draw_labelled(
    pipe: ProgressiveVAEPipeline, num_images: int, seed: int = 0, batch_size: int = 250
) -> Iterator[tuple[Tensor, Tensor]]:
    """Drawn uint8 images and their labels, spread evenly over the classes; −1 where there are
    none. For `codes.write_cache`."""
    num_classes, generator = len(pipe.labels), torch.Generator().manual_seed(seed)
    for start in tqdm(range(0, num_images, batch_size), desc="draw"):
        numbers = torch.arange(start, min(start + batch_size, num_images))
        labels = numbers % num_classes if num_classes else torch.full_like(numbers, -1)
        prompt = {"class_labels": labels.tolist()} if num_classes else {}
        drawn = pipe(
            **prompt,
            num_images_per_prompt=1 if num_classes else len(numbers),
            generator=generator,
            output_type="pt",
            batch_size=batch_size,
        )
        yield (drawn.images * 255).round().to(torch.uint8), labels


@torch.no_grad()
def accuracy(classifier: nn.Module, dataset: GridDataset, batch_size: int = 1000) -> float:
    """The share of images whose label a classifier of pixel values in [−1, 1] tells."""
    right = sum(
        int((classifier(as_pixel_values(images)).argmax(1) == labels).sum())
        for images, labels in dataset.batches(batch_size)
    )
    return right / len(dataset)


def distance_of_samples(
    pipe: ProgressiveVAEPipeline,
    classifier: Classifier,
    dataset: GridDataset,
    num_images: int,
    seed: int = 0,
    batch_size: int = 250,
) -> float:
    """Fréchet distance of so many drawn images, their labels spread evenly over the classes, to
    as many held-out ones, the first, in the features of a classifier."""
    extractor = ClassifierFeatures(classifier)
    real, drawn = (
        features_of(extractor, (images / 255 for images, _ in batches))[:num_images]
        for batches in (
            islice(dataset.batches(batch_size), math.ceil(num_images / batch_size)),
            draw_labelled(pipe, num_images, seed, batch_size),
        )
    )
    return frechet_distance(real, drawn)


def sampling_speed(pipe: ProgressiveVAEPipeline, num_images: int = 250) -> float:
    """Images per second drawn in one batch of `num_images`, after a small one to warm up."""
    for count in (8, num_images):
        start = time.perf_counter()
        pipe(num_images_per_prompt=count, batch_size=num_images, output_type="pt")
    return num_images / (time.perf_counter() - start)


def picture_grid(images: list[Image], columns: int) -> Image:
    """Rows of `columns` images with a thin gap; small ones enlarged, pixel by pixel."""
    width, height = images[0].size
    scale, gap = max(1, 56 // max(width, height)), 2
    cells = []
    for image in images:
        cell = PIL.Image.new(image.mode, (width * scale + gap, height * scale + gap))
        cell.paste(image.resize((width * scale, height * scale), PIL.Image.Resampling.NEAREST))
        cells.append(cell)
    return make_image_grid(cells, len(cells) // columns, columns)


def sample_grid(pipe: ProgressiveVAEPipeline, seed: int = 0, columns: int = 10) -> Image:
    """Drawn images: a row for each class (at most 10), or 10 rows of an unconditional model."""
    assert pipe.prior is not None
    rows = min(pipe.prior.config.num_classes, 10) or 10
    generators = [torch.Generator().manual_seed(seed + i) for i in range(rows * columns)]
    if pipe.prior.config.num_classes:
        output = pipe(list(range(rows)), num_images_per_prompt=columns, generator=generators)
    else:
        output = pipe(num_images_per_prompt=rows * columns, generator=generators)
    return picture_grid(output.images, columns)


def reconstruction_grid(pipe: ProgressiveVAEPipeline, images: Tensor, seed: int = 0) -> Image:
    """One row for each level, from the coarsest to the finest, then the images themselves.

    Row i shows uint8 images (B, C, H, W) drawn again from their own z_1 … z_i.
    """
    codes, rows = pipe.encode(images), []
    for level in range(1, pipe.num_levels + 1):
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(images))]
        rows += pipe.decode(codes[:level], generator=generators)
    rows += from_pixel_values(as_pixel_values(images), "pil")
    return picture_grid(rows, len(images))


def _images(dataset: GridDataset, batch_size: int) -> Iterator[Tensor]:
    total = math.ceil(len(dataset) / batch_size)
    for grids, _ in tqdm(dataset.batches(batch_size), total=total, desc="evaluate"):
        yield grids.to(torch.uint8)
