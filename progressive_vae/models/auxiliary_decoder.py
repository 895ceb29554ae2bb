"""The auxiliary decoder: small and feed-forward, it makes codes carry the picture.

A strong decoder is indifferent to what codes say, as long as they say it; one that says everything
at once, each entry by itself, is not: what it shows is a picture or grid that is like the true one.
Encoder and codebook learn by it; its expectation is the preview.
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

FLOOR = 1e-3  # the share of the uniform distribution, so that no pixel is impossible


class Auxiliary(nn.Module):
    """`P(finer | z) = ∏ P(entry | z)`: logistics around a picture, or probabilities of symbols.

    It has the verbs of a `Decoder`, of which it is the simplest, and

    - `expect(quantized, size)`: its expectation of a finer grid of `size` (H, W): a picture, float
      (B, C, H, W) in [−1, 1], or the probabilities of symbols (B, V, H, W).

    One pass serves all: `said = auxiliary(quantized, size)`, the log-probability of a finer grid in
    nats, `judge(said, finer)`, (B,), and `expectation(said, finer_codebook)`: a picture, or of
    symbols the mean of their vectors in the finer level's codebook (V, D): (B, D, H, W).
    """

    def __init__(self, config: ProgressiveVAELevelConfig):
        super().__init__()
        self.config = config

    def forward(self, quantized: Tensor, size: tuple[int, int]) -> Tensor:
        """What it says, float32: of a picture its colors, then the logarithms of their scales,
        (B, 2C, H, W); of symbols what `_symbols` reads, (B, ..., H, W)."""
        raise NotImplementedError

    def expectation(self, said: Tensor, finer_codebook: Tensor | None = None) -> Tensor:
        if self.config.is_finest:
            return said[:, : self.config.value_channels].clamp(-1, 1)
        assert finer_codebook is not None
        vectors = self._symbols(said).expected_embedding(finer_codebook.to(said))  # (B, H·W, D)
        return vectors.movedim(-1, 1).unflatten(2, said.shape[-2:])

    def judge(self, said: Tensor, finer: Tensor) -> Tensor:
        teacher = TeacherForcing(finer)
        self._walk(said, teacher)
        return teacher.log_prob()

    def expect(self, quantized: Tensor, size: tuple[int, int]) -> Tensor:
        said = self(quantized, size)
        if self.config.is_finest:
            return self.expectation(said)
        return self._symbols(said).probs().movedim(-1, 1).unflatten(2, size)

    def walk(self, condition: Condition, size: tuple[int, int], step_fn: StepFn) -> Tensor:
        """Run the autoregressive loop, which has one step per channel."""
        return self._walk(self(condition.quantized, size), step_fn)

    def log_prob(self, condition: Condition, finer: Tensor) -> Tensor:
        size = (finer.shape[-2], finer.shape[-1])
        return self.judge(self(condition.quantized, size), finer)

    def check_causal(self):
        """It is: nothing follows."""

    def _walk(self, said: Tensor, step_fn: StepFn) -> Tensor:
        """One group, whose colors are independent too."""
        size, channels = said.shape[-2:], self.config.value_channels
        positions = torch.arange(math.prod(size), device=said.device)
        grids = [
            call_step_fn(
                step_fn, self._of_color(said, color), WalkStep(0, color, positions), len(said)
            )
            for color in range(channels)
        ]
        return torch.stack(grids, 1).unflatten(2, size)

    def _of_color(self, said: Tensor, color: int) -> Distribution:
        if not self.config.is_finest:
            return self._symbols(said)
        half = (self.config.num_values - 1) / 2
        mean, log_scale = said.unflatten(1, (2, -1))[:, :, color].flatten(2).unbind(1)  # (B, n)
        weights = torch.stack([torch.full_like(mean, 1 - FLOOR), torch.full_like(mean, FLOOR)])
        # It starts wide, and a scale of 1 is that of a tenth of the values.
        precision = (-(log_scale.clamp(-5, 5) + math.log(0.2 * half))).exp()
        return DiscretizedLogisticMixture(
            weights, (mean[None] + 1) * half, precision[None], self.config.num_values
        )

    def _symbols(self, said: Tensor) -> Categorical | LowRankCategorical:
        """Logits are said, (B, V, H, W)."""
        return Categorical(said.flatten(2).movedim(1, -1))


class AuxiliaryDecoder(Auxiliary):
    """A network of convolutions. Where symbols are many, it says fewer numbers than these, and a
    table makes logits of them."""

    def __init__(self, config: ProgressiveVAELevelConfig):
        super().__init__(config)
        width, rank = config.auxiliary_hidden_size, config.symbol_logit_rank
        assert width is not None and rank is not None  # the config sees to it
        num_outputs = 2 * config.value_channels if config.is_finest else config.num_values
        self.table = None
        if rank and not config.is_finest:
            num_outputs, self.table = rank, nn.Linear(rank, config.num_values)
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

    def _symbols(self, said: Tensor) -> Categorical | LowRankCategorical:
        if self.table is None:
            return super()._symbols(said)
        features = said.flatten(2).movedim(1, -1).to(self.table.weight)
        return categorical_from_features(features, self.table.weight, self.table.bias)
