"""Random weights of tokenizers, from their names and shapes alone.

`golden/make_tokenizers.py` loads them into the networks of other projects and saves the codes and
images that their code returns. The tests load the same weights into converted levels.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizers"


class Golden(NamedTuple):
    """What another project's code returned for random weights."""

    weights: dict[str, Tensor]
    pixels: Tensor  # float (B, 3, H, W) in [−1, 1]
    codes: Tensor  # int64 (B, H_N, W_N)
    image: Tensor  # float (B, 3, H, W) in [−1, 1]


def random_weights(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Return weights under which codes differ from place to place and images are in their range.

    NumPy guarantees that the numbers of a `RandomState` never change.
    """
    random = np.random.RandomState(0)
    weights = {}
    for name, shape in sorted(shapes.items()):
        noise = torch.tensor(random.standard_normal(shape), dtype=torch.float32)
        is_norm = ("norm" in name or "ln_" in name) and name.endswith("weight")
        if name.endswith("embedding.weight"):
            weights[name] = noise
        elif name.endswith("decoder.conv_out.bias"):  # images are in [−1, 1] or in [0, 1]
            weights[name] = 0.3 + 0.1 * noise
        elif noise.ndim == 1:
            weights[name] = is_norm + 0.2 * noise
        else:
            gain = 0.3 if name.endswith("decoder.conv_out.weight") else 1.0
            weights[name] = noise * gain / noise[0].numel() ** 0.5
    return weights


def load_golden(name: str) -> Golden:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        shapes = json.loads(file.metadata()["shapes"])
        tensors = {key: file.get_tensor(key) for key in ("pixels", "codes", "image")}
    pixels = tensors["pixels"] / 127.5 - 1
    return Golden(random_weights(shapes), pixels, tensors["codes"].long(), tensors["image"])
