"""What a decoder says of the entries of one group: distributions over values 0 … V − 1.

Each has five verbs, and nobody asks which one it is:

- `log_prob(values)`: in nats and fp32, (B, n);
- `logits`: of all values, (B, n, V), for those who change them;
- `parts()`: of fewer positions each, in order, whose logits take little memory: as a rule one part,
  itself;
- `probs()`: of all values, in fp32, for coders: (B, n, V), none less than 0; they add up
  to 1 but for rounding, which is a thousandth of what a large codebook's values have together;
- `icdf(shares)`: the smallest values up to which the mass exceeds shares in [0, 1), int64
  (B, n). With uniform shares these are draws.

Free probabilities of symbols have a sixth, `mean(vectors)`: of one vector for each value, (V, D),
the expected one, (B, n, D).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..configuration.level import MANY_SYMBOLS

LOGITS_AT_A_TIME = 2**23  # of many values: 32 MB in fp32, which C libraries give back at once
ENTRIES_AT_A_TIME = 512  # of a mixture's tables, which a processor keeps at hand


@dataclass(frozen=True)
class Categorical:
    """A free probability for each value; logits (B, n, V)."""

    logits: Tensor

    def log_prob(self, values: Tensor) -> Tensor:
        logits = self.logits.flatten(0, 1).float()
        return -F.cross_entropy(logits, values.flatten(), reduction="none").view(values.shape)

    def parts(self) -> "list[Categorical]":
        return [self]

    def probs(self) -> Tensor:
        return self.logits.float().softmax(-1)

    def mean(self, vectors: Tensor) -> Tensor:
        return self.probs() @ vectors.float()

    def icdf(self, shares: Tensor) -> Tensor:
        cumulative = self.logits.float().softmax(-1).cumsum(-1)
        total = cumulative[..., -1]
        # Rounding must not carry it to the end, where a value of probability 0 may stand.
        threshold = torch.minimum(shares * total, torch.nextafter(total, torch.zeros_like(total)))
        return torch.searchsorted(cumulative, threshold[..., None], right=True)[..., 0]


@dataclass(frozen=True)
class LowRankCategorical:
    """A free probability for each of many values, whose logits are never there all at once: they
    are made for a few positions, asked, and forgotten, and for a gradient made again.

    Args:
        features: (B, n, r).
        table, bias: the logits are `features @ table.T + bias`, of (V, r) and (V,).
    """

    features: Tensor
    table: Tensor
    bias: Tensor

    @property
    def logits(self) -> Tensor:
        return F.linear(self.features, self.table, self.bias)

    def parts(self) -> "list[LowRankCategorical]":
        count = LOGITS_AT_A_TIME // (len(self.features) * len(self.table))
        parts = self.features.split(max(1, count), 1)
        return [LowRankCategorical(part, self.table, self.bias) for part in parts]

    def log_prob(self, values: Tensor) -> Tensor:
        return self._in_parts(Categorical.log_prob, values)

    def probs(self) -> Tensor:
        return Categorical(self.logits).probs()

    def mean(self, vectors: Tensor) -> Tensor:
        return self._in_parts(lambda part: part.mean(vectors))

    def icdf(self, shares: Tensor) -> Tensor:
        return self._in_parts(Categorical.icdf, shares)

    def _in_parts(self, ask: Callable[..., Tensor], *asked: Tensor) -> Tensor:
        """What the parts answer, each asked as a `Categorical`, with its positions of `asked`,
        (B, n)."""

        def answer(features: Tensor, *asked: Tensor) -> Tensor:
            return ask(Categorical(F.linear(features, self.table, self.bias)), *asked)

        answers, stop = [], 0
        for part in self.parts():
            start, stop = stop, stop + part.features.shape[1]
            rows = [x[:, start:stop] for x in asked]
            if torch.is_grad_enabled():
                answers.append(checkpoint(answer, part.features, *rows, use_reentrant=False,
                                          preserve_rng_state=False))  # fmt: skip
            else:
                answers.append(answer(part.features, *rows))
        return torch.cat(answers, 1)


def categorical_from_features(
    features: Tensor, table: Tensor, bias: Tensor
) -> Categorical | LowRankCategorical:
    """Logits `features @ table.T + bias`, (B, n, V): at once unless values are many."""
    factored = LowRankCategorical(features, table, bias)
    return factored if len(table) > MANY_SYMBOLS else Categorical(factored.logits)


@dataclass(frozen=True)
class DiscretizedLogisticMixture:
    """K logistic distributions, rounded to the pixel values, and the uniform one: a discretized
    mixture of logistics (Salimans et al. 2017, PixelCNN++). 0 and V − 1 take what lies beyond.

    The components come first, so that all operations run over long rows.

    Args:
        weights: of the K components and the uniform one, summing to 1: (K + 1, B, n).
        means: in pixel values, (K, B, n).
        precisions: the inverse of the scales, (K, B, n).
        num_values: V, a power of two.
    """

    weights: Tensor
    means: Tensor
    precisions: Tensor
    num_values: int

    def log_prob(self, values: Tensor) -> Tensor:
        middles = values.float()  # integers minus 0.5 would have torch's default dtype
        lower = (middles - 0.5).masked_fill(values == 0, -1e6)
        upper = (middles + 0.5).masked_fill(values == self.num_values - 1, 1e6)
        edges = torch.stack([lower, upper])[:, None]
        masses = _between((edges - self.means) * self.precisions)[0]
        return ((self.weights[:-1] * masses).sum(0) + self._floor).log()

    def parts(self) -> "list[DiscretizedLogisticMixture]":
        return [self]

    @property
    def logits(self) -> Tensor:
        edges = _edges(0, self.num_values + 1, self.means.device)[:, None, None]
        edges[0], edges[-1] = -1e6, 1e6
        probs = self._floor.repeat(self.num_values, 1, 1)
        for weight, mean, precision in zip(self.weights, self.means, self.precisions, strict=False):
            probs = probs + weight * _between((edges - mean) * precision)
        return probs.log().movedim(0, -1)

    def probs(self) -> Tensor:
        """As differences of what lies below, which in the tails says less than `logits`, in a fifth
        of the time."""
        flat = (x.flatten(1)[..., None] for x in (self.weights, self.means, self.precisions))
        weights, means, precisions = flat  # (K, B · n, 1)
        edges = _edges(1, self.num_values, means.device)
        found = torch.zeros(
            means.shape[1], self.num_values + 1, dtype=torch.float32, device=means.device
        )
        found[:, -1] = 1 - weights[-1, :, 0]
        for start in range(0, len(found), ENTRIES_AT_A_TIME):
            part = slice(start, start + ENTRIES_AT_A_TIME)
            below = found[part, 1:-1]
            for weight, mean, precision in zip(weights, means, precisions, strict=False):
                x = (edges - mean[part]).mul_(precision[part]).sigmoid_()
                below.addcmul_(x, weight[part])
        masses = found.diff(dim=1).clamp_(min=0).add_(self._floor.flatten()[:, None])
        return masses.unflatten(0, self.means.shape[1:])

    def icdf(self, shares: Tensor) -> Tensor:
        """Found by halving: in eight steps for 256 values."""
        weights, floor = self.weights[:-1], self._floor
        values = torch.zeros(shares.shape, dtype=torch.long, device=shares.device)
        for power in reversed(range((self.num_values - 1).bit_length())):
            below = values + 2**power  # values less than this one
            mass = (weights * self._cumulative(below.float() - 0.5)).sum(0) + floor * below
            is_above = (mass > shares) | (below >= self.num_values)
            values = torch.where(is_above, values, below)
        return values

    @property
    def _floor(self) -> Tensor:
        """The uniform distribution's mass of one value, (B, n)."""
        return self.weights[-1] / self.num_values

    def _cumulative(self, edges: Tensor) -> Tensor:
        """Of each component at edges (B, n)."""
        return ((edges - self.means) * self.precisions).sigmoid()


def _edges(start: int, stop: int, device: torch.device) -> Tensor:
    """The lower edges of the values start … stop − 1, float32."""
    return torch.arange(start, stop, dtype=torch.float32, device=device) - 0.5


def _between(edges: Tensor) -> Tensor:
    """The mass of the standard logistic between edges that grow, (E, ...) -> (E − 1, ...).

    What lies above its middle is measured from above: differences of numbers near 1 would be lost.
    """
    tails = (-edges.abs()).sigmoid()
    lower, upper = tails[:-1], tails[1:]
    holds_middle = (edges[:-1] < 0) & (edges[1:] > 0)
    return torch.where(holds_middle, 1 - lower - upper, (lower - upper).abs())


Distribution = Categorical | LowRankCategorical | DiscretizedLogisticMixture
