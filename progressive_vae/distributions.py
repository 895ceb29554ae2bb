"""What a decoder says of the entries of one group: distributions over values 0 … V − 1.

Each has `log_prob(values)`, in nats and fp32, (B, n), and `logits`, (B, n, V), for those who need
all values: samplers and coders.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Categorical:
    """A free probability for each value; logits (B, n, V)."""

    logits: Tensor

    def log_prob(self, values: Tensor) -> Tensor:
        logits = self.logits.flatten(0, 1).float()
        return -F.cross_entropy(logits, values.flatten(), reduction="none").view(values.shape)


@dataclass(frozen=True)
class PixelMixture:
    """K logistic distributions, rounded to the 256 pixel values, and the uniform one: a discretised
    mixture of logistics (Salimans et al. 2017, PixelCNN++). 0 and 255 take what lies beyond them.

    The components come first, so that all operations run over long rows.

    Args:
        weights: of the K components and the uniform one, summing to 1: (K + 1, B, n).
        means: in pixel values, (K, B, n).
        precisions: the inverse of the scales, (K, B, n).
    """

    weights: Tensor
    means: Tensor
    precisions: Tensor

    def log_prob(self, values: Tensor) -> Tensor:
        lower = (values - 0.5).masked_fill(values == 0, -1e6)
        upper = (values + 0.5).masked_fill(values == 255, 1e6)
        masses = self._cumulative(upper) - self._cumulative(lower)
        return ((self.weights[:-1] * masses).sum(0) + self.weights[-1] / 256).log()

    @property
    def logits(self) -> Tensor:
        edges = torch.arange(255, device=self.means.device) + 0.5
        below = torch.zeros_like(self.means[0])[..., None].expand(-1, -1, 255)
        for weight, mean, precision in zip(self.weights, self.means, self.precisions, strict=False):
            mean, precision, weight = (x[..., None] for x in (mean, precision, weight))
            below = below + weight * ((edges - mean) * precision).sigmoid()
        total = 1 - self.weights[-1][..., None]
        probs = torch.cat([below, total], -1).diff(dim=-1, prepend=torch.zeros_like(total))
        # Rounding may leave a difference of large numbers below zero.
        return (probs.clamp(min=0) + self.weights[-1][..., None] / 256).log()

    def quantiles(self, shares: Tensor) -> Tensor:
        """The smallest values up to which the mass exceeds shares in [0, 1): int64 (B, n).

        With uniform shares these are draws, found by halving in eight steps, not over 256 values.
        """
        weights, floor = self.weights[:-1], self.weights[-1] / 256
        values = torch.zeros(shares.shape, dtype=torch.long, device=shares.device)
        for step in (128, 64, 32, 16, 8, 4, 2, 1):
            below = values + step  # values less than this one
            mass = (weights * self._cumulative(below - 0.5)).sum(0) + floor * below
            values = torch.where(mass > shares, values, below)
        return values

    def _cumulative(self, edges: Tensor) -> Tensor:
        """Of each component at edges (B, n)."""
        return ((edges - self.means) * self.precisions).sigmoid()


Distribution = Categorical | PixelMixture
