"""What the auxiliary decoders of finer levels make of code vectors: pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PreviewDecoder:
    """From vectors of z_i, (B, D, H_i, W_i), to the picture, float (B, C, H, W) in [−1, 1], that
    auxiliary decoders make of them, with a gradient.

    From level to level goes the vector that is expected at each position: probabilities of all
    symbols would not fit into memory where these are many.

    Args:
        levels: `ProgressiveVAELevel`s, [level_i … level_N].
        sizes: (H, W) of the grids that they expect, the image's last.
    """

    levels: Sequence[Any]
    sizes: Sequence[tuple[int, int]]

    @property
    def codebook(self) -> Tensor:
        """Of z_i, (K, D)."""
        return self.levels[0].quantizer.codebook

    def __call__(self, vectors: Tensor) -> Tensor:
        codebooks = [level.quantizer.codebook for level in self.levels[1:]]
        for level, size, finer in zip(self.levels, self.sizes, [*codebooks, None], strict=True):
            vectors = level.expectation(vectors, size, finer)
        return vectors

    @torch.no_grad()
    def decode_codes(self, codes: Tensor) -> Tensor:
        """The same of z_i, int64 (B, H_i, W_i)."""
        codebook = self.codebook  # of a level that may wait on another device
        vectors = F.embedding(codes.to(codebook.device), codebook).movedim(-1, 1)
        return self(vectors.to(codes.device))

    def error(self, vectors: Tensor, codes: Tensor) -> Tensor:
        """The mean squared one of the picture of vectors that are expected of codes, a scalar."""
        return F.mse_loss(self(vectors), self.decode_codes(codes))
