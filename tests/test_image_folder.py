"""Splits and classes of a folder: by its own subfolders, and by nothing else."""

import json

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest

from progressive_vae.data.args import DataSettings
from progressive_vae.data.dataset import load_images
from progressive_vae.data.source import open_dataset


def write_images(folder, *names, count=6):
    for i in range(count):
        for name in names:
            path = folder / name.replace("{}", str(i))
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(path)


def opened(folder, **settings):
    """The number of images in both splits, and the classes."""
    source = open_dataset(DataSettings(train_data_dir=str(folder), **settings))
    return sum(map(len, source.splits.values())), source.class_names


@pytest.mark.parametrize(
    "folders",
    [["bus", "car", "train"], ["circle", "square", "test"], ["dev", "prod"], ["bus", "steam-train"],
     ["flasks", "test tubes"], ["Train", "bus"], ["a", "validation"], ["eval", "x", "train"]],
)  # fmt: skip
def test_class_folders_may_have_any_name(tmp_path, folders):
    write_images(tmp_path, *(f"{name}/{{}}.png" for name in folders))
    assert opened(tmp_path) == (6 * len(folders), sorted(folders))


def test_names_of_files_are_not_splits(tmp_path):
    write_images(tmp_path, "train {}.png", "high_speed_train_{}.png", "test_tube{}.png", "{}.png")
    assert opened(tmp_path) == (24, [])


@pytest.mark.parametrize(
    "names", [("train", "test"), ("Train", "Test"), ("TRAINING", "testing"), ("x/train", "x/test")]
)
@pytest.mark.parametrize("has_classes", [True, False])
def test_folders_that_are_all_splits_are_splits(tmp_path, names, has_classes):
    inner = ("/cat/{}.png", "/dog/{}.png") if has_classes else ("/{}.png",)
    for name, count in zip(names, (6, 2), strict=True):
        write_images(tmp_path, *(name + each for each in inner), count=count)
    source = open_dataset(DataSettings(train_data_dir=str(tmp_path)))
    sizes = {split: len(table) for split, table in source.splits.items()}
    assert sizes == {"train": 6 * len(inner), "test": 2 * len(inner)}
    assert source.class_names == (["cat", "dog"] if has_classes else [])


def test_a_note_names_unused_splits(tmp_path):
    write_images(tmp_path, "train/{}.png", "val/{}.png")
    source = open_dataset(DataSettings(train_data_dir=str(tmp_path)))
    assert sum(map(len, source.splits.values())) == 6
    assert any("validation" in note for note in source.notes)
    used = open_dataset(DataSettings(train_data_dir=str(tmp_path), eval_split="validation"))
    assert [len(table) for table in used.splits.values()] == [6, 6]


@pytest.mark.parametrize(
    ("folders", "train_split"),
    [(("val", "test"), "train"), (("train", "val"), "nonsense"), (("test",), "train")],
)
def test_images_of_other_splits_are_not_trained_on(tmp_path, folders, train_split):
    write_images(tmp_path, *(f"{name}/{{}}.png" for name in folders))
    with pytest.raises(ValueError, match=f"expected train_split among .*got '{train_split}'"):
        opened(tmp_path, train_split=train_split)


def test_two_folders_of_one_meaning_keep_their_names(tmp_path):
    write_images(tmp_path, "train/{}.png", "valid/{}.png", "validation/{}.png")
    source = open_dataset(DataSettings(train_data_dir=str(tmp_path), eval_split="valid"))
    assert [len(table) for table in source.splits.values()] == [6, 6]


def test_images_beside_splits_are_left_aside_aloud(tmp_path):
    write_images(tmp_path, "train/{}.png", "test/{}.png")
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "cover.png")
    with pytest.warns(UserWarning, match="left aside 1 images"):
        assert opened(tmp_path) == (12, [])


def test_an_image_beside_class_folders_has_no_class(tmp_path):
    write_images(tmp_path, "cat/{}.png", "dog/{}.png")
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "cover.png")
    with pytest.warns(UserWarning, match="1 of .* have no label"):
        assert opened(tmp_path) == (13, ["cat", "dog"])


def test_a_single_class_folder_is_not_a_class(tmp_path):
    write_images(tmp_path, "archive/cats/{}.png")
    assert opened(tmp_path) == (6, [])


@pytest.mark.parametrize("name", ["[2024] trip", "set*", "what?", "a{b,c}", "ünï", " a b "])
def test_paths_are_not_patterns(tmp_path, name):
    write_images(tmp_path, name + "/{}.png", "set_of_somebody_else/{}.png", "whatX/{}.png")
    assert opened(tmp_path / name) == (6, [])
    table = pyarrow.table(
        {"image": [(tmp_path / name / f"{i}.png").read_bytes() for i in range(6)]}
    )
    tables = tmp_path / "tables" / name
    tables.mkdir(parents=True)
    pyarrow.parquet.write_table(table, tables / "train.parquet")
    assert opened(tables) == (6, [])


def test_links_to_folders_are_followed(tmp_path):
    write_images(tmp_path / "real", "a/{}.png", "b/{}.png")
    (tmp_path / "chosen").mkdir()
    for name in "ab":
        (tmp_path / "chosen" / name).symlink_to(tmp_path / "real" / name)
    assert opened(tmp_path / "chosen") == (12, ["a", "b"])


@pytest.mark.parametrize("name", ["notes.parquet", ".cache/index.parquet", "notes.txt", "a.csv"])
def test_other_files_are_left_out(tmp_path, name):
    write_images(tmp_path, "{}.png")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"x": [1]}), tmp_path / name)
    assert opened(tmp_path) == (6, [])
    notes = open_dataset(DataSettings(train_data_dir=str(tmp_path))).notes
    assert any(name in note for note in notes) == (not name.startswith("."))


def test_labels_of_a_metadata_file(tmp_path):
    write_images(tmp_path, "{}.png")
    rows = [{"file_name": f"{i}.png", "text": "x", "label": ["cat", "dog"][i % 2]}
            for i in range(5)]  # fmt: skip
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.warns(UserWarning, match="have no label"):
        assert opened(tmp_path) == (6, ["cat", "dog"])


def test_metadata_without_labels_keeps_class_folders(tmp_path):
    write_images(tmp_path, "cat/{}.png", "dog/{}.png")
    rows = [{"file_name": f"cat/{i}.png", "text": "x"} for i in range(6)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert opened(tmp_path) == (12, ["cat", "dog"])


def test_a_changed_file_changes_the_fingerprint(tmp_path):
    write_images(tmp_path, "{}.png")
    names = []
    for value in (1, 1, 2):
        if value == 2:
            PIL.Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "0.png")
        source = open_dataset(DataSettings(train_data_dir=str(tmp_path)))
        names.append([manifest.dataset for manifest in source.manifests.values()])
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize("name", ["empty", "one.png", "nowhere"])
@pytest.mark.parametrize("argument", ["train_data_dir", "dataset_name"])
def test_folders_without_images_raise(tmp_path, name, argument):
    (tmp_path / "empty").mkdir()
    PIL.Image.new("L", (4, 4)).save(tmp_path / "one.png")
    with pytest.raises(ValueError, match=name):
        load_images(DataSettings(**{argument: str(tmp_path / name)}))


def test_a_dataset_of_save_to_disk(tmp_path):
    write_images(tmp_path / "images", "a/{}.png", "b/{}.png")
    splits = load_images(DataSettings(train_data_dir=str(tmp_path / "images"))).splits
    splits["train"].save_to_disk(str(tmp_path / "saved"))
    assert opened(tmp_path / "saved") == (len(splits["train"]), ["a", "b"])


def test_notes_summarize_the_images(tmp_path):
    write_images(tmp_path, "cat/{}.png", "dog/{}.png", count=10)
    source = open_dataset(DataSettings(train_data_dir=str(tmp_path)))
    said = " ".join(source.notes)
    assert "20 images" in said and "18 to train, 2 to evaluate" in said and "cat, dog" in said


def test_a_long_image_is_cropped_before_it_is_resized_in_little_memory(tmp_path):
    write_images(tmp_path, "{}.png")
    PIL.Image.new("RGB", (1, 60_000)).save(tmp_path / "a spacer.png")
    source = open_dataset(
        DataSettings(train_data_dir=str(tmp_path), resolution=64, center_crop=True)
    )
    assert source.manifests["train"].shape == (3, 64, 64)


def test_the_image_mode_does_not_depend_on_the_order(tmp_path):
    PIL.Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "0.png")
    for i in range(1, 8):
        PIL.Image.new("RGB", (8, 8), (i, 99, 0)).save(tmp_path / f"{i}.png")
    for mode, channels in ((None, 3), ("L", 1), ("RGB", 3)):
        source = open_dataset(DataSettings(train_data_dir=str(tmp_path), image_mode=mode))
        assert source.manifests["train"].shape == (channels, 8, 8)
    with pytest.raises(ValueError, match="image_mode.*'CMYK'"):
        DataSettings(image_mode="CMYK")
