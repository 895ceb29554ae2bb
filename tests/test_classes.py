"""Labels of every kind become classes, or it is said why not."""

import datasets
import PIL.Image
import pytest
from datasets import ClassLabel, Value

from progressive_vae.data.args import DataSettings
from progressive_vae.data.classes import Classes, find_classes
from progressive_vae.data.dataset import read_images
from progressive_vae.data.source import open_dataset

CLASSES = ClassLabel(names=["cat", "dog"])


def table(labels, kind):
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    images = [PIL.Image.new("L", (4, 4), i) for i in range(len(labels))]
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features)


def ids_of(train, test=None):
    """The class ids that are read of a table."""
    splits = {"train": train, "test": train if test is None else test}
    classes = find_classes(splits)
    return {
        split: [label for _, label in read_images(images, "image", classes.column, (1, 4, 4),
                                                  class_ids=classes.ids[split])]
        for split, images in splits.items()
    }  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "kind", "names", "ids"),
    [
        ([1, 0, 1, 0], CLASSES, ["cat", "dog"], [1, 0, 1, 0]),
        ([1, 0, 3, 1], Value("int64"), ["0", "1", "2", "3"], [1, 0, 3, 1]),
        ([1, 0, 3, 1], Value("uint8"), ["0", "1", "2", "3"], [1, 0, 3, 1]),
        (["dog", "cat", "dog", "cat"], Value("string"), ["cat", "dog"], [1, 0, 1, 0]),
        ([True, False, True, True], Value("bool"), ["False", "True"], [1, 0, 1, 1]),
    ],
)
@pytest.mark.filterwarnings("ignore:no example")
def test_labels_of_every_kind(labels, kind, names, ids):
    images = table(labels, kind)
    assert find_classes({"train": images, "test": images}).names == names
    assert ids_of(images)["train"] == ids


@pytest.mark.parametrize(
    ("labels", "kind", "ids"),
    [
        ([0, -1, 1, None], CLASSES, [0, -1, 1, -1]),
        ([0, -1, 1, None], Value("int64"), [0, -1, 1, -1]),
        (["cat", None, "dog", "", "cat", "dog"], Value("string"), [0, -1, 1, -1, 0, 1]),
        ([True, None, False, True], Value("bool"), [1, -1, 0, 1]),
    ],
)
def test_images_without_a_label(labels, kind, ids):
    with pytest.warns(UserWarning, match=f"of {len(labels)} images.*'train' have no label"):
        assert ids_of(table(labels, kind))["train"] == ids


@pytest.mark.parametrize("test", [[-1] * 4, None])
def test_a_held_out_split_without_labels(test):
    train = table([0, 1] * 6, CLASSES)
    held_out = table(test or [0] * 4, CLASSES)
    held_out = held_out.remove_columns("label") if test is None else held_out
    with pytest.warns(UserWarning, match="'test'.*label"):
        ids = ids_of(train, held_out)
    assert ids == {"train": [0, 1] * 6, "test": [-1] * 4}


def test_classes_in_another_order_are_mapped_by_name():
    train = table([0, 1, 0, 1], CLASSES)
    test = table([0, 1, 2], ClassLabel(names=["dog", "cat", "owl"]))
    with pytest.warns(UserWarning, match="1 of 3 images of the split 'test'"):
        assert ids_of(train, test)["test"] == [1, 0, -1]


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        ([0.5, 1.5, 0.5, 1.5], Value("float32")),
        ([[1], [2], [3], [4]], datasets.List(Value("int64"))),
        (["a dog", "a cat", "two dogs", "an owl"], Value("string")),
        ([-7, 3, 4, 5], Value("int64")),
        ([-1, -1, -1, -1], CLASSES),
        ([0, 1, 0, 1], ClassLabel(names=["train", "test"])),
    ],
)
def test_a_label_column_without_classes_warns(labels, kind):
    images = table(labels, kind)
    with pytest.warns(UserWarning, match="'label' looks like class labels and is not used"):
        assert find_classes({"train": images, "test": images}) == Classes()
    if kind != Value("string"):  # which are classes where that is asked for
        with pytest.raises(ValueError, match="expected label_column of classes"):
            find_classes({"train": images, "test": images}, "label")


def test_numbers_of_examples_are_not_classes():
    images = table([5_000_000, 3], Value("int64"))
    with pytest.raises(ValueError, match="at most 100000 classes, got numbers up to 5000000"):
        find_classes({"train": images, "test": images})


def test_a_class_without_an_example():
    images = table([0, 2], ClassLabel(names=["cat", "dog", "owl"]))
    with pytest.warns(UserWarning, match=r"no example of \['dog'\] in the training split"):
        classes = find_classes({"train": images, "test": images})
    assert classes.names == ["cat", "dog", "owl"]


def test_the_labels_of_a_stream():
    stream = table([1, -1, 0], CLASSES).to_iterable_dataset()
    assert ids_of(stream)["train"] == [1, -1, 0]
    numbers = table([1, 0], Value("int64")).to_iterable_dataset()
    with pytest.warns(UserWarning, match="'label' looks like class labels and is not used"):
        assert find_classes({"train": numbers, "test": numbers}) == Classes()


@pytest.mark.parametrize("kind", ["custom", "pandas", "arrow", "torch", "numpy"])
def test_the_format_of_a_dataset_is_ignored(kind):
    images = table([0, 1] * 6, CLASSES)
    if kind == "custom":
        formatted = images.with_transform(lambda rows: {"x": [i.rotate(90) for i in rows["image"]]})
        with pytest.warns(UserWarning, match="transform of the dataset"):
            source = open_dataset(DataSettings(), formatted)
    else:
        source = open_dataset(DataSettings(), images.with_format(kind, columns=["label"]))
    assert source.class_names == ["cat", "dog"]


@pytest.mark.parametrize(
    "make", [list, tuple, lambda images: table(images_of(images), CLASSES)["image"]]
)
def test_lists_of_images(make):
    images = [PIL.Image.new("L", (4, 4), i) for i in range(4)]
    source = open_dataset(DataSettings(), make(images))
    assert sum(map(len, source.splits.values())) == 4


def images_of(images):
    return [i % 2 for i, _ in enumerate(images)]


@pytest.mark.parametrize("wrong", [b"abc", 7, [1, 2], ["a.png"], [], {"train": 1}])
def test_values_that_are_not_datasets_raise(wrong):
    with pytest.raises(ValueError, match=f"expected a dataset.*{type(wrong).__name__}"):
        open_dataset(DataSettings(), wrong)
