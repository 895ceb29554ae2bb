"""Metrics of sample quality: classification accuracy, Fréchet distance, precision and recall."""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.classes import NO_LABEL
from ..data.code_cache import GridDataset, Manifest, cached
from ..models.value_types import uint8_to_signed, unit_to_uint8
from ..paths import replacing
from ..pipeline import ProgressiveVAEPipeline
from ..pipeline_inputs import Sampling

MAX_EPOCHS = 20  # of a classifier


class Classifier(nn.Sequential):
    """A small convolutional classifier of pixel values (B, C, H, W) in [−1, 1].

    For color images it is deeper and has batch norm. It moves images to its own device and returns
    logits on the CPU.
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
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a quarter faster on CPUs

    def forward(self, pixel_values: Tensor) -> Tensor:
        return super().forward(_to_device_of(self, pixel_values)).cpu()


def _to_device_of(module: nn.Module, images: Tensor) -> Tensor:
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
    dataset: GridDataset,
    num_classes: int,
    max_train_steps: int = 1000,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Classifier:
    """Train a classifier on a training split in batches of 128, for at most `MAX_EPOCHS`."""
    num_steps = min(max_train_steps, MAX_EPOCHS * max(1, len(dataset) // 128))
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
    """Return the classifier of the safetensors file `path`, or train it and write that file.

    It is trained again if the file is of another data set, number of steps, seed or architecture.

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
    """The last features of a classifier, averaged over positions: images (B, C, H, W) in [0, 1]
    -> (B, F) on the CPU."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        modules = [*classifier]
        pool = [*map(type, modules)].index(nn.AdaptiveAvgPool2d)
        self.layers = nn.Sequential(*modules[:pool])

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(_to_device_of(self, images * 2 - 1)).mean((2, 3)).cpu()


class Inception(torch.nn.Module):
    """torchmetrics' Inception network on gray or color images in [0, 1]."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network((images.expand(-1, 3, -1, -1) * 255).round().to(torch.uint8))


@torch.no_grad()
def features_of(extractor: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """Return features (n, F) of batches of images in [0, 1]."""
    return torch.cat([extractor(images) for images in batches])


class _PrecomputedFeatures(nn.Identity):
    """An extractor whose inputs are features already, for torchmetrics."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


def frechet_distance(real: Tensor, samples: Tensor) -> float:
    """Return the Fréchet distance of two sets of features (n, F) (Heusel et al. 2017).

    It falls with n: compare only distances with equal n.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    # Only one process computes the metric: synchronization would wait for the others forever.
    metric = FrechetInceptionDistance(
        feature=_PrecomputedFeatures(real.shape[1]), sync_on_compute=False
    )
    metric.update(real, real=True)
    metric.update(samples, real=False)
    return metric.compute().item()


def frechet_joint_distance(
    real: Tensor, real_labels: Tensor, samples: Tensor, sample_labels: Tensor
) -> float:
    """Return the Fréchet distance of features (n, F) joined with class ids (n,), one-hot and as
    long as the features are on average (DeVries et al. 2019). It sees samples of a wrong class."""
    scale = real.norm(dim=1).mean()
    num_classes = 1 + int(torch.cat([real_labels, sample_labels]).max())

    def join(features: Tensor, labels: Tensor) -> Tensor:
        return torch.cat([features, scale * F.one_hot(labels, num_classes)], 1)

    return frechet_distance(join(real, real_labels), join(samples, sample_labels))


def precision_recall(real: Tensor, samples: Tensor, num_neighbors: int = 3) -> dict[str, float]:
    """Return improved precision and recall of two sets of features (n, F).

    Precision is the share of samples in the manifold of the real set, recall the share of real
    points in the manifold of the samples. The manifold of a set is the union of balls around its
    points, each as large as the distance to its k-th neighbor (Kynkäänniemi et al. 2019).
    """

    def coverage(points: Tensor, manifold: Tensor) -> float:
        radii = [
            # The nearest neighbor of a point is itself.
            torch.cdist(part, manifold).kthvalue(num_neighbors + 1).values
            for part in manifold.split(1000)
        ]
        radius = torch.cat(radii)
        is_inside = [(torch.cdist(part, manifold) <= radius).any(1) for part in points.split(1000)]
        return torch.cat(is_inside).double().mean().item()

    return {"precision": coverage(samples, real), "recall": coverage(real, samples)}


def sample_labeled(
    pipe: ProgressiveVAEPipeline,
    num_images: int,
    seed: int = 0,
    batch_size: int = 250,
    preview: bool = False,
    by_defaults: bool = False,
    labels: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Sample images with labels spread evenly over the classes, in batches for `write_cache`.

    Args:
        labels: class ids (num_images,) to sample instead.
        preview: sample codes only, and decode them with the auxiliary decoders.
        by_defaults: sample by `config.sampling`, not from the exact distribution.

    Yields:
        uint8 (b, C, H, W), and class ids (b,), −1 for a model without classes.
    """
    num_classes = len(pipe.labels)
    generator = torch.Generator().manual_seed(seed)
    for start in tqdm(range(0, num_images, batch_size), desc="sample"):
        indices = torch.arange(start, min(start + batch_size, num_images))
        if labels is not None:
            class_ids = labels[indices]
        else:
            class_ids = indices % num_classes if num_classes else indices.new_full((), NO_LABEL)
        arguments: dict[str, Any] = {} if by_defaults else {"temperature": 1.0}
        if num_classes:
            arguments["class_labels"] = class_ids.tolist()
        output = pipe(
            **arguments,
            num_images_per_prompt=1 if num_classes else len(indices),
            generator=generator,
            output_type="pt",
            batch_size=batch_size,
            preview=preview,
        )
        yield unit_to_uint8(output.images), class_ids.expand(len(indices))


def cached_samples(
    folder: str | Path,
    models: Iterable[nn.Module],
    shape: tuple[int, int, int],
    num_images: int,
    seed: int,
    batches: Iterable[tuple[Tensor, Tensor]],
    sampling: Sampling | None = None,
) -> GridDataset:
    """Return samples and their labels from the cache `folder`, as sampling takes minutes.

    If the cache is of other weights, settings, seed or number of images, `batches` are written
    there first.

    Args:
        models: all that samples depend on.
        shape: (C, H, W).
        batches: as `sample_labeled` yields them.
        sampling: settings of the samples; `None`: the exact distribution.
    """
    digest = hashlib.sha256()
    for model in models:
        for value in model.state_dict().values():
            digest.update(value.float().cpu().numpy().tobytes())
    name = f"samples, seed {seed}" if sampling is None else f"samples, seed {seed}, {sampling}"
    manifest = Manifest(digest.hexdigest(), name, str(num_images), shape, 256)
    return cached(folder, manifest, batches)


@torch.no_grad()
def accuracy(classifier: nn.Module, dataset: GridDataset, batch_size: int = 1000) -> float:
    """Return the share of labeled images that the classifier predicts correctly.

    Args:
        classifier: of pixel values (B, C, H, W) in [−1, 1].

    Raises:
        ValueError: no image has a label.
    """
    num_correct = num_labeled = 0
    for images, labels in dataset.batches(batch_size):
        num_correct += int((classifier(uint8_to_signed(images)).argmax(1) == labels).sum())
        num_labeled += int((labels != NO_LABEL).sum())
    if not num_labeled:
        raise ValueError(f"expected labels in {dataset.folder}, got none")
    return num_correct / num_labeled
