"""The auxiliary decoder: small and feed-forward, it makes codes carry the picture.

A strong decoder is indifferent to what codes say, as long as they say it; one that says everything
at once, each entry by itself, is not: what it shows is a picture or grid that is like the true one.
Encoder and codebook learn by it; its expectation is the preview.
"""

import math

import torch
from torch import Tensor, nn

from .configuration import ProgressiveVAELevelConfig
from .decoders import Condition
from .distributions import Categorical, Distribution, PixelMixture
from .groups import Choose, Place, Teacher, ask
from .networks import ChannelNorm, Upsample, residual_blocks

FLOOR = 1e-3  # the share of the uniform distribution, so that no pixel is impossible


class Auxiliary(nn.Module):
    """`P(finer | z) = ∏ P(entry | z)`: logistics around a picture, or probabilities of symbols.

    It has the verbs of a `Decoder`, of which it is the simplest, and

    - `expect(quantized, size)`: its expectation of a finer grid of `size` (H, W): a picture, float
      (B, C, H, W) in [−1, 1], or the probabilities of symbols (B, V, H, W).

    One pass serves both: `said = auxiliary(quantized, size)`, `expectation(said)`, and the
    log-probability of a finer grid in nats, `judge(said, finer)`, (B,).
    """

    def __init__(self, config: ProgressiveVAELevelConfig):
        super().__init__()
        self.config = config

    def forward(self, quantized: Tensor, size: tuple[int, int]) -> Tensor:
        """What it says, float32: of symbols their logits, (B, V, H, W); of a picture its colours,
        then the logarithms of their scales, (B, 2C, H, W)."""
        raise NotImplementedError

    def expectation(self, said: Tensor) -> Tensor:
        if self.config.is_finest:
            return said[:, : self.config.value_channels].clamp(-1, 1)
        return said.softmax(1)

    def judge(self, said: Tensor, finer: Tensor) -> Tensor:
        teacher = Teacher(finer)
        self._walk(said, teacher)
        return torch.stack(teacher.terms).sum(0)

    def expect(self, quantized: Tensor, size: tuple[int, int]) -> Tensor:
        return self.expectation(self(quantized, size))

    def walk(self, condition: Condition, size: tuple[int, int], choose: Choose) -> Tensor:
        return self._walk(self(condition.quantized, size), choose)

    def log_prob(self, condition: Condition, finer: Tensor) -> Tensor:
        size = (finer.shape[-2], finer.shape[-1])
        return self.judge(self(condition.quantized, size), finer)

    def check_causal(self):
        """It is: nothing follows."""

    def _walk(self, said: Tensor, choose: Choose) -> Tensor:
        """One group, whose colours are independent too."""
        size, channels = said.shape[-2:], self.config.value_channels
        positions = torch.arange(math.prod(size), device=said.device)
        grids = [
            ask(choose, self._of_colour(said, colour), Place(0, colour, positions), len(said))
            for colour in range(channels)
        ]
        return torch.stack(grids, 1).unflatten(2, size)

    def _of_colour(self, said: Tensor, colour: int) -> Distribution:
        if not self.config.is_finest:
            return Categorical(said.flatten(2).movedim(1, -1))
        half = (self.config.num_values - 1) / 2
        mean, log_scale = said.unflatten(1, (2, -1))[:, :, colour].flatten(2).unbind(1)  # (B, n)
        weights = torch.stack([torch.full_like(mean, 1 - FLOOR), torch.full_like(mean, FLOOR)])
        # It starts wide, and a scale of 1 is that of a tenth of the values.
        precision = (-(log_scale.clamp(-5, 5) + math.log(0.2 * half))).exp()
        return PixelMixture(
            weights, (mean[None] + 1) * half, precision[None], self.config.num_values
        )


class AuxiliaryDecoder(Auxiliary):
    """A net of our own, as small as the config says."""

    def __init__(self, config: ProgressiveVAELevelConfig):
        super().__init__(config)
        width = config.auxiliary_hidden_size
        assert width is not None  # the config sees to it
        num_outputs = 2 * config.value_channels if config.is_finest else config.num_values
        layers: list[nn.Module] = [nn.Conv2d(config.codebook_dim, width, 3, padding=1)]
        for _ in range(int(math.log2(config.downsample))):
            layers.append(
                residual_blocks(width, config.auxiliary_num_layers, config.block_kernel_size)
            )
            layers.append(Upsample(width))
        self.layers = nn.Sequential(*layers)
        self.out = nn.Sequential(ChannelNorm(width), nn.Conv2d(width, num_outputs, 3, padding=1))

    def forward(self, quantized: Tensor, size: tuple[int, int]) -> Tensor:
        x = self.layers(quantized.contiguous(memory_format=torch.channels_last))
        return self.out(x)[..., : size[0], : size[1]].float()
