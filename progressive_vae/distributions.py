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
        edges = torch.stack([lower, upper])[:, None]
        masses = _between((edges - self.means) * self.precisions)[0]
        return ((self.weights[:-1] * masses).sum(0) + self.weights[-1] / 256).log()

    @property
    def logits(self) -> Tensor:
        edges = torch.arange(257, device=self.means.device)[:, None, None] - 0.5
        edges[0], edges[-1] = -1e6, 1e6
        probs = (self.weights[-1] / 256).repeat(256, 1, 1)
        for weight, mean, precision in zip(self.weights, self.means, self.precisions, strict=False):
            probs = probs + weight * _between((edges - mean) * precision)
        return probs.log().movedim(0, -1)

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


def _between(edges: Tensor) -> Tensor:
    """The mass of the standard logistic between edges that grow, (E, ...) -> (E − 1, ...).

    What lies above its middle is measured from above: differences of numbers near 1 would be lost.
    """
    tails = (-edges.abs()).sigmoid()
    lower, upper = tails[:-1], tails[1:]
    holds_middle = (edges[:-1] < 0) & (edges[1:] > 0)
    return torch.where(holds_middle, 1 - lower - upper, (lower - upper).abs())


Distribution = Categorical | PixelMixture
