"""Settings of a dataset."""

import os
from dataclasses import dataclass
from typing import Any

from ..image_files import MAX_IMAGE_PIXELS, MODES
from ..paths import expand_home

# Settings that do not concern held-out images.
TRAIN_ONLY_SETTINGS = frozenset(
    "validation_fraction random_flip num_crops random_rotation random_channel_permutation "
    "max_train_samples streaming shuffle_buffer_size".split()
)


def check(settings: Any, name: str, is_right: bool, expected: str):
    """Raise a `ValueError` unless a setting is right."""
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
    """The dataset, and how its images are preprocessed and augmented.

    Args:
        dataset_name: id on the Hub or a local path; "digits" is scikit-learn's.
        dataset_config_name: configuration of a dataset on the Hub that has several.
        train_data_dir: a folder of images (with a folder for each class, or none) or of parquet
            files, in place of dataset_name.
        image_column: column of the images; by default the first of the usual names.
        label_column: column of the labels; by default the first of the usual names.
        caption_column: column of texts, by which factors with `text_conditional` are conditioned.
        text_encoder: of the captions: a repository or folder of a model of transformers and its
            tokenizer, such as CLIP or T5, which stays as it is; by default a fixed random vector
            for each word.
        train_split: split to train on.
        eval_split: held-out split, for evaluation.
        eval_fraction: share of train_split to hold out if there is no eval_split.
        validation_fraction: share of the images of train_split to hold out for validation and
            early stopping, beside eval_split; 0: validation is on images of eval_split.
        resolution: length to which the shorter side is resized; by default images keep their size.
        center_crop: crop to a square of the resolution.
        random_flip: train on horizontally flipped images too.
        num_crops: crops of each training image, the first from the center and the others at
            random; needs center_crop.
        random_rotation: augment the training images of the finest level with rotations by
            multiples of 90° (180° if they are not square). Coarser levels and the prior, and so
            samples, follow the original images.
        random_channel_permutation: augment the training images of the finest level with
            permutations of the color channels.
        max_train_samples: train on a random subset of at most this many images.
        max_eval_samples: evaluate on a random subset of at most this many images.
        image_mode: "L" for gray images or "RGB" for color; by default "RGB" if any of the
            inspected images has color.
        max_image_pixels: larger images are left out, and a warning names them.
        streaming: read the training images on the fly, without storing all of them on a disk.
        shuffle_buffer_size: number of images in the buffer that shuffles a stream.
    """

    dataset_name: str | None = None
    dataset_config_name: str | None = None
    train_data_dir: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    caption_column: str | None = None
    text_encoder: str | None = None
    train_split: str = "train"
    eval_split: str = "test"
    eval_fraction: float = 0.1
    validation_fraction: float = 0.0
    resolution: int | None = None
    center_crop: bool = False
    random_flip: bool = False
    num_crops: int = 1
    random_rotation: bool = False
    random_channel_permutation: bool = False
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    image_mode: str | None = None
    max_image_pixels: int = MAX_IMAGE_PIXELS
    streaming: bool = False
    shuffle_buffer_size: int = 1000

    def __post_init__(self):
        expand_paths(self, "dataset_name", "train_data_dir", "text_encoder")
        for name in (
            "resolution",
            "max_train_samples",
            "max_eval_samples",
            "max_image_pixels",
            "shuffle_buffer_size",
            "num_crops",
        ):
            value = getattr(self, name)
            check(self, name, value is None or value >= 1, ">= 1")
        share = self.validation_fraction
        check(self, "validation_fraction", 0 <= share < 1, "in [0, 1)")
        check(self, "validation_fraction", not (share and self.streaming), "0 of a stream")
        has_captions = self.caption_column is not None
        check(self, "caption_column", not (has_captions and self.streaming), "null of a stream")
        is_used = has_captions or self.text_encoder is None
        check(self, "text_encoder", is_used, "null without caption_column")
        modes = tuple(MODES.values())
        check(self, "image_mode", self.image_mode in (None, *modes), f"among {modes}, or null")
        can_crop = self.center_crop and not self.streaming
        check(
            self,
            "num_crops",
            can_crop or self.num_crops == 1,
            "1 without center_crop or of a stream",
        )
