"""The settings of a data set."""

import os
from dataclasses import dataclass
from typing import Any

from ..image_files import MAX_IMAGE_PIXELS, MODES
from ..paths import expand_home

# Of the data, what says nothing about held-out images.
OF_TRAINING_IMAGES = frozenset(
    "random_flip num_crops random_rotation random_colours max_train_samples streaming "
    "shuffle_buffer_size".split()
)


def check(settings: Any, name: str, is_right: bool, expected: str):
    """Raise a `ValueError` unless a setting is right, which NaN never is."""
    if not is_right:
        raise ValueError(f"expected {name} {expected}, got {getattr(settings, name)!r}")


def expand_paths(settings: Any, *names: str):
    """Replace a leading `~` of the paths among a frozen dataclass's fields by the home folder."""
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, (str, os.PathLike)):
            object.__setattr__(settings, name, expand_home(value, name))


@dataclass(frozen=True)
class DataSettings:
    """What images to train on, and how they come in.

    Args:
        dataset_name: id on the Hub or a local path; "digits" is embedded.
        dataset_config_name: of a data set on the Hub that has several.
        train_data_dir: a folder of images (with a folder for each class, or none) or of parquet
            files, in place of dataset_name.
        image_column: of the images; one of the usual names where not given.
        label_column: of the labels; one of the usual names where not given.
        train_split: to train on.
        eval_split: held out, for measuring.
        eval_fraction: held out of train_split where there is no eval_split.
        resolution: resize the shorter side; images keep their size without it.
        center_crop: to a square of the resolution.
        random_flip: train on mirror images too.
        num_crops: squares cut out of each training image, the first from the middle and the others
            from anywhere; with center_crop.
        random_rotation: the finest level learns from images turned by quarters, too (by halves
            where they are no squares); what is coarser, and so what is drawn, from them as they
            are.
        random_colours: likewise, with colors exchanged for each other.
        max_train_samples: so many images at most, drawn at random.
        max_eval_samples: likewise, of the held-out images.
        image_mode: "L" for gray images or "RGB" for color; where not given, "RGB" if any of the
            images that are looked at has color.
        max_image_pixels: images of more are left out, and named.
        streaming: read the training images as they come, never all of them to a disk.
        shuffle_buffer_size: images among which a stream is shuffled.
    """

    dataset_name: str | None = None
    dataset_config_name: str | None = None
    train_data_dir: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    train_split: str = "train"
    eval_split: str = "test"
    eval_fraction: float = 0.1
    resolution: int | None = None
    center_crop: bool = False
    random_flip: bool = False
    num_crops: int = 1
    random_rotation: bool = False
    random_colours: bool = False
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    image_mode: str | None = None
    max_image_pixels: int = MAX_IMAGE_PIXELS
    streaming: bool = False
    shuffle_buffer_size: int = 1000

    def __post_init__(self):
        expand_paths(self, "dataset_name", "train_data_dir")
        for name in ("resolution", "max_train_samples", "max_eval_samples", "max_image_pixels",
                     "shuffle_buffer_size", "num_crops"):  # fmt: skip
            value = getattr(self, name)
            check(self, name, value is None or value >= 1, ">= 1")
        modes = tuple(MODES.values())
        check(self, "image_mode", self.image_mode in (None, *modes), f"among {modes}, or null")
        can_crop = self.center_crop and not self.streaming
        check(
            self,
            "num_crops",
            can_crop or self.num_crops == 1,
            "1 without center_crop or of a stream",
        )
