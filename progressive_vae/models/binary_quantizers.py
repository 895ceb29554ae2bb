"""Quantizers whose codes are the signs of the latents: for large codebooks, which nothing searches.

`LookupFreeQuantizer` is LFQ (Yu et al. 2023, "Language model beats diffusion"),
`BinarySphericalQuantizer` BSQ (Zhao et al. 2024, "Image and video tokenization with binary
spherical quantization").
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import initialization as init

from ..arguments import as_integer
from ..configuration.level import ProgressiveVAELevelConfig
from .device_constant import bit_shifts
from .quantizer_base import Quantizer, QuantizerOutput, random_integers, to_vectors
from .sampling import Generators

ENTROPY_TEMPERATURE = 0.01  # of the soft bits in the entropies, as in both papers


class LookupFreeQuantizer(Quantizer):
    """LFQ: code vectors are the K = 2^D corners of the cube [−1, 1]^D, and have no parameters.

    The first of the D latents is the most significant bit of a code. The loss is

        commitment_weight · mean (x − code)² + entropy_weight · (E[H(p)] − H(E[p]))

    with the probabilities p = σ(4·x·s / 0.01) that the bits of a latent x are 1, s the length of a
    code in each dimension. Bits shall be certain, and 1 as often as 0. The entropies are sums over
    bits, so their memory is O(log K).

    Args:
        num_bits: D.
        commitment_weight: of the squared distance of latents and their codes.
        entropy_weight: of the entropies, in nats.
    """

    @classmethod
    def from_config(cls, config: ProgressiveVAELevelConfig) -> "LookupFreeQuantizer":
        return cls(
            num_bits=_num_bits(config),
            commitment_weight=config.commitment_weight,
            entropy_weight=config.entropy_weight,
        )

    @classmethod
    def default_codebook_dim(cls, config: ProgressiveVAELevelConfig) -> int:
        return _num_bits(config)

    @classmethod
    def validate(cls, config: ProgressiveVAELevelConfig):
        if config.codebook_dim != _num_bits(config):
            raise ValueError(
                f"expected codebook_dim={_num_bits(config)}, the number of bits of a code, for "
                f"quantizer={config.quantizer!r}, got {config.codebook_dim}"
            )

    def __init__(self, num_bits: int, commitment_weight: float = 0.25, entropy_weight: float = 0.1):
        super().__init__()
        self.num_bits = as_integer("num_bits", num_bits, 1)
        self.commitment_weight = commitment_weight
        self.entropy_weight = entropy_weight
        self.scale: Tensor  # s
        self.register_buffer("scale", torch.tensor(self._initial_scale()))

    def _initial_scale(self) -> float:
        return 1.0

    def init_weights(self):
        init.constant_(self.scale, self._initial_scale())

    @property
    def codebook_size(self) -> int:
        return 2**self.num_bits

    @property
    def codebook(self) -> Tensor:  # type: ignore[override]
        """All code vectors, (K, D)."""
        return self.lookup(torch.arange(2**self.num_bits, device=self.scale.device))

    def assign(
        self, latents: Tensor, generator: Generators = None, num_values: int | None = None
    ) -> QuantizerOutput:
        codes = self.encode(latents)
        quantized = self.lookup(codes).to(latents.dtype)
        x = self.project(latents)
        loss = self.commitment_weight * F.mse_loss(x.float(), quantized.float())
        loss = loss + self.entropy_weight * self._entropy_difference(x)
        return QuantizerOutput(x + (quantized - x).detach(), codes, loss)

    def project(self, latents: Tensor) -> Tensor:
        """Latents (B, D, ...) on the set that the code vectors belong to."""
        return latents

    def _entropy_difference(self, x: Tensor) -> Tensor:
        """E[H(p)] − H(E[p]) in nats, a scalar: at least −D·log 2."""
        logits = (4 / ENTROPY_TEMPERATURE) * to_vectors(x, self.num_bits) * self.scale.float()
        # H(p) = softplus(l) − l·σ(l); a single code has no bits that could be used equally often.
        entropy = F.softplus(logits) - logits * logits.sigmoid()
        # Logarithms of means are finite where all codes agree on a bit, and so are their gradients.
        logits = logits.flatten(0, -2)
        log_one = F.logsigmoid(logits).logsumexp(0) - math.log(len(logits))
        log_zero = F.logsigmoid(-logits).logsumexp(0) - math.log(len(logits))
        entropy_of_mean = -log_one.exp() * log_one - log_zero.exp() * log_zero
        return entropy.sum(-1).mean() - entropy_of_mean.sum()

    def encode(self, latents: Tensor, generator: Generators = None) -> Tensor:
        is_one = to_vectors(latents.detach(), self.num_bits) > 0
        return (is_one.long() << bit_shifts(self.num_bits, is_one.device)).sum(-1)

    def lookup(self, codes: Tensor) -> Tensor:
        bits = (codes[..., None] >> bit_shifts(self.num_bits, codes.device)) & 1
        vectors = (2 * bits - 1) * self.scale
        return vectors.movedim(-1, 1) if codes.ndim > 1 else vectors

    def near_codes(self, codes: Tensor, count: int, generator: Generators = None) -> Tensor:
        """Codes with another value of one bit: all D are equally near, whatever `count`."""
        return codes ^ (1 << random_integers(codes, self.num_bits, generator))


class BinarySphericalQuantizer(LookupFreeQuantizer):
    """BSQ: latents are projected on the unit sphere, code vectors are the corners of a cube in it.

    The squared distance of a latent and its code is bounded, by 2 − 2/√D. Loss and arguments are
    those of `LookupFreeQuantizer`, with s = 1/√D.
    """

    def _initial_scale(self) -> float:
        return self.num_bits**-0.5

    def project(self, latents: Tensor) -> Tensor:
        return F.normalize(latents, dim=1)

    def normalize(self, quantized: Tensor) -> Tensor:
        return quantized * self.num_bits**0.5


def _num_bits(config: Any) -> int:
    """log2 K.

    Raises:
        ValueError: K is not 2, 4, 8 …
    """
    size = config.codebook_size
    if size < 2 or size & (size - 1):
        raise ValueError(
            f"expected codebook_size to be a power of two for quantizer={config.quantizer!r}, "
            f"got {size}"
        )
    return size.bit_length() - 1
