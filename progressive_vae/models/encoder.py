"""The network of `P_Ψ(z_i | z_{i+1})`: from the finer grid to latents, which a quantizer reads."""

import math

import torch
from torch import Tensor, nn

from ..configuration.level import ProgressiveVAELevelConfig
from .layers import Downsample, LayerNorm2d, add_dither, residual_blocks


class Encoder(nn.Module):
    """The finer grid -> latents (B, D, H_i, W_i)."""

    def __init__(self, config: ProgressiveVAELevelConfig):
        super().__init__()
        self.dither = config.dither
        width = config.encoder_hidden_size or config.hidden_size
        blocks = config.encoder_num_layers, config.block_kernel_size
        if config.is_finest:
            self.embed, embed_dim = None, config.value_channels
        else:
            self.embed = nn.Embedding(config.num_values, config.value_embed_dim)
            embed_dim = config.value_embed_dim
        # An image is halved at once, as full resolution costs most and says least. Symbols are
        # few and each says much: they are looked at before the first halving.
        layers: list[nn.Module] = [] if config.is_finest else [
            nn.Conv2d(embed_dim, width, 3, padding=1),
            residual_blocks(width, *blocks),
        ]  # fmt: skip
        for step in range(int(math.log2(config.downsample))):
            layers += [
                Downsample(embed_dim if config.is_finest and step == 0 else width, width),
                residual_blocks(width, *blocks),
            ]
        self.layers = nn.Sequential(*layers)
        self.out = nn.Sequential(LayerNorm2d(width), nn.Conv2d(width, config.codebook_dim, 1))

    @torch.no_grad()
    def embed_like(self, codebook: Tensor, generator: torch.Generator):
        """Symbols whose vectors in the finer level's codebook (V, D) are near start near."""
        assert self.embed is not None
        vectors = codebook.float() - codebook.float().mean(0)
        vectors = vectors / vectors.square().mean().sqrt().clamp(min=1e-6)
        turn = torch.randn(
            vectors.shape[1],
            self.embed.embedding_dim,
            generator=generator,
            dtype=torch.float32,
            device=generator.device,
        )
        spread = vectors @ turn.to(vectors) * vectors.shape[1] ** -0.5
        self.embed.weight.copy_(spread)

    def forward(self, finer: Tensor) -> Tensor:
        """Pixels (B, C, H, W) in [−1, 1], or symbols int64 (B, H, W)."""
        if self.embed is not None:
            x = self.embed(finer).movedim(-1, 1)
        else:  # pixels stay float32 outside: 16-bit floats do not hold the 256 values
            x = finer.to(self.out[1].weight.dtype)
        latents = self.out(self.layers(x.contiguous(memory_format=torch.channels_last)))
        return add_dither(latents, self.dither)


def make_encoder(config: ProgressiveVAELevelConfig) -> Encoder:
    return Encoder(config)
