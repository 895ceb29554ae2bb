"""What all quantizers share: from latents to codes, with a gradient.

A quantizer does not know about processes. It gets a function that gathers tensors over them.
"""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..configuration.level import ProgressiveVAELevelConfig
from .sampling import Generators, uniform


class QuantizerOutput(NamedTuple):
    codes: Tensor  # int64 (B, H, W)
    quantized: Tensor  # (B, D, H, W), with the quantizer's gradient
    kl: Tensor | float = 0.0  # KL(P_Ψ ‖ U) in nats, (B,); the constant L log K is left out
    loss: Tensor | float = 0.0  # scalar, weighted: further terms to minimize


class Quantizer(nn.Module):
    """Base class of quantizers. A subclass has a `codebook` (K, D) and

    - `from_config(config)`, and where the defaults do not fit `default_codebook_dim`, `validate`,
      `is_stochastic` and `supports_dither`: its rules, which the config reads;
    - `assign(latents, generator=None)` -> `QuantizerOutput`, for latents (B, D, H, W); the
      generators are those of the noise, if there is any;
    - `encode(latents, generator=None)` -> argmax_k P_Ψ(k | latent), or with a generator a sample:
      int64 (B, H, W);
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

    def forward(self, latents: Tensor, generator: Generators = None) -> QuantizerOutput:
        """As `assign`. If the encoder is trained, so is the quantizer.

        If a training loop does not call `after_step`, the next forward pass does, with the latents
        of its own process. So any loop trains the codebook.
        """
        # Latents of a frozen encoder have no gradient: its codebook must not move.
        is_trained = self.training and latents.requires_grad
        if is_trained:
            self.finish_step()
            self.start(latents)
        output = self.assign(latents, generator)
        if is_trained:
            self.pending = (latents.detach(), output.codes)
        return output

    def assign(self, latents: Tensor, generator: Generators = None) -> QuantizerOutput:
        raise NotImplementedError

    def start(self, latents: Tensor):
        """Initialize from the first training latents (B, D, H, W), where that helps."""

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
        """H(P_Ψ) in nats, summed over the grid, (B,): 0 if the encoder is deterministic."""
        return latents.new_zeros(len(latents), dtype=torch.float32)

    def lookup(self, codes: Tensor) -> Tensor:
        """int64 (B, H, W) -> codebook[codes] (B, D, H, W)."""
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
        size = len(self.codebook)
        if size == 1:
            return codes
        if num_nearest is None:
            others = (codes + 1 + _random_integers(codes, size - 1, generator)) % size
        else:
            distances = torch.cdist(self.codebook.float(), self.codebook.float())
            distances.fill_diagonal_(float("inf"))
            count = min(num_nearest, size - 1)
            nearest = distances.topk(count, largest=False).indices  # (K, count)
            others = nearest[codes, _random_integers(codes, count, generator)]
        is_replaced = uniform(codes.shape, generator, codes.device) < probability[:, None, None]
        return torch.where(is_replaced, others, codes)

    def initialize(self, vectors: Tensor, generator: torch.Generator, weight: float | None = None):
        """Initialize from latents (n, D) of the data, where that helps.

        Args:
            weight: the number of latents that the running statistics count for; `None`: n.
        """


def _finish_step(quantizer: Quantizer, prefix: str, keep_vars: bool):
    """A hook of `state_dict`: the saved tensors include the last step."""
    quantizer.finish_step()


def _random_integers(codes: Tensor, count: int, generator: Generators) -> Tensor:
    """0 … count − 1, uniform, of the shape of `codes`."""
    return (uniform(codes.shape, generator, codes.device) * count).long()
