"""The classes of a labeled data set: their names, and the class id of each label."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import datasets
import pyarrow.compute

from ..configuration.base import MAX_CLASSES

LABEL_COLUMNS = ("label", "labels", "fine_label", "class")
NO_LABEL = -1  # in data sets, as in ImageNet's test split, and in caches
SPLIT_NAMES = frozenset(
    "train training test testing val valid validation dev eval evaluation".split()
)

Table: TypeAlias = datasets.Dataset | datasets.IterableDataset


@dataclass(frozen=True)
class Classes:
    """
    Args:
        column: of the labels; `None` where there are no classes.
        names: of the classes 0 … n − 1.
        ids: for each split the class id of each label in the column. Labels that are not in it,
            null and −1 among them, stand for images without a label.
    """

    column: str | None = None
    names: list[str] = field(default_factory=list)
    ids: dict[str, dict[Any, int]] = field(default_factory=dict)


def find_column(
    table: Table, name: str | None, usual_names: tuple[str, ...], argument: str
) -> str | None:
    """Return the column `name`, or without a name the first usual one that the table has."""
    names = table.column_names or list(next(iter(table), {}))  # a stream may not know them yet
    if name is None:
        return next((c for c in usual_names if c in names), None)
    if name not in names:
        raise ValueError(f"expected {argument} among {names}, got {name!r}")
    return name


def find_classes(splits: Mapping[str, Table], label_column: str | None = None) -> Classes:
    """The classes of the training split, by which those of other splits are known, too.

    Class labels, integers from 0 on, strings and bools are classes; null and −1 are no label. A
    column that is not named in `label_column` and holds something else is not used, with a warning.
    Of a stream the classes are known if the data set names them.

    Raises:
        ValueError: the column named in `label_column` holds no classes, or more than `MAX_CLASSES`.
    """
    train = splits["train"]
    column = find_column(train, label_column, LABEL_COLUMNS, "label_column")
    if column is None:
        return Classes()
    feature = (train.features or {}).get(column)
    try:
        names, counts = _class_names(splits, column, feature, label_column is not None)
    except _NotClasses as error:
        if label_column is not None:
            raise ValueError(f"expected label_column of classes, got {error}") from error
        warnings.warn(
            f"the column {column!r} looks like class labels and is not used: got {error}",
            stacklevel=2,
        )
        return Classes()
    ids = {name: i for i, name in enumerate(names)}
    labels_of = {split: counts.get(split, dict.fromkeys(range(len(names)), 0)) for split in splits}
    ids_of = {}
    for split, table in splits.items():
        own_feature = (table.features or {}).get(column, feature)
        name_of = {label: _class_name(own_feature, label) for label in labels_of[split]}
        ids_of[split] = {label: ids[name] for label, name in name_of.items() if name in ids}
    _warn_of_gaps(splits, column, names, counts, ids_of)
    return Classes(column, names, ids_of)


class _NotClasses(ValueError):
    """Why a column holds no classes."""


def _class_names(
    splits: Mapping[str, Table], column: str, feature: Any, is_named: bool
) -> tuple[list[str], dict[str, dict[Any, int]]]:
    """The names of the classes, and for each split that is no stream how often each label occurs.

    Raises:
        _NotClasses: the column holds something else.
    """
    is_value = isinstance(feature, datasets.Value)
    is_class_label = isinstance(feature, datasets.ClassLabel)
    dtype = feature.dtype if is_value else ""
    kinds = [kind for kind in ("int", "string", "bool") if kind in dtype]
    if not (is_class_label or kinds):
        raise _NotClasses(f"{feature} in {column!r}")
    if is_class_label and set(feature.names) <= SPLIT_NAMES:
        raise _NotClasses(f"the names of splits, {feature.names}, in {column!r}")
    tables = {
        split: table
        for split, table in splits.items()
        if isinstance(table, datasets.Dataset) and column in table.column_names
    }
    if "train" not in tables:
        if is_class_label:
            return list(feature.names), {}
        raise _NotClasses(
            f"{feature} in {column!r} of a stream, whose classes are known where it has a "
            "ClassLabel"
        )
    counts = {split: label_counts(table, column) for split, table in tables.items()}
    train = [name for label in counts["train"] if (name := _class_name(feature, label)) is not None]
    if not train:
        raise _NotClasses(f"no label in {column!r} of the training split")
    if is_class_label:
        return list(feature.names), counts
    if kinds == ["int"]:
        numbers = [label for labels in counts.values() for label in labels if label is not None]
        lowest, highest = min(numbers), max(numbers)
        if lowest < NO_LABEL:
            raise _NotClasses(f"numbers from {lowest} on in {column!r}")
        if highest >= MAX_CLASSES:
            raise ValueError(
                f"expected labels of at most {MAX_CLASSES} classes, got numbers up to {highest} in "
                f"{column!r}: name another label_column, or give that one class labels"
            )
        return [str(i) for i in range(highest + 1)], counts
    if not is_named and len(train) > sum(counts["train"].values()) / 2:
        raise _NotClasses(f"{len(train)} different texts in {column!r}, most of them once")
    if len(train) > MAX_CLASSES:
        raise _NotClasses(f"{len(train)} different texts in {column!r}")
    return sorted(train), counts


def label_counts(table: datasets.Dataset, column: str) -> dict[Any, int]:
    """How often each label occurs."""
    labels = table.select_columns([column]).with_format("arrow")[:][column]
    rows = pyarrow.compute.value_counts(labels).to_pylist()
    return {row["values"]: row["counts"] for row in rows}


def _class_name(feature: Any, label: Any) -> str | None:
    """The name of the class that a label stands for, if it stands for one."""
    if label is None or label == "" or (label == NO_LABEL and label is not True):
        return None
    if isinstance(feature, datasets.ClassLabel) and isinstance(label, int):
        return feature.names[label] if 0 <= label < len(feature.names) else None
    return str(label)


def _warn_of_gaps(
    splits: Mapping[str, Table],
    column: str,
    names: list[str],
    counts: dict[str, dict[Any, int]],
    ids: dict[str, dict[Any, int]],
):
    """Warn of classes without an image, and of images without a class."""
    if "train" in counts:
        learned = set(ids["train"].values())
        missing = [name for i, name in enumerate(names) if i not in learned]
        if missing:
            warnings.warn(
                f"no example of {missing} in the training split: samples of it are not learned",
                stacklevel=3,
            )
    for split, labels in counts.items():
        total = sum(labels.values())
        unlabeled = total - sum(labels[label] for label in ids[split])
        if unlabeled:
            warnings.warn(
                f"{unlabeled} of {total} images of the split {split!r} have no label in "
                f"{column!r}: they count as images without a class",
                stacklevel=3,
            )
    for split, table in splits.items():
        columns = table.column_names
        if columns is not None and column not in columns:
            warnings.warn(
                f"the split {split!r} has no column {column!r}: its images have no label",
                stacklevel=3,
            )
