"""Convolution nets on (B, C, H, W) in channels_last, the heads in which decoders end, and the step
of a causal transformer."""

import inspect
import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .distributions import Categorical, PixelMixture


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, C, H, W): free of transposes in channels_last, where
    group norm costs a third of a training step."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ZeroConv2d(nn.Conv2d):
    """A convolution that starts at zero."""


class ZeroLinear(nn.Linear):
    """A linear map that starts at zero."""


class ZeroEmbedding(nn.Embedding):
    """A table of vectors that start at zero."""


class PixelEmbedding(nn.Embedding):
    """A vector for each of the 256 pixel values; near values start near."""

    def ordinal_features(self) -> Tensor:
        """√2 cos(π k x / 2) for x in [0, 2]: (256, E)."""
        x = torch.linspace(0, 2, self.num_embeddings, device=self.weight.device)
        k = torch.arange(self.embedding_dim, device=self.weight.device)
        return 2**0.5 * torch.cos(math.pi / 2 * k * x[:, None])


class FreeLogits(ZeroLinear):
    """A logit of its own for every value: (B, n, width) -> (B, n, V)."""

    def forward(self, x: Tensor, *_) -> Categorical:
        return Categorical(super().forward(x))


class PixelLogits(nn.Module):
    """Logits of the 256 pixel values, uniform at initialisation; near values learn together.

    What one value teaches reaches its neighbours through the ordinal table, of lower rank than
    256, but the distribution can take any shape: the table and the biases are learned too.
    """

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.project = ZeroLinear(width, rank)
        self.values = PixelEmbedding(256, rank)
        self.bias = nn.Parameter(torch.zeros(256))

    def forward(self, x: Tensor, *_) -> Categorical:
        return Categorical(F.linear(self.project(x), self.values.weight, self.bias))


class PixelLogistics(nn.Module):
    """Logistic distributions around guesses of a pixel, uniform ones at first where there are none.

    Four components begin at the nearest pixels that are known, as pictures repeat, and four, from
    narrow to wide, at their mean, as pictures are smooth. Colours change together: a guess moves
    by what it missed of the colour before.
    """

    NUM_GUESSES = 8

    def __init__(self, width: int):
        super().__init__()
        self.project = ZeroLinear(width, 4 * self.NUM_GUESSES + 1)

    def forward(self, x: Tensor, guesses: Tensor, misses: Tensor | None) -> PixelMixture:
        """
        Args:
            x: (B, n, width).
            guesses: in pixel values, (8, B, n).
            misses: the colour before less its guesses, (8, B, n).
        """
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.project.weight.float(), self.project.bias.float()
            numbers = F.linear(x.float(), weight, bias).movedim(-1, 0).contiguous()
            weights, offsets, log_scales, slopes = numbers.tensor_split((9, 17, 25))
            means = guesses + offsets.clamp(-6, 6).sinh()  # fine near the guess, coarse far away
            if misses is not None:
                means = means + (1 + slopes) * misses
            start = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 2.0, 3.0], device=x.device)
            log_scales = (log_scales + start[:, None, None]).clamp(-3, 5)
            return PixelMixture(weights.softmax(0), means, (-log_scales).exp())


def pixel_guesses(near: Tensor) -> Tensor:
    """What `PixelLogistics` begin at, (8, ...), of the nearest known values (4, ...)."""
    return torch.cat([near, near.mean(0, keepdim=True).expand_as(near)])


def soft_differences(differences: Tensor) -> Tensor:
    """Differences of pixel values, to which small ones matter most: (...) -> (..., 3)."""
    scales = torch.tensor([1.0, 6.0, 36.0], device=differences.device)
    return (differences[..., None] / scales).tanh()


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(norm(x)))), the identity at initialisation;
    the second convolution mixes channels alone unless its kernel is 3×3."""

    def __init__(self, width: int, kernel_size: int):
        super().__init__()
        self.norm = ChannelNorm(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = ZeroConv2d(width, width, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(self.norm(x))))


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, 4 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(x), 2)


class Downsample(nn.Module):
    """(B, C_in, H, W) -> (B, C_out, ⌈H/2⌉, ⌈W/2⌉)."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        self.conv = nn.Conv2d(4 * width_in, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2))
        return self.conv(F.pixel_unshuffle(x, 2))


def residual_blocks(width: int, num_layers: int, kernel_size: int) -> nn.Sequential:
    return nn.Sequential(*(ResidualBlock(width, kernel_size) for _ in range(num_layers)))


def init_weights(module: nn.Module):
    """Unit variance forward, zero where the type says so; leaves loaded weights alone.

    transformers visits leaves first and nothing twice: a module says by its own type how it starts.
    """
    if isinstance(module, (ZeroConv2d, ZeroLinear)):
        init.zeros_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, ZeroEmbedding):
        init.zeros_(module.weight)
    elif isinstance(module, (nn.Linear, nn.Conv2d)):
        init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        init.zeros_(module.bias)
    elif isinstance(module, PixelEmbedding):
        init.copy_(module.weight, module.ordinal_features())
    elif isinstance(module, nn.Embedding):
        init.normal_(module.weight)
    elif isinstance(module, nn.LayerNorm):
        init.ones_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, PixelLogits):
        init.zeros_(module.bias)


@cache
def _cache_name(forward: Callable) -> str:
    """What a causal model calls its key-value cache: `cache` since transformers 5.24."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def cached_step(backbone: nn.Module, known, **inputs: Tensor):
    """One step of a causal model of transformers.

    Args:
        known: the key-value cache of the steps before, `None` at first.
        inputs: `input_ids`, int64 (B, 1), or `inputs_embeds`, (B, 1, width).

    Returns:
        The model's output, and the cache that knows this step too.
    """
    name = _cache_name(type(backbone).forward)
    output = backbone(**inputs, **{name: known}, use_cache=True)
    return output, output[name]
