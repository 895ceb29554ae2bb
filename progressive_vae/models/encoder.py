"""The network of `P_Ψ(z_i | z_{i+1})`: from the finer grid to latents, the quantizer's input."""

import math
from typing import cast

import torch
from torch import Tensor, nn

from ..configuration.level import ProgressiveVAELevelConfig
from .layers import Downsample, LayerNorm2d, add_dither, embed_channels, residual_blocks
from .value_types import BlocksOfCodes, make_value_type


class Encoder(nn.Module):
    """The finer grid -> latents (B, D, H_i, W_i)."""

    def __init__(self, config: ProgressiveVAELevelConfig):
        super().__init__()
        self.dither = config.dither
        width = config.encoder_hidden_size or config.hidden_size
        blocks = config.encoder_num_layers, config.block_kernel_size
        if config.is_finest:
            self.embed = None
            embed_dim = config.value_channels
        else:
            num_embeddings = config.value_channels * config.num_values  # of the blocks of a code
            self.embed = nn.Embedding(num_embeddings, config.value_embed_dim)
            embed_dim = config.value_embed_dim
        self.value_type = make_value_type(config)
        # Full resolution is expensive and has little information at each position of an image, but
        # much at each code: only grids of codes have blocks before the first downsampling.
        layers: list[nn.Module] = []
        in_width = embed_dim
        if not config.is_finest:
            layers.append(nn.Conv2d(embed_dim, width, 3, padding=1))
            layers.append(residual_blocks(width, *blocks))
            in_width = width
        for _ in range(int(math.log2(config.downsample))):
            layers.append(Downsample(in_width, width))
            layers.append(residual_blocks(width, *blocks))
            in_width = width
        self.layers = nn.Sequential(*layers)
        assert config.codebook_dim is not None  # the config sets it
        self.out = nn.Sequential(LayerNorm2d(width), nn.Conv2d(width, config.codebook_dim, 1))

    @torch.no_grad()
    def embed_like(self, codebook: Tensor, generator: torch.Generator):
        """Initialize the embeddings of codes by a random projection of the finer level's codebook
        (V, D), so that near code vectors have near embeddings. Embeddings of blocks stay: several
        codes share them."""
        assert self.embed is not None
        if isinstance(self.value_type, BlocksOfCodes):
            return
        vectors = codebook.float() - codebook.float().mean(0)
        vectors = vectors / vectors.square().mean().sqrt().clamp(min=1e-6)
        projection = torch.randn(
            vectors.shape[1],
            self.embed.embedding_dim,
            generator=generator,
            dtype=torch.float32,
            device=generator.device,
        )
        scale = vectors.shape[1] ** -0.5
        self.embed.weight.copy_(vectors @ projection.to(vectors) * scale)

    def forward(self, finer: Tensor) -> Tensor:
        """Pixels (B, C, H, W) in [−1, 1], or codes int64 (B, H, W), to latents (B, D, H_i, W_i)."""
        if self.embed is not None and isinstance(self.value_type, BlocksOfCodes):
            x = embed_channels(self.embed, self.value_type.split(finer)).movedim(-1, 1)
        elif self.embed is not None:
            x = self.embed(finer).movedim(-1, 1)
        else:  # float32 until here: 16-bit floats cannot represent the 256 values
            x = finer.to(cast(Tensor, self.out[1].weight).dtype)
        latents = self.out(self.layers(x.contiguous(memory_format=torch.channels_last)))
        return add_dither(latents, self.dither)


def make_encoder(config: ProgressiveVAELevelConfig) -> Encoder:
    return Encoder(config)
