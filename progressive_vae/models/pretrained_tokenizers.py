"""Pretrained image tokenizers as the finest level's encoder, codebook and auxiliary decoder:
networks of diffusers and transformers, unchanged and frozen.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import VQModel
from diffusers.models.autoencoders.vae import VectorQuantizer
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.func import functional_call
from transformers import JanusVQVAE, JanusVQVAEConfig

from ..configuration.level import ProgressiveVAELevelConfig
from ..configuration.tokenizer import Tokenizer, read_tokenizer
from .auxiliary_decoder import Auxiliary
from .binary_quantizers import LookupFreeQuantizer
from .dalle_dvae import dalle_decoder, dalle_encoder, logit_laplace_medians, to_logit_laplace
from .layers import ZeroConv2d
from .quantizer_base import Quantizer, QuantizerOutput
from .residual_vqgan import ResidualDecoder, residual_encoder
from .sampling import Generators
from .titok import TiTokDecoder, TiTokEncoder

PIXELS_AT_A_TIME = 2**19  # of a batch in a network of full resolution
DISTANCES_AT_A_TIME = 2**24  # between latents and code vectors
SCALES_WIDTH = 64


class _Frozen(nn.Module):
    """Always in evaluation mode, with parameters that require no gradient.

    `train()` sets that: `eval()` and `train()` are called after a model is made or loaded.
    """

    def train(self, mode: bool = True):
        self.requires_grad_(False)
        return super().train(False)


class TokenizerEncoder(_Frozen):
    """Pixels (B, C, H, W) in [−1, 1] -> latents (B, D, H_i, W_i).

    Images are padded to a multiple of `downsample` by replicating their edges.

    Args:
        see: from pixels in [−1, 1] to the input range of the network.
    """

    def __init__(self, see: Callable[[Tensor], Tensor], downsample: int, **parts: nn.Module):
        super().__init__()
        self.see, self.downsample = see, downsample
        for name, part in parts.items():
            self.add_module(name, part)
        self.eval()

    @torch.no_grad()
    def forward(self, finer: Tensor) -> Tensor:
        height, width = finer.shape[-2:]
        x = self.see(finer)
        x = F.pad(x, (0, -width % self.downsample, 0, -height % self.downsample), "replicate")
        x = x.to(next(self.parameters()).dtype)
        parts = x.split(max(1, PIXELS_AT_A_TIME // (x.shape[-2] * x.shape[-1])))
        return torch.cat([self._encode(part) for part in parts])

    def _encode(self, x: Tensor) -> Tensor:
        for part in self.children():
            x = part(x)
        return x


class TokenizerQuantizer(Quantizer, _Frozen):
    """Codes by the library's own code, with its rounding."""

    def assign(
        self, latents: Tensor, generator: Generators = None, num_values: int | None = None
    ) -> QuantizerOutput:
        codes = self.encode(latents)
        loss = latents.new_zeros((), dtype=torch.float32)
        return QuantizerOutput(self.lookup(codes).to(latents.dtype), codes, loss)

    def init_weights(self):
        """The weights are the library's, or loaded."""

    def normalize(self, quantized: Tensor) -> Tensor:
        return quantized / self.codebook.float().square().mean().sqrt().clamp(min=1e-6)

    @torch.no_grad()
    def encode(self, latents: Tensor, generator: Generators = None) -> Tensor:
        size = math.prod(latents.shape[-2:])
        parts = latents.split(max(1, DISTANCES_AT_A_TIME // (size * len(self.codebook))))
        with torch.autocast(latents.device.type, enabled=False):
            return torch.cat([self._codes(part) for part in parts])

    def _codes(self, latents: Tensor) -> Tensor:
        raise NotImplementedError


class CodebookQuantizer(TokenizerQuantizer):
    """Codes by a codebook: those of the most similar vectors.

    Args:
        quantize: a module of the library with the weight `embedding.weight`, (K, D). Its forward
            pass finds the nearest vectors.
        similarity: `"euclidean"`: the code is that of the nearest vector. `"cosine"`: of the one
            with the largest cosine. `"dot"`: with the largest dot product.
        is_normalized: whether vectors have length 1 when they are decoded.
    """

    def __init__(self, quantize: nn.Module, similarity: str, is_normalized: bool):
        super().__init__()
        self.quantize, self.similarity, self.is_normalized = quantize, similarity, is_normalized
        self.eval()

    @property
    def codebook(self) -> Tensor:  # type: ignore[override]
        weight = self.quantize.get_parameter("embedding.weight")
        return F.normalize(weight, dim=-1) if self.is_normalized else weight

    def _codes(self, latents: Tensor) -> Tensor:
        # Distances are in fp32; diffusers returns the codes last in a nested tuple.
        latents = latents.float()
        weight = self.quantize.get_parameter("embedding.weight").float()
        if self.similarity == "dot":
            return torch.einsum("bdhw,kd->bkhw", latents, weight).argmax(1)
        if self.similarity == "cosine":
            latents, weight = F.normalize(latents, dim=1), F.normalize(weight, dim=-1)
        output = functional_call(self.quantize, {"embedding.weight": weight}, latents)[-1]
        codes = output[-1] if isinstance(output, tuple) else output
        return codes.view(len(latents), *latents.shape[-2:])


class ArgmaxQuantizer(TokenizerQuantizer):
    """The quantizer of the discrete VAE: latents are logits of codes; the decoder's first
    convolution is the codebook."""

    def __init__(self, input: nn.Conv2d):
        super().__init__()
        self.input = input
        self.eval()

    @property
    def codebook(self) -> Tensor:  # type: ignore[override]
        bias = self.input.bias
        assert bias is not None  # the discrete VAE has one
        return self.input.weight[..., 0, 0].T + bias

    def _codes(self, latents: Tensor) -> Tensor:
        return latents.argmax(1)


class SignQuantizer(TokenizerQuantizer, LookupFreeQuantizer):
    """The quantizer of lookup-free tokenizers: codes are signs, and nothing is looked up.

    The first latent is the least significant bit, as in Open-MAGVIT2 and MaskBit.
    """

    normalize = Quantizer.normalize

    def __init__(self, num_bits: int):
        super().__init__(num_bits)
        self.eval()

    def encode(self, latents: Tensor, generator: Generators = None) -> Tensor:
        return LookupFreeQuantizer.encode(self, latents.flip(1))

    def lookup(self, codes: Tensor) -> Tensor:
        return super().lookup(codes).flip(1)


class TokenizerDecoder(Auxiliary):
    """Logistics around the tokenizer's image.

    Their scales are the output of a small network with the image as input. It starts with wide
    scales, and is the only trainable part.

    Args:
        show: from the output of the network to pixels in [−1, 1].
    """

    decoder: nn.Module
    post_quant_conv: nn.Module

    def __init__(
        self,
        config: ProgressiveVAELevelConfig,
        show: Callable[[Tensor], Tensor],
        is_spatial: bool = False,
        **parts: nn.Module,
    ):
        super().__init__(config)
        self.show, self.is_spatial = show, is_spatial
        for name, part in parts.items():
            self.add_module(name, part)
        values = config.value_channels * config.downsample**2
        self.scales = nn.Sequential(
            nn.PixelUnshuffle(config.downsample),
            nn.Conv2d(values, SCALES_WIDTH, 3, padding=1),
            nn.SiLU(),
            ZeroConv2d(SCALES_WIDTH, values, 1),
            nn.PixelShuffle(config.downsample),
        )
        self.train()

    def train(self, mode: bool = True):
        super().train(mode)
        for name, part in self.named_children():
            if name != "scales":
                part.requires_grad_(False).eval()
        return self

    def forward(self, quantized: Tensor, size: tuple[int, int]) -> Tensor:
        parts = quantized.split(max(1, PIXELS_AT_A_TIME // math.prod(size)))
        image = torch.cat([self.show(self._decode(part)) for part in parts])
        parameters = torch.cat([image, self.scales(image.detach())], 1)
        return parameters[..., : size[0], : size[1]].float()

    def _decode(self, quantized: Tensor) -> Tensor:
        x = quantized = quantized.to(next(self.decoder.parameters()).dtype)
        if hasattr(self, "post_quant_conv"):
            x = self.post_quant_conv(quantized)
        return self.decoder(x, quantized) if self.is_spatial else self.decoder(x)


def make_tokenizer(
    config: ProgressiveVAELevelConfig,
) -> tuple[TokenizerEncoder, TokenizerQuantizer, TokenizerDecoder]:
    """The three parts of a level whose config names a tokenizer."""
    assert config.tokenizer_config is not None
    tokenizer = read_tokenizer(config.tokenizer_config)
    try:
        return _MAKERS[tokenizer.kind](config, tokenizer)
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(
            f"expected tokenizer_config of a network of {tokenizer.kind!r}, got {error!r}"
        ) from error


def _same(x: Tensor) -> Tensor:
    return x


def _halved(x: Tensor) -> Tensor:
    """[−1, 1] -> [0, 1]."""
    return (x + 1) / 2


def _doubled(x: Tensor) -> Tensor:
    """[0, 1] -> [−1, 1]."""
    return x * 2 - 1


def _vq_model(config: ProgressiveVAELevelConfig, tokenizer: Tokenizer):
    fields = dict(tokenizer.fields)
    see, show = (_same, _same) if fields.pop("do_normalize") else (_halved, _doubled)
    is_spatial = fields["norm_type"] == "spatial"
    similarity = fields.pop("similarity")
    return _parts(config, VQModel(**fields), similarity, see, show, is_spatial=is_spatial)


def _janus_vqgan(config: ProgressiveVAELevelConfig, tokenizer: Tokenizer):
    fields = dict(tokenizer.fields)
    similarity = fields.pop("similarity")
    model = JanusVQVAE(JanusVQVAEConfig(**fields))
    return _parts(config, model, similarity, _same, _same, is_normalized=True)


def _parts(config, model, similarity, see, show, is_normalized=False, is_spatial=False):
    downsample = config.downsample
    return (
        TokenizerEncoder(see, downsample, encoder=model.encoder, quant_conv=model.quant_conv),
        CodebookQuantizer(model.quantize, similarity, is_normalized),
        TokenizerDecoder(
            config,
            show,
            is_spatial,
            post_quant_conv=model.post_quant_conv,
            decoder=model.decoder,
        ),
    )


def _dalle_dvae(config: ProgressiveVAELevelConfig, tokenizer: Tokenizer):
    fields = tokenizer.fields
    return (
        TokenizerEncoder(to_logit_laplace, config.downsample, blocks=dalle_encoder(fields)),
        ArgmaxQuantizer(nn.Conv2d(fields["vocab_size"], fields["n_init"], 1)),
        TokenizerDecoder(config, logit_laplace_medians, decoder=dalle_decoder(fields)),
    )


def _lfq_vqgan(config: ProgressiveVAELevelConfig, tokenizer: Tokenizer):
    fields = {**tokenizer.fields, "latent_channels": tokenizer.fields["num_bits"]}
    see, show = (_halved, _doubled) if fields["network"] == "maskgit" else (_same, _same)
    return (
        TokenizerEncoder(see, config.downsample, encoder=residual_encoder(fields)),
        SignQuantizer(fields["num_bits"]),
        TokenizerDecoder(config, show, decoder=ResidualDecoder(fields)),
    )


def _titok(config: ProgressiveVAELevelConfig, tokenizer: Tokenizer):
    fields = tokenizer.fields
    similarity = fields["similarity"]
    quantize = VectorQuantizer(fields["codebook_size"], fields["codebook_dim"], beta=0.25)
    return (
        TokenizerEncoder(_halved, config.downsample, encoder=TiTokEncoder(fields)),
        CodebookQuantizer(quantize, similarity, is_normalized=similarity == "cosine"),
        TokenizerDecoder(config, _doubled, decoder=TiTokDecoder(fields)),
    )


_MAKERS: dict[str, Callable] = {
    "vq_model": _vq_model,
    "janus_vqgan": _janus_vqgan,
    "dalle_dvae": _dalle_dvae,
    "lfq_vqgan": _lfq_vqgan,
    "titok": _titok,
}
