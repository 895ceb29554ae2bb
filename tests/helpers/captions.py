"""A small dataset with captions."""

import datasets
import numpy as np
import PIL.Image

COLORS = ["red", "green", "blue", None, "green", ""]


def images_with_captions(count=30) -> datasets.Dataset:
    """Gray images of 8×8; the one of the caption at place i of `COLORS` has the value i."""
    numbers = [i % len(COLORS) for i in range(count)]
    images = [PIL.Image.fromarray(np.full((8, 8), i, np.uint8)) for i in numbers]
    features = {"image": datasets.Image(), "text": datasets.Value("string")}
    columns = {"image": images, "text": [COLORS[i] for i in numbers]}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))
