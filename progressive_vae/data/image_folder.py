"""A folder of image files as a data set: its splits and its classes, by its own subfolders alone.

    FOLDER/1.png …                       one split, no classes
    FOLDER/cat/1.png …, FOLDER/dog/…     one split, a class for each subfolder
    FOLDER/train/…, FOLDER/test/…        splits, each with classes or without

Subfolders are splits only where all of them are called so. Names of files are never splits.
"""

import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pandas

from ..image_files import image_suffixes, is_utf8, list_files, printable
from .classes import LABEL_COLUMNS, SPLIT_NAMES

METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_STANDARD_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
}


@dataclass
class ImageFolder:
    """
    Args:
        splits: rows of "image", the file; "label", where there are classes; a column of captions,
            where a metadata file has it; and "modified", the time of the file's last change, so
            that caches of other pixels are not taken for its.
        notes: what was found, and what was left aside, for people.
    """

    splits: dict[str, datasets.Dataset]
    notes: list[str] = field(default_factory=list)


def has_images(folder: Path) -> bool:
    return any(path.suffix.lower() in image_suffixes() for path in list_files(folder))


def open_image_folder(
    folder: Path,
    train_split: str = "train",
    label_column: str | None = None,
    caption_column: str | None = None,
) -> ImageFolder:
    """
    Args:
        train_split: the split to train on; where subfolders are splits, it has to be among them.
        label_column: of a metadata file; one of the usual names where not given.
        caption_column: of a metadata file.

    Raises:
        ValueError: no image in the folder, or folders of splits without `train_split`.
    """
    folder = folder.resolve()
    files = list_files(folder)
    images = [path for path in files if path.suffix.lower() in image_suffixes()]
    notes = _notes_on_other_files(folder, files)
    unreadable = [path for path in images if not is_utf8(path)]
    if unreadable:
        images = [path for path in images if is_utf8(path)]
        warnings.warn(
            f"left out {len(unreadable)} images whose names are not UTF-8: "
            f"{', '.join(map(printable, unreadable[:20]))}",
            stacklevel=2,
        )
    if not images:
        raise ValueError(f"expected images in {folder}, got {len(files)} files, none of them one")
    root = _without_wrappers(folder, images, train_split)
    groups = _split_groups(root, images, train_split)
    num_used = sum(len(paths) for _, paths in groups.values())
    if num_used < len(images):
        warnings.warn(
            f"left aside {len(images) - num_used} images that lie beside the folders of splits "
            f"{sorted(base.name for base, _ in groups.values())} in {root}",
            stacklevel=2,
        )
    if train_split not in groups:
        raise ValueError(
            f"expected train_split among {sorted(groups)}, the folders of splits in {root}, got "
            f"{train_split!r}"
        )
    labels = {split: _folder_labels(base, paths) for split, (base, paths) in groups.items()}
    notes.insert(0, f"{len(images)} images in {folder}")
    if not any(labels[train_split]):
        columns = LABEL_COLUMNS if label_column is None else (label_column,)
        labels = {split: _metadata_column(base, paths, columns)
                  for split, (base, paths) in groups.items()}  # fmt: skip
    names = sorted({name for column in labels.values() for name in column if name is not None})
    feature = datasets.ClassLabel(names=names) if names else None
    splits = {split: _table(paths, labels[split], feature) for split, (_, paths) in groups.items()}
    for split, (base, paths) in groups.items():
        if caption_column is None:
            continue
        captions = _metadata_column(base, paths, (caption_column,))
        if any(captions):
            splits[split] = splits[split].add_column(caption_column, captions)
    return ImageFolder(splits, notes)


def _notes_on_other_files(folder: Path, files: list[Path]) -> list[str]:
    others = [path for path in files if path.suffix.lower() not in image_suffixes()]
    others = [path for path in others if path.name not in METADATA_FILES]
    if not others:
        return []
    kinds = Counter(path.suffix.lower() or "without a suffix" for path in others)
    suffixes = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
    names = ", ".join(printable(path.relative_to(folder)) for path in others[:5])
    more = ", …" if len(others) > 5 else ""
    return [f"left aside {len(others)} other files ({suffixes}): {names}{more}"]


def _without_wrappers(folder: Path, images: list[Path], train_split: str) -> Path:
    """The folder below those that hold nothing but one other folder, as archives often do."""
    children = _children(folder, images)
    (name,) = children if len(children) == 1 else (None,)
    if name is None or _is_split(name, train_split):
        return folder
    return _without_wrappers(folder / name, images, train_split)


def _children(folder: Path, images: list[Path]) -> set[str | None]:
    """The names of the subfolders that hold images; `None` stands for images beside them."""
    parts = [path.relative_to(folder).parts for path in images if path.is_relative_to(folder)]
    return {part[0] if len(part) > 1 else None for part in parts}


def _is_split(name: str | None, train_split: str) -> bool:
    return name is not None and (name.lower() in SPLIT_NAMES or name == train_split)


def _split_groups(
    root: Path, images: list[Path], train_split: str
) -> dict[str, tuple[Path, list[Path]]]:
    """For each split its folder and its images."""
    children = _children(root, images)
    folders = {child for child in children if child is not None}
    are_splits = folders and all(_is_split(child, train_split) for child in folders)
    # A single folder among loose images may as well be a class, as of images of trains.
    if not are_splits or (None in children and len(folders) == 1):
        return {train_split: (root, images)}
    names = {child: _standard_name(child, train_split) for child in folders}
    if len(set(names.values())) < len(names):  # both valid/ and validation/
        names = {child: child for child in folders}
    return {
        split: (root / child, [path for path in images if path.is_relative_to(root / child)])
        for child, split in sorted(names.items())
    }


def _standard_name(child: str, train_split: str) -> str:
    return child if child == train_split else _STANDARD_NAMES.get(child.lower(), child.lower())


def _folder_labels(base: Path, images: list[Path]) -> list[str | None]:
    """The name of each image's class: of the first subfolder on the way to it, if there are two."""
    base = _without_wrappers(base, images, train_split="")
    parts = [path.relative_to(base).parts for path in images]
    names = [part[0] if len(part) > 1 else None for part in parts]
    return names if len({*names} - {None}) > 1 else [None] * len(images)


def _metadata_column(base: Path, images: list[Path], names: tuple[str, ...]) -> list[str | None]:
    """The texts that a metadata file in the folder has for its images, in the first column of
    these names."""
    path = next((base / name for name in METADATA_FILES if (base / name).is_file()), None)
    if path is None:
        return [None] * len(images)
    rows = _read_metadata(path)
    column = next((name for name in names if name in rows), None)
    if column is None or "file_name" not in rows:
        return [None] * len(images)
    labeled = rows.dropna(subset=[column])
    labels = dict(zip(labeled["file_name"], labeled[column].map(str), strict=True))
    return [labels.get(image.relative_to(base).as_posix()) for image in images]


def _read_metadata(path: Path) -> pandas.DataFrame:
    readers = {
        ".csv": pandas.read_csv,
        ".jsonl": lambda file: pandas.read_json(file, lines=True),
        ".parquet": pandas.read_parquet,
    }
    try:
        return readers[path.suffix](path)
    except (ValueError, OSError) as error:
        raise ValueError(f"expected a table in {path}, got {error}") from error


def _table(
    images: list[Path], labels: list[str | None], feature: datasets.ClassLabel | None
) -> datasets.Dataset:
    columns: dict[str, list] = {
        "image": [{"bytes": None, "path": str(path)} for path in images],
        "modified": [path.stat().st_mtime_ns for path in images],
    }
    features = {"image": datasets.Image(), "modified": datasets.Value("int64")}
    if feature is not None:
        columns["label"] = labels
        features["label"] = feature
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))
