"""Heads: from what a network knows of some positions to distributions over their values, and what a
head wants to see of the values around them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..configuration.level import ProgressiveVAELevelConfig
from .distributions import (
    Categorical,
    DiscretizedLogisticMixture,
    Distribution,
    LowRankCategorical,
    categorical_from_features,
)
from .layers import AlignedLinear, PixelEmbedding, ZeroLinear, cached_constant
from .orderings import Group


class NoConditioning(nn.Module):
    """Adds nothing to a state."""

    def forward(self, state: Tensor, group: Group, guesses: Tensor) -> Tensor:
        return state


class Head(nn.Module):
    """From the features of positions to the distribution of one of their colors, or symbols.

    A head may make G guesses of each value before it is asked, from the values that are known
    around it. A network then sees more of the values than their embeddings: what was known around
    a group, and by how much the guesses of earlier colors missed. By default G = 0.

    - `forward(features, guesses, misses)` -> `Distribution` of n positions: features (B, n, width),
      guesses (G, B, n), and misses, values less guesses, of the color before; `None` has none.
    """

    residual_dim = 0  # numbers by which a network sees what was missed of one value

    def forward(
        self, features: Tensor, guesses: Tensor | None = None, misses: Tensor | None = None
    ) -> Distribution:
        raise NotImplementedError

    def init_weights(self):
        """Sets tensors of its own to their start, but leaves loaded ones alone."""

    def make_neighbor_conditioning(self, channels: int, width: int) -> nn.Module:
        """(state, group, guesses) -> the state with what is known around the group's positions."""
        return NoConditioning()

    def guesses(
        self, group: Group, grid: Tensor, size: tuple[int, int], picture: Tensor | None = None
    ) -> Tensor:
        """Of the group's values, (G, B, C, n), where the values (B, C, H, W) before it are put in
        already; `size` is the true (H, W), and `picture` what is expected of the whole grid."""
        return group.gather_values(grid)[None][:0].float()

    def seen(self, misses: Tensor) -> Tensor:
        """Values less guesses (G, B, n) -> (B, n, miss_dim)."""
        return misses.new_zeros(*misses.shape[1:], self.residual_dim)


class LinearHead(Head, ZeroLinear):
    """A logit of its own for every value: (B, n, width) -> (B, n, V)."""

    def forward(
        self, features: Tensor, guesses=None, misses=None
    ) -> Categorical | LowRankCategorical:
        return categorical_from_features(features, self.weight, self.bias)


class LowRankHead(Head):
    """Logits of many symbols, uniform at initialization, through a table of lower rank than their
    number: (B, n, width) -> (B, n, V)."""

    Table = nn.Embedding

    def __init__(self, width: int, rank: int, num_values: int):
        super().__init__()
        self.project = ZeroLinear(width, rank)
        self.values = self.Table(num_values, rank)
        self.bias = nn.Parameter(torch.zeros(num_values))

    def forward(
        self, features: Tensor, guesses=None, misses=None
    ) -> Categorical | LowRankCategorical:
        return categorical_from_features(self.project(features), self.values.weight, self.bias)

    def init_weights(self):
        init.zeros_(self.bias)


class OrdinalPixelHead(LowRankHead):
    """Logits of pixel values, uniform at initialization; near values learn together.

    What one value teaches reaches its neighbors through the ordinal table, of lower rank than
    their number, but the distribution can take any shape: the table and the biases are learned too.
    """

    Table = PixelEmbedding


class LogisticMixtureHead(Head):
    """Logistic distributions around guesses of a pixel, uniform ones at first where there are none.

    Four components begin at the nearest pixels that are known, as pictures repeat, and four, from
    narrow to wide, at their mean, as pictures are smooth. Colors change together: a guess moves
    by what it missed of the color before. Of the group that comes first the guesses are spread
    over all values.
    """

    LOG_SCALES: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 2.0, 3.0)  # at first
    residual_dim = 3

    def __init__(self, width: int, num_values: int):
        super().__init__()
        self.num_values = num_values
        self.project = ZeroLinear(width, 4 * len(self.LOG_SCALES) + 1)

    def forward(self, features: Tensor, guesses=None, misses=None) -> DiscretizedLogisticMixture:
        count = len(self.LOG_SCALES)
        with torch.autocast(features.device.type, enabled=False):
            weight, bias = self.project.weight.float(), self.project.bias.float()
            numbers = F.linear(features.float(), weight, bias).movedim(-1, 0).contiguous()
            weights, offsets, log_scales, slopes = numbers.split([count + 1, count, count, count])
            means = guesses + offsets.clamp(-6, 6).sinh()  # fine near the guess, coarse far away
            if misses is not None:
                means = means + (1 + slopes) * misses
            start = cached_constant(self.LOG_SCALES, features.device)
            log_scales = (log_scales + start[:, None, None]).clamp(-3, 5)
            return DiscretizedLogisticMixture(
                weights.softmax(0), means, (-log_scales).exp(), self.num_values
            )

    def make_neighbor_conditioning(self, channels: int, width: int) -> nn.Module:
        return NeighborConditioning(channels, len(self.LOG_SCALES), width)

    def guesses(
        self, group: Group, grid: Tensor, size: tuple[int, int], picture: Tensor | None = None
    ) -> Tensor:
        neighbors = group.neighbors(grid, size)  # (4, B, C, n)
        if neighbors is not None:
            neighbors = neighbors.float()
            return torch.cat([neighbors, neighbors.mean(0, keepdim=True).expand_as(neighbors)])
        eighths = torch.arange(8, dtype=torch.float32, device=grid.device)
        middles = (eighths + 0.5) * (self.num_values / 8)
        return middles.view(8, 1, 1, 1).expand(8, *group.gather_values(grid).shape)

    def seen(self, misses: Tensor) -> Tensor:
        return soft_differences(misses[-1])


class GuidedLogisticMixtureHead(LogisticMixtureHead):
    """Two more components begin at a picture that is expected: as it is, and corrected by what it
    missed of the known neighbors. Of the group that comes first all are near the picture. (Where
    `Lattice.neighbors` has a 0 for want of an entry, along short sides, the correction is void.)

    A decoder that is given an auxiliary decoder's picture: Lucas & Verbeek 2017, "Auxiliary guided
    autoregressive variational autoencoders".
    """

    LOG_SCALES = (*LogisticMixtureHead.LOG_SCALES, 2.0, 1.0)

    def guesses(
        self, group: Group, grid: Tensor, size: tuple[int, int], picture: Tensor | None = None
    ) -> Tensor:
        assert picture is not None  # the level sees to it
        expected, known = group.gather_values(picture), group.neighbors(picture, size)
        if known is None:  # apart from each other where their scales are alike, lest they stay so
            steps = cached_constant((-36, -12, 12, 36, 0, 0, 0, 0, 3, -3), expected.device)
            return expected + steps[:, None, None, None]
        guesses = super().guesses(group, grid, size)
        missed = (guesses[:4] - known).mean(0)
        return torch.cat([guesses, torch.stack([expected, expected + missed])])


class NeighborConditioning(AlignedLinear):
    """Adds to a state how all guesses but their plain mean differ from it: those around a pixel,
    and those of a picture."""

    def __init__(self, channels: int, num_guesses: int, width: int):
        super().__init__(3 * channels * (num_guesses - 4), width)

    def forward(self, state: Tensor, group: Group, guesses: Tensor) -> Tensor:  # type: ignore[override]
        neighbors, mean, more = guesses[:4], guesses[4], guesses[8:]
        differences = torch.cat([neighbors, more]) - mean
        steps = soft_differences(differences).permute(1, 3, 0, 2, 4).flatten(2).to(state)
        return state + group.scatter_features(super().forward(steps), state.shape[-2:])


def soft_differences(differences: Tensor) -> Tensor:
    """Differences of pixel values, to which small ones matter most: (...) -> (..., 3)."""
    scales = cached_constant((1.0, 6.0, 36.0), differences.device)
    return (differences[..., None] / scales).tanh()


def make_head(config: ProgressiveVAELevelConfig) -> Head:
    """The head of a group decoder, for one color, or for symbols."""
    width, num_values = config.hidden_size, config.num_values
    if config.is_guided:
        return GuidedLogisticMixtureHead(width, num_values)
    if config.has_component_means:
        return LogisticMixtureHead(width, num_values)
    return make_logits(config, width)


def make_logits(config: ProgressiveVAELevelConfig, width: int) -> Head:
    """A head of so wide features that gives each value a probability of its own."""
    if config.is_finest and config.pixel_logit_rank:
        return OrdinalPixelHead(width, config.pixel_logit_rank, config.num_values)
    if not config.is_finest and config.symbol_logit_rank:
        return LowRankHead(width, config.symbol_logit_rank, config.num_values)
    return LinearHead(width, config.num_values)
