import pytest
import torch
from conftest import tiny_pipeline

from progressive_vae.codes import GridDataset, Manifest, write_cache
from progressive_vae.evaluation import code_use, evaluate, label_accuracy, train_classifier


@pytest.fixture
def dataset(tmp_path):
    """Dark and light images, labelled so."""
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


def test_figures_over_a_split_are_those_of_the_pipeline(dataset):
    pipe = tiny_pipeline()
    figures = evaluate(pipe, dataset, batch_size=100)
    images = dataset.batch(slice(0, 256))[0].to(torch.uint8)
    for name, bits in pipe.bits_per_dim(images).items():
        assert figures["bits_per_dim"][name] == pytest.approx(bits, rel=1e-4)
    for i, codes in enumerate(pipe.encode(images), 1):
        assert figures["codes"][f"level_{i}"]["codes_used"] == len(codes.unique())


def test_labels_are_kept_by_images_and_lost_by_a_model_of_noise(dataset):
    classifier = train_classifier(dataset, num_classes=2)
    accuracy = label_accuracy(tiny_pipeline(), classifier, dataset)
    assert list(accuracy) == ["images", "level_1", "level_2", "level_3"]
    assert accuracy["images"] > 0.95 > 0.8 > accuracy["level_1"]
