"""How near drawn images are to real ones: a classifier, and distances in features."""

import hashlib
import math
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.classes import NO_LABEL
from ..data.code_cache import GridDataset, Manifest, cached
from ..data.streaming import PixelStream
from ..models.value_types import uint8_to_signed, uint8_to_unit, unit_to_uint8
from ..paths import replacing
from ..pipeline import ProgressiveVAEPipeline


class Classifier(nn.Sequential):
    """A small convolutional classifier of pixel values (B, C, H, W) in [−1, 1]: a yardstick.
    That of colored images, which are harder to tell apart, is deeper, with batch norm.

    Images may come from any device; logits are on the CPU.
    """

    def __init__(self, num_channels: int, num_classes: int):
        if num_channels == 1:
            layers, width = _gray_layers(), 128
        else:
            layers, width = _color_layers(num_channels), 192
        super().__init__(
            *layers,
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(16 * width, num_classes),
        )
        if num_channels > 1:
            self.to(memory_format=torch.channels_last)  # a quarter quicker on CPUs

    def forward(self, pixel_values: Tensor) -> Tensor:
        return super().forward(_beside(self, pixel_values)).cpu()


def _beside(module: nn.Module, images: Tensor) -> Tensor:
    """Images on the device of a network."""
    return images.to(next(module.parameters()).device)


def _gray_layers() -> list[nn.Module]:
    return [
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(64, 128, 3, padding=1, stride=2),
        nn.ReLU(),
    ]


def _color_layers(num_channels: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for width, stride in ((32, 1), (48, 2), (96, 2), (96, 1), (192, 2)):
        convolution = nn.Conv2d(num_channels, width, 3, stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
        num_channels = width
    return layers


def train_classifier(
    dataset: GridDataset | PixelStream,
    num_classes: int,
    max_train_steps: int = 1000,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Classifier:
    """Fit the yardstick on a training split in batches of 128, for at most 20 epochs."""
    num_steps = max_train_steps
    count = dataset.limit if isinstance(dataset, PixelStream) else dataset.num_examples
    if count is not None:
        num_steps = min(num_steps, 20 * max(1, count // 128))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(dataset.manifest.shape[0], num_classes).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=num_steps)
        batches = islice(dataset.random_batches(128), num_steps)
        for images, labels in tqdm(batches, total=num_steps, desc="classifier"):
            is_labeled = labels != NO_LABEL
            if not is_labeled.any():
                continue
            logits = model(uint8_to_signed(images[is_labeled]))
            loss = F.cross_entropy(logits, labels[is_labeled])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def cached_classifier(
    path: str | Path,
    dataset: GridDataset,
    max_train_steps: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Classifier:
    """What `train_classifier` made of this data set, read from the safetensors file `path`; it is
    written there first where there is none, or that of another data set, length, seed or network.

    Raises:
        ValueError: a data set without labels.
    """
    if not dataset.has_labels:
        raise ValueError(f"expected labels in {dataset.folder} for a classifier, got none")
    labels = dataset.table.unique("label")
    identity = f"{dataset.manifest}, {max_train_steps} steps, seed {seed}"
    num_classes = max(labels) + 1
    if Path(path).is_file():
        with safe_open(path, "pt") as file:
            classifier = Classifier(dataset.manifest.shape[0], num_classes)
            is_same = set(file.keys()) == set(classifier.state_dict())
            if is_same and (file.metadata() or {}).get("identity") == identity:
                classifier.load_state_dict({key: file.get_tensor(key) for key in file.keys()})
                return classifier.eval().to(device)
    classifier = train_classifier(dataset, num_classes, max_train_steps, seed, device)
    weights = {key: value.contiguous() for key, value in classifier.state_dict().items()}
    with replacing(path) as temporary:
        save_file(weights, temporary, {"identity": identity})
    return classifier


class ClassifierFeatures(nn.Module):
    """The last features of a classifier, averaged over the picture: images (B, C, H, W) in [0, 1]
    -> (B, F) on the CPU."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        modules = [*classifier]
        pool = [*map(type, modules)].index(nn.AdaptiveAvgPool2d)
        self.layers = nn.Sequential(*modules[:pool])

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(_beside(self, images * 2 - 1)).mean((2, 3)).cpu()


class Inception(torch.nn.Module):
    """torchmetrics' Inception network on gray or colored images in [0, 1]."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network((images.expand(-1, 3, -1, -1) * 255).round().to(torch.uint8))  # 8 bits


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


def precision_recall(real: Tensor, drawn: Tensor, num_neighbors: int = 3) -> dict[str, float]:
    """Of two sets of features (n, F): the share of drawn ones that lie among the real ones, and of
    real ones among the drawn ones.

    A point lies among a set if it is nearer to one of its points than that point's k-th neighbor
    in the set (Kynkäänniemi et al. 2019).
    """

    def share_among(points: Tensor, others: Tensor) -> float:
        radii = [
            torch.cdist(part, others).kthvalue(num_neighbors + 1).values
            for part in others.split(1000)
        ]
        radius = torch.cat(radii)  # the nearest neighbor of a point is itself
        inside = [(torch.cdist(part, others) <= radius).any(1) for part in points.split(1000)]
        return torch.cat(inside).double().mean().item()

    return {"precision": share_among(drawn, real), "recall": share_among(real, drawn)}


def sample_labeled(
    pipe: ProgressiveVAEPipeline,
    num_images: int,
    seed: int = 0,
    batch_size: int = 250,
    preview: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Drawn uint8 images, or previews of drawn codes, and their labels, spread evenly over the
    classes; −1 where there are none. For `codes.write_cache`."""
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
            preview=preview,
        )
        yield unit_to_uint8(drawn.images), labels


def cached_samples(
    folder: str | Path,
    models: Iterable[nn.Module],
    shape: tuple[int, int, int],
    num_images: int,
    seed: int,
    batches: Iterable[tuple[Tensor, Tensor]],
) -> GridDataset:
    """Drawn images (C, H, W) and their labels, as drawing takes minutes, from the cache `folder`;
    where that is not what these models draw, `batches` are written there first."""
    digest = hashlib.sha256()
    for model in models:
        for value in model.state_dict().values():
            digest.update(value.float().cpu().numpy().tobytes())
    manifest = Manifest(digest.hexdigest(), f"drawn {seed}", str(num_images), shape, 256)
    return cached(folder, manifest, batches)


@torch.no_grad()
def accuracy(classifier: nn.Module, dataset: GridDataset, batch_size: int = 1000) -> float:
    """The share of labeled images whose label a classifier of pixel values in [−1, 1] predicts.

    Raises:
        ValueError: no image has a label.
    """
    right = count = 0
    for images, labels in dataset.batches(batch_size):
        right += int((classifier(uint8_to_signed(images)).argmax(1) == labels).sum())
        count += int((labels != NO_LABEL).sum())
    if not count:
        raise ValueError(f"expected labels in {dataset.folder}, got none")
    return right / count


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
        features_of(extractor, (uint8_to_unit(images) for images, _ in batches))[:num_images]
        for batches in (
            islice(dataset.batches(batch_size), math.ceil(num_images / batch_size)),
            sample_labeled(pipe, num_images, seed, batch_size),
        )
    )
    return frechet_distance(real, drawn)
