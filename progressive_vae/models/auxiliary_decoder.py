"""The auxiliary decoder: small and factorized, for the training of encoder and codebook.

An autoregressive decoder can ignore the codes (posterior collapse); a factorized one cannot, so its
loss makes the codes encode image content. Its expectation is the preview.
"""

import math

import torch
from torch import Tensor, nn

from ..configuration.level import ProgressiveVAELevelConfig
from .decoders import Condition
from .distributions import (
    Categorical,
    DiscretizedLogisticMixture,
    Distribution,
    LowRankCategorical,
    categorical_from_features,
)
from .layers import LayerNorm2d, Upsample, add_dither, residual_blocks
from .walk import StepFn, TeacherForcing, WalkStep, call_step_fn

FLOOR = 1e-3  # the weight of the uniform distribution, so that no pixel has probability 0


class Auxiliary(nn.Module):
    """`P(finer | z) = ∏ P(entry | z)`: logistics around an image, or probabilities of codes.

    It has the methods of a `Decoder`, and

    - `expect(quantized, size)`: its expectation of a finer grid of `size` (H, W): an image, float
      (B, C, H, W) in [−1, 1], or the probabilities of codes (B, V, H, W).

    The forward pass returns the distribution's parameters. Two functions read them:

    - `log_prob_of(parameters, finer)`: the log-probability of a finer grid in nats, (B,);
    - `expectation(parameters, finer_codebook)`: an image, or for codes their mean vector in the
      finer level's codebook (V, D): (B, D, H, W).
    """

    def __init__(self, config: ProgressiveVAELevelConfig):
        super().__init__()
        self.config = config

    def forward(self, quantized: Tensor, size: tuple[int, int]) -> Tensor:
        """The distribution's parameters, float32: for pixels their means, then their log scales,
        (B, 2C, H, W); for codes the input of `_code_distribution`, (B, ..., H, W)."""
        raise NotImplementedError

    def expectation(self, parameters: Tensor, finer_codebook: Tensor | None = None) -> Tensor:
        if self.config.is_finest:
            return parameters[:, : self.config.value_channels].clamp(-1, 1)
        assert finer_codebook is not None
        vectors = self._code_distribution(parameters).expected_embedding(
            finer_codebook.to(parameters)
        )  # (B, H·W, D)
        return vectors.movedim(-1, 1).unflatten(2, parameters.shape[-2:])

    def log_prob_of(self, parameters: Tensor, finer: Tensor) -> Tensor:
        teacher = TeacherForcing(finer)
        self._walk(parameters, teacher)
        return teacher.log_prob()

    def expect(self, quantized: Tensor, size: tuple[int, int]) -> Tensor:
        parameters = self(quantized, size)
        if self.config.is_finest:
            return self.expectation(parameters)
        return self._code_distribution(parameters).probs().movedim(-1, 1).unflatten(2, size)

    def walk(self, condition: Condition, size: tuple[int, int], step_fn: StepFn) -> Tensor:
        return self._walk(self(condition.quantized, size), step_fn)

    def step_sizes(self, size: tuple[int, int]) -> list[int]:
        return [math.prod(size)] * self.config.value_channels

    def log_prob(self, condition: Condition, finer: Tensor) -> Tensor:
        size = (finer.shape[-2], finer.shape[-1])
        return self.log_prob_of(self(condition.quantized, size), finer)

    def check_causal(self):
        """All entries are independent given z."""

    def _walk(self, parameters: Tensor, step_fn: StepFn) -> Tensor:
        """A walk over one group, whose colors are independent too."""
        size, channels = parameters.shape[-2:], self.config.value_channels
        positions = torch.arange(math.prod(size), device=parameters.device)
        grids = []
        for color in range(channels):
            distribution = self._color_distribution(parameters, color)
            step = WalkStep(0, color, positions)
            grids.append(call_step_fn(step_fn, distribution, step, len(parameters)))
        return torch.stack(grids, 1).unflatten(2, size)

    def _color_distribution(self, parameters: Tensor, color: int) -> Distribution:
        if not self.config.is_finest:
            return self._code_distribution(parameters)
        half = (self.config.num_values - 1) / 2
        mean, log_scale = (
            parameters.unflatten(1, (2, -1))[:, :, color].flatten(2).unbind(1)
        )  # (B, n)
        weights = torch.stack([torch.full_like(mean, 1 - FLOOR), torch.full_like(mean, FLOOR)])
        # The distribution starts wide: log_scale = 0 is a tenth of the range of values.
        precision = (-(log_scale.clamp(-5, 5) + math.log(0.2 * half))).exp()
        return DiscretizedLogisticMixture(
            weights, (mean[None] + 1) * half, precision[None], self.config.num_values
        )

    def _code_distribution(self, parameters: Tensor) -> Categorical | LowRankCategorical:
        """Logits (B, V, H, W) as a distribution of V values at each position."""
        return Categorical(parameters.flatten(2).movedim(1, -1))


class AuxiliaryDecoder(Auxiliary):
    """A convolution net. For large codebooks it returns features of a low rank, from which a table
    computes the logits."""

    def __init__(self, config: ProgressiveVAELevelConfig):
        super().__init__(config)
        width = config.auxiliary_hidden_size
        rank = config.symbol_logit_rank
        assert width is not None and rank is not None  # the config sets it
        num_outputs = 2 * config.value_channels if config.is_finest else config.num_values
        self.table = None
        if rank and not config.is_finest:
            num_outputs, self.table = rank, nn.Linear(rank, config.num_values)
        assert config.codebook_dim is not None  # the config sets it
        layers: list[nn.Module] = [nn.Conv2d(config.codebook_dim, width, 3, padding=1)]
        for _ in range(int(math.log2(config.downsample))):
            layers.append(
                residual_blocks(width, config.auxiliary_num_layers, config.block_kernel_size)
            )
            layers.append(Upsample(width))
        self.layers = nn.Sequential(*layers)
        self.out = nn.Sequential(LayerNorm2d(width), nn.Conv2d(width, num_outputs, 3, padding=1))

    def forward(self, quantized: Tensor, size: tuple[int, int]) -> Tensor:
        quantized = add_dither(quantized, -self.config.dither)
        x = self.layers(quantized.contiguous(memory_format=torch.channels_last))
        return self.out(x)[..., : size[0], : size[1]].float()

    def _code_distribution(self, parameters: Tensor) -> Categorical | LowRankCategorical:
        if self.table is None:
            return super()._code_distribution(parameters)
        features = parameters.flatten(2).movedim(1, -1).to(self.table.weight)
        return categorical_from_features(features, self.table.weight, self.table.bias)
