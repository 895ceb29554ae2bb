"""From codes of one level to an image, through the auxiliary decoders of the finer levels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PreviewDecoder:
    """From code vectors of z_i, (B, D, H_i, W_i), to the image that the auxiliary decoders expect,
    float (B, C, H, W) in [−1, 1], with a gradient.

    Each level passes on the mean code vector at each position: the probabilities of all codes of a
    large codebook do not fit into memory.

    Args:
        levels: `ProgressiveVAELevel`s, [level_i … level_N].
        sizes: (H, W) of their finer grids, the image last.
    """

    levels: Sequence[Any]
    sizes: Sequence[tuple[int, int]]

    @property
    def codebook(self) -> Tensor:
        """The codebook of z_i, (K, D)."""
        return self.levels[0].quantizer.codebook

    def __call__(self, vectors: Tensor) -> Tensor:
        codebooks = [level.quantizer.codebook for level in self.levels[1:]]
        for level, size, finer in zip(self.levels, self.sizes, [*codebooks, None], strict=True):
            vectors = level.expectation(vectors, size, finer)
        return vectors

    @torch.no_grad()
    def decode_codes(self, codes: Tensor) -> Tensor:
        """The image of codes z_i, int64 (B, H_i, W_i)."""
        codebook = self.codebook  # the level may be offloaded to another device
        vectors = F.embedding(codes.to(codebook.device), codebook).movedim(-1, 1)
        return self(vectors.to(codes.device))

    def error(self, vectors: Tensor, codes: Tensor) -> Tensor:
        """The mean squared error between the images of vectors and of codes, a scalar."""
        return F.mse_loss(self(vectors), self.decode_codes(codes))
