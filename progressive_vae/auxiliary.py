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


class AuxiliaryDecoder(nn.Module):
    """`P(finer | z) = ∏ P(entry | z)`: logistics around a picture, or probabilities of symbols.

    It has the verbs of a `Decoder`, of which it is the simplest, and

    - `expect(quantized, size)`: its expectation of a finer grid of `size` (H, W): a picture, float
      (B, C, H, W) in [−1, 1], or the probabilities of symbols (B, V, H, W).
    """

    def __init__(self, config: ProgressiveVAELevelConfig):
        super().__init__()
        width, self.config = config.auxiliary_hidden_size, config
        assert width is not None  # the config sees to it
        self.num_outputs = 2 * config.value_channels if config.is_finest else config.num_values
        layers: list[nn.Module] = [nn.Conv2d(config.codebook_dim, width, 3, padding=1)]
        for _ in range(int(math.log2(config.downsample))):
            layers.append(
                residual_blocks(width, config.auxiliary_num_layers, config.block_kernel_size)
            )
            layers.append(Upsample(width))
        self.layers = nn.Sequential(*layers)
        self.out = nn.Sequential(
            ChannelNorm(width), nn.Conv2d(width, self.num_outputs, 3, padding=1)
        )

    def forward(self, quantized: Tensor, size: tuple[int, int]) -> Tensor:
        """What it says, float32 (B, num_outputs, H, W)."""
        x = self.layers(quantized.contiguous(memory_format=torch.channels_last))
        return self.out(x)[..., : size[0], : size[1]].float()

    def expect(self, quantized: Tensor, size: tuple[int, int]) -> Tensor:
        said = self(quantized, size)
        if self.config.is_finest:
            return said[:, : self.config.value_channels].clamp(-1, 1)
        return said.softmax(1)

    def walk(self, condition: Condition, size: tuple[int, int], choose: Choose) -> Tensor:
        """One group, whose colours are independent too."""
        said, channels = self(condition.quantized, size), self.config.value_channels
        positions = torch.arange(math.prod(size), device=said.device)
        grids = [
            ask(choose, self._of_colour(said, colour), Place(0, colour, positions), len(said))
            for colour in range(channels)
        ]
        return torch.stack(grids, 1).unflatten(2, size)

    def log_prob(self, condition: Condition, finer: Tensor) -> Tensor:
        teacher = Teacher(finer)
        self.walk(condition, (finer.shape[-2], finer.shape[-1]), teacher)
        return torch.stack(teacher.terms).sum(0)

    def check_causal(self):
        """It is: nothing follows."""

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
