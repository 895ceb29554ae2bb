import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.models import AUXILIARY, pipeline_of, tiny_level, tiny_pipeline, tiny_prior
from progressive_vae import ProgressiveVAEPipeline
from progressive_vae.data.code_cache import GridDataset, Manifest, write_cache
from progressive_vae.evaluation.image_metrics import (
    Classifier,
    cached_classifier,
    frechet_distance,
    frechet_joint_distance,
    sample_labeled,
    train_classifier,
)
from progressive_vae.evaluation.likelihood import code_use, evaluate, label_accuracy


@pytest.fixture
def dataset(tmp_path):
    """Dark images with the label 0 and light ones with the label 1."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(256) % 2
    grids = torch.randint(100, (256, 3, 5, 7), generator=generator) + 150 * labels.view(-1, 1, 1, 1)
    manifest = Manifest("", "made", "test", (3, 5, 7), 256)
    write_cache(tmp_path / "cache", manifest, [(grids, labels)])
    return GridDataset(tmp_path / "cache", manifest)


def test_code_use():
    assert code_use(torch.tensor([5, 5, 5, 5]))["codebook_perplexity"] == pytest.approx(4)
    use = code_use(torch.tensor([7, 0, 0]))
    assert use["codes_used"] == 1 and use["codebook_perplexity"] == pytest.approx(1)


def test_metrics_of_a_split_agree_with_the_pipeline(dataset):
    pipe = tiny_pipeline()
    metrics = evaluate(pipe, dataset, batch_size=100)
    images = dataset.batch(slice(0, 256))[0].to(torch.uint8)
    for name, bits in pipe.bits_per_dim(images).items():
        assert metrics["bits_per_dim"][name] == pytest.approx(bits, rel=1e-4)
    for i, codes in enumerate(pipe.encode(images), 1):
        assert metrics["codes"][f"level_{i}"]["codes_used"] == len(codes.unique())


def test_metrics_of_a_part_of_a_split(dataset):
    """A random part, which ends early at a deadline."""
    pipe = tiny_pipeline()
    part = evaluate(pipe, dataset, batch_size=40, max_images=100, seed=3)
    rows = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(3))[:100]
    images = dataset.batch(rows.tolist())[0].to(torch.uint8)
    assert part["num_images"] == 100
    assert part["bits_per_dim"] == pytest.approx(pipe.bits_per_dim(images), rel=1e-4)
    late = evaluate(pipe, dataset, batch_size=40, seed=3, deadline=0.0)
    assert late["num_images"] == 40
    assert late["bits_per_dim"] == pytest.approx(pipe.bits_per_dim(images[:40]), rel=1e-4)


def test_label_accuracy_of_images_and_of_an_untrained_model(dataset):
    classifier = train_classifier(dataset, num_classes=2)
    accuracy = label_accuracy(tiny_pipeline(), classifier, dataset)
    assert list(accuracy) == ["images", "level_1", "level_2", "level_3"]
    assert accuracy["images"] > 0.95 > 0.8 > accuracy["level_1"]


def test_label_accuracy_of_previews(dataset):
    classifier, pipe = train_classifier(dataset, num_classes=2), pipeline_of(**AUXILIARY)
    accuracy = label_accuracy(pipe, classifier, dataset, batch_size=100)
    kinds = [f"{kind}level_{i}" for kind in ("", "preview_of_") for i in (1, 2)]
    assert list(accuracy) == ["images", *kinds]
    grids, labels = dataset.batch(slice(0, 256))
    for i in (1, 2):
        images = pipe.preview(grids.to(torch.uint8), i, "pt")
        is_correct = classifier(images * 2 - 1).argmax(1) == labels
        share = is_correct.double().mean().item()
        assert accuracy[f"preview_of_level_{i}"] == pytest.approx(share, abs=0.01)


def test_a_cached_classifier_is_trained_again_for_another_architecture(dataset, tmp_path):
    path, pixel_values = tmp_path / "classifier.safetensors", torch.rand(3, 3, 5, 7)
    first = cached_classifier(path, dataset, 3)
    weights = path.read_bytes()
    assert torch.equal(first(pixel_values), cached_classifier(path, dataset, 3)(pixel_values))
    assert path.read_bytes() == weights
    with safe_open(path, "pt") as file:
        identity = file.metadata()
    save_file(Classifier(1, 2).state_dict(), path, identity)
    cached_classifier(path, dataset, 3)
    assert load_file(path).keys() == first.state_dict().keys()


def test_samples_are_spread_over_the_classes_of_any_factor():
    level = tiny_level(num_channels=1, num_classes=3)
    pipe = ProgressiveVAEPipeline.from_levels(tiny_prior(grid_size=[2, 2]), [level], (4, 4))
    pipe.set_progress_bar_config(disable=True)
    parts = list(sample_labeled(pipe, 7, batch_size=4))
    assert torch.cat([labels for _, labels in parts]).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert torch.cat([images for images, _ in parts]).shape == (7, 1, 4, 4)


def test_frechet_distance_of_gaussians():
    """|μ − ν|² + tr(Σ + Τ − 2 √ΣΤ), here with diagonal covariances."""
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(2, 100_000, 2, generator=generator).double()
    scale, shift = torch.tensor([2.0, 0.5]), torch.tensor([1.0, 0.0])
    expected = 1 + sum((1 - s) ** 2 for s in scale.tolist())
    assert frechet_distance(one, two * scale + shift) == pytest.approx(expected, rel=0.02)
    assert math.isclose(frechet_distance(one, one), 0, abs_tol=1e-4)


def test_the_joint_distance_sees_samples_of_other_classes():
    """The features of both sets are the same, and the labels of one are those of other images."""
    labels = torch.arange(600) % 3
    features = torch.randn(600, 4, generator=torch.Generator().manual_seed(0)) + labels[:, None]
    assert math.isclose(frechet_joint_distance(features, labels, features, labels), 0, abs_tol=1e-3)
    wrong = frechet_joint_distance(features, labels, features, labels.roll(1))
    assert wrong > 0.1 and wrong > 10 * frechet_distance(features, features)
