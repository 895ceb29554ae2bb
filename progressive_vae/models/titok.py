"""TiTok (Yu et al. 2024, "An image is worth 32 tokens for reconstruction and generation"): vision
transformers between an image and a row of T tokens, each of which encodes content of all patches.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .residual_vqgan import ResidualDecoder, depth_to_space

HEAD_WIDTH = 64


class _VisionTransformer(nn.Module):
    """Patches of an image and T latent tokens in one sequence, which begins with a class token."""

    def __init__(self, width: int, num_layers: int, num_patches: int, num_tokens: int):
        super().__init__()
        self.class_embedding = _parameter(1, width)
        self.positional_embedding = _parameter(num_patches + 1, width)
        self.latent_token_positional_embedding = _parameter(num_tokens, width)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width,
                max(1, width // HEAD_WIDTH),
                dim_feedforward=4 * width,
                dropout=0.0,
                activation="gelu",
                norm_first=True,
            )
            for _ in range(num_layers)
        )
        self.ln_post = nn.LayerNorm(width)

    def attend(self, patches: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Patches (B, P, E) and tokens (B, T, E), before and after the layers."""
        classes = self.class_embedding.expand(len(patches), -1, -1)
        x = torch.cat([classes, patches], 1) + self.positional_embedding
        x = torch.cat([x, tokens + self.latent_token_positional_embedding], 1)
        # Layers that have the batch second do not use fused operations, which round differently.
        x = self.ln_pre(x).transpose(0, 1)
        for layer in self.transformer:
            x = layer(x)
        x = x.transpose(0, 1)
        num_tokens = tokens.shape[1]
        return self.ln_post(x[:, 1:-num_tokens]), self.ln_post(x[:, -num_tokens:])


class TiTokEncoder(_VisionTransformer):
    """Pixels (B, C, S, S) in [0, 1] -> latents (B, D, 1, T).

    Args:
        fields: of a `"titok"`.
    """

    def __init__(self, fields: dict[str, Any]):
        width, patch_size = fields["encoder_width"], fields["encoder_patch_size"]
        num_patches = (fields["image_size"] // patch_size) ** 2
        super().__init__(width, fields["encoder_num_layers"], num_patches, fields["num_tokens"])
        self.is_legacy = fields["pixel_codebook_size"] is not None
        self.patch_embed = nn.Conv2d(fields["num_channels"], width, patch_size, patch_size)
        self.latent_tokens = _parameter(fields["num_tokens"], width)
        self.conv_out = nn.Conv2d(width, fields["codebook_dim"], 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embed(pixel_values).flatten(2).mT
        tokens = self.attend(patches, self.latent_tokens.expand(len(patches), -1, -1))[1]
        if self.is_legacy:  # trained with the memory of (T, E) read as (E, T)
            features = tokens.reshape(len(tokens), tokens.shape[2], -1)
        else:
            features = tokens.mT
        return self.conv_out(features[..., None]).mT


class TiTokDecoder(_VisionTransformer):
    """Code vectors (B, D, 1, T) -> pixels (B, C, S, S) in about [0, 1].

    The transformer predicts pixels of patches, or probabilities of the codes of a VQGAN
    (`pixel_codebook_size`), whose decoder takes the expected code vectors.

    Args:
        fields: of a `"titok"`.
    """

    def __init__(self, fields: dict[str, Any]):
        width, self.patch_size = fields["decoder_width"], fields["decoder_patch_size"]
        self.grid_size = fields["image_size"] // self.patch_size
        num_layers, num_tokens = fields["decoder_num_layers"], fields["num_tokens"]
        super().__init__(width, num_layers, self.grid_size**2, num_tokens)
        self.decoder_embed = nn.Linear(fields["codebook_dim"], width)
        self.mask_token = _parameter(1, 1, width)
        channels, num_codes = fields["num_channels"], fields["pixel_codebook_size"]
        self.has_codes = num_codes is not None
        if self.has_codes:
            self.ffn = nn.Sequential(
                nn.Conv2d(width, 2 * width, 1), nn.Tanh(), nn.Conv2d(2 * width, num_codes, 1)
            )
            embedding = nn.Embedding(num_codes, fields["latent_channels"])
            self.pixel_quantize = nn.ModuleDict({"embedding": embedding})
            self.pixel_decoder = ResidualDecoder({**fields, "network": "maskgit"})
        else:
            self.ffn = nn.Sequential(nn.Conv2d(width, channels * self.patch_size**2, 1))
            self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, quantized: Tensor) -> Tensor:
        tokens = self.decoder_embed(quantized.flatten(2).mT)
        patches = self.mask_token.expand(len(tokens), self.grid_size**2, -1)
        x = self.attend(patches, tokens)[0].mT.unflatten(2, (self.grid_size, self.grid_size))
        x = self.ffn(x)
        if not self.has_codes:
            return self.conv_out(depth_to_space(x, self.patch_size))
        codebook = self.pixel_quantize.get_parameter("embedding.weight")
        return self.pixel_decoder(torch.einsum("bkhw,kd->bdhw", x.softmax(1), codebook))


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * shape[-1] ** -0.5)
