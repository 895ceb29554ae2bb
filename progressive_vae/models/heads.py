"""Output heads: from the features of positions to distributions over their values.

One head predicts one color channel of a group of positions (or its codes). A categorical head sees
features only. A mixture head also sees pixel values that are already decoded, in this order:

1. `component_means`: before the group is predicted, the head collects G estimates of every value
   from the decoded neighbors (and from a preview). They are the initial means of its G components.
2. `embed_neighbors`: these estimates as features, which a linear map adds to the network's state.
3. `forward`: features + component means (+ residuals of the previous channel) -> distribution.
4. `embed_residuals`: after a channel is decoded, residuals = values − component means. Their
   embedding conditions later channels and later groups.

Only the parameters of a head differ between channels and groups. With teacher forcing all else is
therefore computed once, for the positions of all groups.

Shape letters: B batch, C channels, n positions of the group, G components, V values.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..configuration.level import ProgressiveVAELevelConfig
from .device_constant import cached_constant
from .distributions import (
    Categorical,
    DiscretizedLogisticMixture,
    Distribution,
    LowRankCategorical,
    categorical_from_features,
)
from .layers import PixelEmbedding, ZeroLinear
from .orderings import Group


class Neighborhood(NamedTuple):
    """What is known of the values at n positions before any of them is decoded.

    Args:
        shape: (B, C, n).
        neighbors: the nearest decoded values, float32 (4, B, C, n); `None` in the first group.
        preview: the auxiliary decoder's mean image at the positions, float32 (B, C, n) in
            0 … V − 1; `None` if the config is not guided.
        preview_neighbors: that image at the neighbors, (4, B, C, n).
    """

    shape: torch.Size
    neighbors: Tensor | None = None
    preview: Tensor | None = None
    preview_neighbors: Tensor | None = None

    @classmethod
    def gather(
        cls,
        group: Group,
        num_positions: int,
        grid: Tensor,
        size: tuple[int, int],
        preview: Tensor | None = None,
    ) -> "Neighborhood":
        """That of a group whose earlier groups are in the padded grid, int64 (B, C, H', W').

        Args:
            num_positions: n, of the group.
            size: (H, W) of the true grid.
            preview: the mean image, padded as the grid.
        """
        neighbors = group.neighbors(grid, size)
        return cls(
            torch.Size((*grid.shape[:2], num_positions)),
            None if neighbors is None else neighbors.float(),
            None if preview is None else group.gather_values(preview),
            None if preview is None else group.neighbors(preview, size),
        )


class Head(nn.Module):
    """The interface; its defaults are those of a head without component means, G = 0."""

    is_float32 = False  # whether it computes in float32, also in mixed precision
    neighbor_dim = 0  # width of `embed_neighbors` for one channel
    residual_dim = 0  # width of `embed_residuals`

    def forward(
        self,
        features: Tensor,
        component_means: Tensor | None = None,
        residuals: Tensor | None = None,
    ) -> Distribution:
        """The distribution of one channel at n positions.

        Args:
            features: (B, n, width).
            component_means: of this channel, (G, B, n).
            residuals: of the previous channel, (G, B, n); `None` for the first channel.
        """
        return self.distribution(self.params(features), component_means, residuals)

    def params(self, features: Tensor) -> Tensor:
        """The part of `forward` that has weights: (..., width) -> (..., P)."""
        raise NotImplementedError

    def distribution(
        self,
        params: Tensor,
        component_means: Tensor | None = None,
        residuals: Tensor | None = None,
    ) -> Distribution:
        """The part without weights: params (..., P), means and residuals (G, ...)."""
        return Categorical(params)

    def init_weights(self):
        """Initialize parameters that belong to the head itself, unless they are loaded."""

    def component_means(self, neighborhood: Neighborhood, device: torch.device) -> Tensor:
        """Estimates of the values before any of them is decoded, float32 (G, B, C, n)."""
        return torch.zeros(0, *neighborhood.shape, dtype=torch.float32, device=device)

    def embed_neighbors(self, component_means: Tensor) -> Tensor:
        """Component means of decoded neighbors, (G, B, C, n) -> (B, n, C · neighbor_dim)."""
        _, batch_size, channels, count = component_means.shape
        return component_means.new_zeros(batch_size, count, channels * self.neighbor_dim)

    def embed_residuals(self, residuals: Tensor) -> Tensor:
        """Values minus component means, (G, ...) -> (..., residual_dim)."""
        return residuals.new_zeros(*residuals.shape[1:], self.residual_dim)


class LinearHead(Head, ZeroLinear):
    """One logit per value, uniform at initialization: (B, n, width) -> (B, n, V)."""

    def forward(  # type: ignore[override]
        self,
        features: Tensor,
        component_means: Tensor | None = None,
        residuals: Tensor | None = None,
    ) -> Categorical | LowRankCategorical:
        return categorical_from_features(features, self.weight, self.bias)

    def params(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight, self.bias)


class LowRankHead(Head):
    """Logits through a table of low rank, uniform at initialization: (B, n, width) -> (B, n, V).

    For large codebooks: rank · (width + V) weights instead of width · V.
    """

    Table = nn.Embedding

    def __init__(self, width: int, rank: int, num_values: int):
        super().__init__()
        # The names of these three are state-dict keys.
        self.project = ZeroLinear(width, rank)
        self.values = self.Table(num_values, rank)  # the table, one row per value
        self.bias = nn.Parameter(torch.zeros(num_values))

    def forward(
        self,
        features: Tensor,
        component_means: Tensor | None = None,
        residuals: Tensor | None = None,
    ) -> Categorical | LowRankCategorical:
        return categorical_from_features(self.project(features), self.values.weight, self.bias)

    def params(self, features: Tensor) -> Tensor:
        return F.linear(self.project(features), self.values.weight, self.bias)

    def init_weights(self):
        init.zeros_(self.bias)


class OrdinalPixelHead(LowRankHead):
    """A low-rank head whose table starts with similar rows for similar pixel values.

    A gradient for one value therefore also moves the logits of nearby values. Table and bias are
    learned, so the distribution can take any shape.
    """

    Table = PixelEmbedding


class LogisticMixtureHead(Head):
    """A discretized mixture of G = 8 logistics, whose means start at decoded neighbors.

    Components 0–3 start at the four nearest decoded pixels, which helps where textures repeat.
    Components 4–7 start at the mean of these, with scales from narrow to wide, which helps where
    images are smooth. The first group has no neighbors; its means are spread over all values.

    Color channels are correlated: by default a component's mean moves by its residual of the
    previous channel.
    """

    INITIAL_LOG_SCALES: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 2.0, 3.0)
    is_float32 = True
    NUM_SCALES = 3  # of `multiscale_tanh`
    neighbor_dim = 4 * NUM_SCALES
    residual_dim = NUM_SCALES

    def __init__(self, width: int, num_values: int):
        super().__init__()
        self.num_values = num_values
        # G + 1 weights (the last one of the uniform distribution), G offsets of the means,
        # G log-scales and G coefficients of the previous channel's residuals.
        self.project = ZeroLinear(width, 4 * len(self.INITIAL_LOG_SCALES) + 1)

    def params(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            weight = self.project.weight.float()
            return F.linear(features.float(), weight, self.project.bias.float())

    def distribution(
        self,
        params: Tensor,
        component_means: Tensor | None = None,
        residuals: Tensor | None = None,
    ) -> DiscretizedLogisticMixture:
        assert component_means is not None
        count = len(self.INITIAL_LOG_SCALES)
        params = params.movedim(-1, 0).contiguous()  # (4G + 1, ...)
        weights, offsets, log_scales, slopes = params.split([count + 1, count, count, count])
        # sinh: fine steps near the initial mean, coarse steps far from it.
        means = component_means + offsets.clamp(-6, 6).sinh()
        if residuals is not None:
            means = means + (1 + slopes) * residuals
        initial = cached_constant(tuple(-x for x in self.INITIAL_LOG_SCALES), params.device)
        initial = initial.view(-1, *[1] * (params.ndim - 1))
        precisions = (initial - log_scales).clamp(-5, 3).exp()  # of log-scales in [−3, 5]
        return DiscretizedLogisticMixture(weights.softmax(0), means, precisions, self.num_values)

    def component_means(self, neighborhood: Neighborhood, device: torch.device) -> Tensor:
        neighbors = neighborhood.neighbors
        if neighbors is not None:
            mean = neighbors.mean(0, keepdim=True)  # (1, B, C, n)
            return torch.cat([neighbors, mean.expand_as(neighbors)])  # (8, B, C, n)
        # First group: the centers of eight equal intervals of 0 … V − 1.
        intervals = torch.arange(8, dtype=torch.float32, device=device)
        centers = (intervals + 0.5) * (self.num_values / 8)
        return centers.view(8, 1, 1, 1).expand(8, *neighborhood.shape)

    def embed_neighbors(self, component_means: Tensor) -> Tensor:
        # Relative to the neighbors' mean, component 4, which components 5–7 repeat.
        relevant = torch.cat([component_means[:4], component_means[8:]])
        embedded = multiscale_tanh(relevant - component_means[4])  # (G − 4, B, C, n, 3)
        return embedded.permute(1, 3, 0, 2, 4).flatten(2)

    def embed_residuals(self, residuals: Tensor) -> Tensor:
        return multiscale_tanh(residuals[-1])  # those of the last component


class GuidedLogisticMixtureHead(LogisticMixtureHead):
    """Adds two components that start at the auxiliary decoder's mean image, the preview: G = 10.

    Component 8 starts at the preview itself. Component 9 starts at the preview plus its mean error
    on the decoded neighbors. In the first group all components start near the preview.

    Source: Lucas & Verbeek 2017, "Auxiliary guided autoregressive variational autoencoders".
    """

    INITIAL_LOG_SCALES = (*LogisticMixtureHead.INITIAL_LOG_SCALES, 2.0, 1.0)
    neighbor_dim = 6 * LogisticMixtureHead.NUM_SCALES

    def component_means(self, neighborhood: Neighborhood, device: torch.device) -> Tensor:
        _, neighbors, preview, preview_neighbors = neighborhood
        assert preview is not None  # the level computes it if the config is guided
        if neighbors is None or preview_neighbors is None:
            # Components with equal scales need different means, or they would stay equal.
            shifts = cached_constant((-36, -12, 12, 36, 0, 0, 0, 0, 3, -3), device)
            return preview + shifts[:, None, None, None]
        # Along short sides, where `Lattice.neighbors` returns a 0, this error means nothing.
        preview_error = (neighbors - preview_neighbors).mean(0)  # (B, C, n)
        means = super().component_means(neighborhood, device)  # (8, B, C, n)
        return torch.cat([means, torch.stack([preview, preview + preview_error])])


def multiscale_tanh(differences: Tensor) -> Tensor:
    """tanh of differences of pixel values at three scales: (...) -> (..., 3)."""
    scales = cached_constant((1.0, 6.0, 36.0), differences.device)
    return (differences[..., None] / scales).tanh()


def make_head(config: ProgressiveVAELevelConfig) -> Head:
    """The head of one channel in a group decoder."""
    if config.is_guided:
        return GuidedLogisticMixtureHead(config.hidden_size, config.num_values)
    if config.has_component_means:
        return LogisticMixtureHead(config.hidden_size, config.num_values)
    return make_categorical_head(config, config.hidden_size)


def make_categorical_head(config: ProgressiveVAELevelConfig, width: int) -> Head:
    """A head for features (B, n, width) that models a free probability of each value."""
    if config.is_finest and config.pixel_logit_rank:
        return OrdinalPixelHead(width, config.pixel_logit_rank, config.num_values)
    if not config.is_finest and config.symbol_logit_rank:
        return LowRankHead(width, config.symbol_logit_rank, config.num_values)
    return LinearHead(width, config.num_values)
