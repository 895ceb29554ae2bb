"""What all quantizers share: from latents to codes, with a gradient.

    quantized, codes, loss = VectorQuantizer(codebook_size=512, dim=16)(latents)

A quantizer is a layer for any training loop: in training mode it updates its own statistics.
"""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..configuration.level import ProgressiveVAELevelConfig
from .sampling import Generators, uniform


class QuantizerOutput(NamedTuple):
    quantized: Tensor  # (B, D, ...), with the quantizer's gradient
    codes: Tensor  # int64 (B, ...)
    loss: Tensor  # float32 scalar to add to the reconstruction loss; 0 where there are no terms


class Quantizer(nn.Module):
    """Base class of quantizers: latents (B, D, ...) to codes (B, ...), for any spatial shape.

    In training mode `forward` updates the statistics (codebook or temperature), as batch norm does.
    `eval()` freezes them. In several processes each one uses its own latents, unless the training
    loop calls `after_step`.

    A subclass takes plain arguments, has a `codebook` (K, D) and

    - `from_config(config)`, and where the defaults do not fit `default_codebook_dim`, `validate`,
      `is_stochastic` and `supports_dither`: its rules, which the config reads;
    - `assign(latents, generator, num_values)` -> `QuantizerOutput`, as `forward`;
    - `encode(latents, generator=None)` -> argmax_k P_Ψ(k | latent), or with a generator a sample:
      int64 (B, ...);
    - `init_weights()`: initializes its own tensors and leaves loaded ones alone.

    `QUANTIZERS` in `quantizers.py` maps the config's names to the classes.
    """

    is_stochastic: ClassVar[bool] = False  # whether P_Ψ is a distribution rather than one code
    supports_dither: ClassVar[bool] = False
    TRAINING_STATE: tuple[str, ...] = ()  # names of tensors that do not decide the codes
    codebook: Tensor

    def __init__(self):
        super().__init__()
        self.is_initialized = False
        self.pending: tuple[Tensor, Tensor] | None = None
        self.register_state_dict_pre_hook(_finish_step)

    @property
    def codebook_size(self) -> int:
        """K."""
        return len(self.codebook)

    @classmethod
    def from_config(cls, config: ProgressiveVAELevelConfig) -> "Quantizer":
        raise NotImplementedError

    @classmethod
    def default_codebook_dim(cls, config: ProgressiveVAELevelConfig) -> int:
        """D where the config leaves it open."""
        return 8

    @classmethod
    def validate(cls, config: ProgressiveVAELevelConfig):
        """Raise a `ValueError` if the fields that this quantizer reads are invalid."""

    def forward(
        self, latents: Tensor, generator: Generators = None, num_values: int | None = None
    ) -> QuantizerOutput:
        """Quantize latents and, in training mode, update the statistics.

        Args:
            latents: (B, D, ...), the output of an encoder.
            generator: of the noise of a stochastic quantizer.
            num_values: the number of values of an example, if the reconstruction loss is a mean
                over them: the loss then has the KL of an example in nats, divided by it. The
                default is the number of codes.

        Returns:
            quantized (B, D, ...), codes (B, ...) and the loss, a scalar. The KL of a quantizer that
            is not stochastic is the constant log K for each code, and left out.

        Raises:
            ValueError: latents of another D.
        """
        if not self.training:
            return self.assign(latents, generator, num_values)
        # `after_step` may follow, with the statistics of all processes. So the update waits for
        # the next forward pass, `eval()` or `state_dict()`, whichever comes first.
        self.finish_step()
        self.start(latents)
        output = self.assign(latents, generator, num_values)
        self.pending = (latents.detach(), output.codes)
        return output

    def assign(
        self, latents: Tensor, generator: Generators = None, num_values: int | None = None
    ) -> QuantizerOutput:
        """As `forward`, but the statistics do not change."""
        raise NotImplementedError

    def train(self, mode: bool = True):
        if not mode:
            self.finish_step()
        return super().train(mode)

    def start(self, latents: Tensor):
        """Initialize from the first training latents (B, D, ...), where that helps."""

    def finish_step(self):
        """Call `after_step` for the last training forward pass, if nobody did."""
        if self.pending is not None:
            self.after_step(*self.pending, gather=lambda tensor: tensor)

    def after_step(self, latents: Tensor, codes: Tensor, gather: Callable[[Tensor], Tensor]):
        """Update after an optimization step; `gather` concatenates tensors of all processes."""
        self.pending = None
        self.update_from(latents, codes, gather)

    def update_from(self, latents: Tensor, codes: Tensor, gather: Callable[[Tensor], Tensor]):
        """The update of `after_step`."""

    def _apply(self, fn: Callable, recurse: bool = True):
        self.pending = None  # it would stay on the device that the module leaves
        return super()._apply(fn, recurse)

    def init_weights(self):
        raise NotImplementedError

    def encode(self, latents: Tensor, generator: Generators = None) -> Tensor:
        raise NotImplementedError

    def entropy(self, latents: Tensor) -> Tensor:
        """H(P_Ψ) in nats, summed over the codes, (B,): 0 if the encoder is deterministic."""
        return latents.new_zeros(len(latents), dtype=torch.float32)

    def lookup(self, codes: Tensor) -> Tensor:
        """int64 (B, ...) -> codebook[codes] (B, D, ...)."""
        return F.embedding(codes, self.codebook).movedim(-1, 1)

    def normalize(self, quantized: Tensor) -> Tensor:
        """Code vectors as input of the decoder, scaled to a length that suits networks."""
        return quantized

    def add_noise(
        self,
        codes: Tensor,
        probability: Tensor,
        num_nearest: int | None,
        generator: Generators = None,
    ) -> Tensor:
        """Replace each code by another one, with a probability (B,) for each example.

        Args:
            num_nearest: sample the other code from so many nearest ones in the codebook; `None`:
                from all others.
        """
        size = self.codebook_size
        if size == 1:
            return codes
        if num_nearest is None:
            others = (codes + 1 + random_integers(codes, size - 1, generator)) % size
        else:
            others = self.near_codes(codes, min(num_nearest, size - 1), generator)
        probability = probability.view(-1, *[1] * (codes.ndim - 1))
        is_replaced = uniform(codes.shape, generator, codes.device) < probability
        return torch.where(is_replaced, others, codes)

    def near_codes(self, codes: Tensor, count: int, generator: Generators = None) -> Tensor:
        """For each code a random one of the `count` nearest others in the codebook."""
        distances = torch.cdist(self.codebook.float(), self.codebook.float())
        distances.fill_diagonal_(float("inf"))
        nearest = distances.topk(count, largest=False).indices  # (K, count)
        return nearest[codes, random_integers(codes, count, generator)]

    def initialize(self, vectors: Tensor, generator: torch.Generator, weight: float | None = None):
        """Initialize from latents (n, D) of the data, where that helps.

        Args:
            weight: the number of latents that the running statistics count for; `None`: n.
        """


def to_vectors(latents: Tensor, dim: int) -> Tensor:
    """(B, D, ...) -> (B, ..., D) in fp32.

    Raises:
        ValueError: D is not `dim`.
    """
    if latents.ndim < 2 or latents.shape[1] != dim:
        raise ValueError(f"expected latents of shape (B, {dim}, ...), got {tuple(latents.shape)}")
    return latents.movedim(1, -1).float()


def _finish_step(quantizer: Quantizer, prefix: str, keep_vars: bool):
    """A hook of `state_dict`: the saved tensors include the last step."""
    quantizer.finish_step()


def random_integers(codes: Tensor, count: int, generator: Generators) -> Tensor:
    """0 … count − 1, uniform, of the shape of `codes`."""
    return (uniform(codes.shape, generator, codes.device) * count).long()
