"""Streams of images."""

import json
from collections import Counter

import datasets
import PIL.Image
import pytest
import torch

from helpers.recipes import SMALLER
from progressive_vae.data.args import DataSettings
from progressive_vae.data.classes import find_classes
from progressive_vae.data.code_cache import GridDataset, Manifest
from progressive_vae.data.dataset import load_images, read_images
from progressive_vae.data.streaming import PixelStream
from progressive_vae.training.checkpoints import Checkpoints

COLUMNS = {"image_column": "image", "label_column": None}
COUNT = 1437  # digits to train on, in 4 files
STREAM = [*SMALLER, "--streaming", "--max_train_samples", "100"]


@pytest.fixture(scope="module")
def stream():
    table = load_images(DataSettings(dataset_name="digits", streaming=True)).splits["train"]
    manifest = Manifest("", "digits", "train", (1, 8, 8), 256)
    return PixelStream(table, manifest, buffer_size=100, image_column="image", label_column="label")


def files(grids):
    return Counter(grid.numpy().tobytes() for grid in grids)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_each_process_reads_its_own_images(stream, processes):
    shares = [
        torch.cat([grids for grids, _ in stream.share(rank, processes).batches(100)])
        for rank in range(processes)
    ]
    assert max(map(len, shares)) - min(map(len, shares)) <= 4
    complete = torch.cat([grids for grids, _ in stream.batches(100)])
    assert len(complete) == COUNT and files(torch.cat(shares)) == files(complete)


def test_an_epoch_has_every_image_once_and_the_next_another_order(stream):
    stream.begin_at(0, 0)
    batches = iter(torch.utils.data.DataLoader(stream, COUNT // 3))
    first, second = (torch.cat([next(batches)["grid"] for _ in range(3)]) for _ in range(2))
    assert max(files(first).values()) == 1
    assert files(first) == files(second) and not torch.equal(first, second)
    for start, is_same in ((0, True), (64, False)):  # a resumed fit has another order
        stream.begin_at(0, start)
        again = next(iter(torch.utils.data.DataLoader(stream, 100)))["grid"]
        assert torch.equal(again, first[:100]) == is_same


def test_workers_of_a_loader_read_different_images(stream):
    stream.begin_at(0, 0)
    batches = iter(torch.utils.data.DataLoader(stream, 32, num_workers=2))
    assert max(files(torch.cat([next(batches)["grid"] for _ in range(40)])).values()) == 1


def test_a_streamed_folder_is_held_out_by_file(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(60):
            PIL.Image.new("L", (4, 4), 2 * i + (name == "dog")).save(tmp_path / name / f"{i}.png")
    settings = DataSettings(train_data_dir=str(tmp_path), streaming=True, eval_fraction=0.3)
    splits = load_images(settings).splits
    assert find_classes(splits).names == ["cat", "dog"]
    values = {
        split: [int(image.max()) for image, _ in read_images(table, "image", "label", (1, 4, 4))]
        for split, table in splits.items()
    }
    assert sorted(values["train"] + values["test"]) == list(range(120))
    assert len(values["test"]) == 36


@pytest.mark.parametrize("has_bytes", [True, False])
def test_a_stream_is_held_out_by_content_or_by_whole_path(tmp_path, has_bytes):
    """Files of one name in many folders are not all held out, or all learned."""
    rows = []
    for i in range(120):
        path = tmp_path / str(i) / "image.png"
        path.parent.mkdir()
        PIL.Image.new("L", (4, 4), i).save(path)
        rows.append({"bytes": path.read_bytes() if has_bytes else None, "path": str(path)})
    features = datasets.Features({"image": datasets.Image()})
    stream = datasets.Dataset.from_dict({"image": rows}, features).to_iterable_dataset()
    splits = load_images(DataSettings(streaming=True, eval_fraction=0.3), stream).splits
    values = {
        split: [int(image.max()) for image, _ in read_images(table, "image", None, (1, 4, 4))]
        for split, table in splits.items()
    }
    assert sorted(values["train"] + values["test"]) == list(range(120))
    assert 15 < len(values["test"]) < 60


def test_an_empty_stream_raises(stream):
    empty = PixelStream(stream.table.take(0), stream.manifest, **COLUMNS)
    with pytest.raises(ValueError, match="expected images in split 'train', got none"):
        next(iter(empty))


def test_random_flips(stream):
    table = (
        load_images(DataSettings(dataset_name="digits", streaming=True)).splits["train"].take(200)
    )
    mirrored = PixelStream(table, stream.manifest, random_flip=True, buffer_size=1, **COLUMNS)
    plain = PixelStream(table, stream.manifest, buffer_size=1, **COLUMNS)
    flipped, original = (
        next(iter(torch.utils.data.DataLoader(s, 200)))["grid"] for s in (mirrored, plain)
    )
    is_flipped = (flipped == original.flip(-1)).flatten(1).all(1)
    assert ((flipped == original).flatten(1).all(1) | is_flipped).all()
    assert 60 < is_flipped.sum() < 140
    assert (
        sum(len(grids) for grids, _ in mirrored.batches(50)) == 400
    )  # both the images and their flips


def test_training_on_a_stream(script, tmp_path):
    flags = [*STREAM, "--output_dir", str(tmp_path)]
    script.main([*flags, "--level_2.refit.fit.max_train_steps", "6"])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["num_images"] == 40 and 0 < metrics["bits_per_dim"]["total"] < 9
    assert "refit_level_2" in metrics["phases"]
    cache = tmp_path / "cache"
    assert not (cache / "pixels" / "train").exists()
    assert len(GridDataset(cache / "level_2" / "train")) == 100
    script.main([*flags, "--phase", "prior"])


def test_training_on_a_stream_resumes_from_a_checkpoint(script, tmp_path, monkeypatch):
    save = Checkpoints.save

    def save_and_stop(self, identity, progress, *arguments):
        save(self, identity, progress, *arguments)
        raise SystemExit(0)

    flags = [*STREAM, "--output_dir", str(tmp_path), "--phase", "level_2"]
    monkeypatch.setattr(Checkpoints, "save", save_and_stop)
    with pytest.raises(SystemExit):
        script.main([*flags, "--checkpointing_steps", "3"])
    monkeypatch.undo()
    (checkpoint,) = tmp_path.glob("checkpoint-level_2-*")
    assert json.loads((checkpoint / "identity.json").read_text())["data"]["num_examples"] is None
    script.main([*flags, "--resume_from_checkpoint", "latest"])
    assert (tmp_path / "level_2" / "model.safetensors").is_file()
