"""From latents to codes, with a gradient: vector, finite scalar and Gumbel quantizers.

A quantizer knows nothing of processes but a function that gathers tensors over them.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..configuration.choices import fsq_levels
from ..configuration.level import ProgressiveVAELevelConfig
from .sampling import Generators, Sampler, uniform


class QuantizerOutput(NamedTuple):
    codes: Tensor  # int64 (B, H, W)
    quantized: Tensor  # (B, D, H, W), with the quantizer's gradient
    kl: Tensor | float = 0.0  # KL(P_Ψ ‖ U) in nats, (B,); the constant L log K is left out
    loss: Tensor | float = 0.0  # scalar, weighted: what else is to be minimized


class Quantizer(nn.Module):
    """What the kinds share. Each has a `codebook` (K, D), keeps what its training needs, and has

    - `assign(latents, generator=None)` -> `QuantizerOutput`, for latents (B, D, H, W), with the
      noise, if there is any, of the generators;
    - `encode(latents, generator=None)` -> argmax_k P_Ψ(k | latent), or with a generator a draw:
      int64 (B, H, W);
    - `init_weights()`: sets its own tensors to their start, but leaves loaded ones alone.
    """

    TRAINING_STATE: tuple[str, ...] = ()  # names of tensors that do not decide the codes
    codebook: Tensor

    def __init__(self):
        super().__init__()
        self.is_initialized = False
        self.pending: tuple[Tensor, Tensor] | None = None
        self.register_state_dict_pre_hook(_finish_step)

    def forward(self, latents: Tensor, generator: Generators = None) -> QuantizerOutput:
        """As `assign`. Where the encoder is trained, the quantizer is, too.

        A training loop that does not call `after_step` gets it from the next forward pass, with
        the latents of its own process, so that any loop trains the codebook.
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
        """Initialize from the first latents (B, D, H, W) that are trained on, where that helps."""

    def finish_step(self):
        """`after_step` for the last training forward pass, if it was not called."""
        if self.pending is not None:
            self.after_step(*self.pending, gather=lambda tensor: tensor)

    def after_step(self, latents: Tensor, codes: Tensor, gather: Callable[[Tensor], Tensor]):
        """What follows an optimization step; `gather` concatenates tensors of all processes."""
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
        """H(P_Ψ) in nats, summed over the grid, (B,): 0 where the encoder is deterministic."""
        return latents.new_zeros(len(latents), dtype=torch.float32)

    def lookup(self, codes: Tensor) -> Tensor:
        """int64 (B, H, W) -> codebook[codes] (B, D, H, W)."""
        return F.embedding(codes, self.codebook).movedim(-1, 1)

    def standardized(self, quantized: Tensor) -> Tensor:
        """Code vectors as strong decoders see them: of a length that suits networks."""
        return quantized

    def corrupt(
        self,
        codes: Tensor,
        probability: Tensor,
        num_near: int | None,
        generator: Generators = None,
    ) -> Tensor:
        """Replace each code with a probability, (B,), by another one.

        Args:
            num_near: draw it from so many nearest ones in the codebook; `None`: from all others.
        """
        size = len(self.codebook)
        if size == 1:
            return codes
        if num_near is None:
            others = (codes + 1 + _integers(codes, size - 1, generator)) % size
        else:
            distances = torch.cdist(self.codebook.float(), self.codebook.float())
            distances.fill_diagonal_(float("inf"))
            near = distances.topk(min(num_near, size - 1), largest=False).indices  # (K, n)
            others = near[codes, _integers(codes, near.shape[1], generator)]
        replaced = uniform(codes.shape, generator, codes.device) < probability[:, None, None]
        return torch.where(replaced, others, codes)

    def initialize(self, vectors: Tensor, generator: torch.Generator, weight: float | None = None):
        """Start from latents (n, D) of the data, where that helps; running statistics weigh as much
        as `weight` latents, or as all."""


class VectorQuantizer(Quantizer):
    """K code vectors of length D, moved towards the latents that choose them.

    The codebook is a running k-means of the encoder's outputs (van den Oord et al. 2017, appendix
    A.1). Buffers: `codebook` (K, D), and its running statistics `ema_counts` (K,) and `ema_sums`
    (K, D).

    Args:
        commitment_weight: β of the loss β·|latent − code|², averaged.
        decay: of the running statistics.
        restart_threshold: a code used less than this fraction of the mean use is restarted.
    """

    TRAINING_STATE = ("ema_counts", "ema_sums")

    def __init__(
        self, size: int, dim: int, commitment_weight: float, decay: float, restart_threshold: float
    ):
        super().__init__()
        self.commitment_weight, self.decay = commitment_weight, decay
        self.restart_threshold = restart_threshold
        self.ema_counts: Tensor
        self.ema_sums: Tensor
        self.register_buffer("codebook", torch.zeros(size, dim))
        self.register_buffer("ema_counts", torch.zeros(size))
        self.register_buffer("ema_sums", torch.zeros(size, dim))

    def init_weights(self):
        for buffer in self.buffers():
            init.zeros_(buffer)

    def start(self, latents: Tensor):
        """k-means on the latents (B, D, H, W), unless the codebook was initialized or loaded."""
        if self.is_initialized:
            return
        self.is_initialized = True  # looked up once, as the host waits for the device here
        if not self.codebook.any():
            vectors = latents.detach().movedim(1, -1).flatten(0, -2)
            self.initialize(vectors, torch.Generator().manual_seed(0))

    def assign(self, latents: Tensor, generator: Generators = None) -> QuantizerOutput:
        """The nearest code, with the straight-through gradient."""
        codes = self.encode(latents)
        quantized = self.lookup(codes).to(latents.dtype)
        loss = self.commitment_weight * F.mse_loss(latents.float(), quantized.detach().float())
        quantized = latents + (quantized - latents).detach()
        return QuantizerOutput(codes, quantized, loss=loss)

    def encode(self, latents: Tensor, generator: Generators = None) -> Tensor:
        """(B, D, H, W) -> int64 (B, H, W): argmin_k |latent − codebook[k]|², in fp32."""
        with torch.autocast(latents.device.type, enabled=False):
            vectors = latents.detach().movedim(1, -1).float()  # (B, H, W, D)
            codebook = self.codebook.float()
            # |latent|² is the same for every k; twice the negative of the rest is maximal.
            return (vectors @ codebook.T - codebook.square().sum(1) / 2).argmax(-1)

    @torch.no_grad()
    def statistics(self, latents: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Counts (K,) and sums (K, D) of the latents (B, D, H, W) by their codes, in fp32."""
        vectors = latents.detach().movedim(1, -1).flatten(0, -2).float()
        codes = codes.flatten()
        sums = torch.zeros_like(self.codebook, dtype=torch.float32).index_add_(0, codes, vectors)
        return torch.bincount(codes, minlength=len(self.codebook)).float(), sums

    @torch.no_grad()
    def update(self, counts: Tensor, sums: Tensor, decay: float | None = None):
        """One step of k-means: codebook = running sums / running counts."""
        decay = self.decay if decay is None else decay
        self.ema_counts.lerp_(counts.to(self.ema_counts), 1 - decay)
        self.ema_sums.lerp_(sums.to(self.ema_sums), 1 - decay)
        used = self.ema_counts > 0
        self.codebook[used] = (self.ema_sums[used] / self.ema_counts[used, None]).to(self.codebook)

    def dead(self) -> Tensor:
        """bool (K,): codes whose running count is below a fraction of the mean count."""
        return self.ema_counts < self.restart_threshold * self.ema_counts.mean()

    @torch.no_grad()
    def restart(self, dead: Tensor, candidates: Tensor):
        """Put each dead code on a candidate (≥ 1, D), its statistics on one mean-used code.

        Without resetting the statistics the next update would undo the move.
        """
        if dead.any():
            rows = torch.arange(int(dead.sum()), device=candidates.device) % len(candidates)
            count = self.ema_counts[~dead].mean() if (~dead).any() else self.ema_counts.new_ones(())
            self.codebook[dead] = candidates[rows].to(self.codebook)
            self.ema_counts[dead] = count
            self.ema_sums[dead] = candidates[rows].to(self.ema_sums) * count

    @torch.no_grad()
    def initialize(
        self,
        vectors: Tensor,
        generator: torch.Generator,
        weight: float | None = None,
        num_iterations: int = 10,
    ):
        """k-means on vectors (n, D): the update with decay 0, empty clusters restarted."""
        self.is_initialized, vectors = True, vectors.float()
        order = torch.randperm(len(vectors), generator=generator, device=generator.device).to(
            vectors.device
        )
        size = len(self.codebook)
        self.codebook.copy_(vectors[order[torch.arange(size, device=order.device) % len(vectors)]])
        latents = vectors[:, :, None, None]
        for iteration in range(num_iterations):
            self.update(*self.statistics(latents, self.encode(latents)), decay=0.0)
            shuffled = vectors[order.roll(-size * (iteration + 1))]
            self.restart(self.ema_counts == 0, shuffled)
        if weight is not None:
            share = weight / self.ema_counts.sum()
            self.ema_counts.mul_(share)
            self.ema_sums.mul_(share)

    @torch.no_grad()
    def update_from(self, latents: Tensor, codes: Tensor, gather: Callable[[Tensor], Tensor]):
        """Move the codebook by the latents of all processes, and restart its dead codes."""
        counts, sums = self.statistics(latents, codes)
        self.update(gather(counts[None]).sum(0), gather(sums[None]).sum(0))
        dead = self.dead()  # the same on every process
        if dead.any():
            vectors = gather(latents.detach().movedim(1, -1).flatten(0, -2).float())
            # Spread over the whole batch, starting at a place that every process agrees on.
            step = max(1, len(vectors) // int(dead.sum()))
            start = int(dead.nonzero()[0]) % step
            self.restart(dead, vectors[start::step])


class FiniteScalarQuantizer(Quantizer):
    """Each of the D latents is squashed and rounded to one of a few values (Mentzer et al. 2023).

    There is nothing to learn or to collapse: the codebook is the product grid in [−1, 1]^D. Here
    all values of a scalar have intervals of one length in sigmoid(latent).

    Args:
        levels: the number of values of each scalar; K is their product.
    """

    def __init__(self, levels: list[int]):
        super().__init__()
        self.levels = levels
        self.register_buffer("codebook", self.product_grid())

    def product_grid(self) -> Tensor:
        axes = [
            torch.linspace(-1, 1, n, dtype=torch.float32) if n > 1 else torch.zeros(1).float()
            for n in self.levels
        ]
        grid = torch.cartesian_prod(*axes).view(-1, len(axes))
        return grid.to(torch.get_default_dtype())  # as the weights of other modules

    def init_weights(self):
        init.copy_(self.codebook, self.product_grid())

    def assign(self, latents: Tensor, generator: Generators = None) -> QuantizerOutput:
        codes = self.encode(latents)
        squashed = 2 * latents.sigmoid() - 1
        quantized = self.lookup(codes).to(latents.dtype)
        return QuantizerOutput(codes, squashed + (quantized - squashed).detach())

    def encode(self, latents: Tensor, generator: Generators = None) -> Tensor:
        codes = torch.zeros_like(latents[:, 0], dtype=torch.long)
        for scalar, n in zip(latents.detach().float().unbind(1), self.levels, strict=True):
            codes = codes * n + (scalar.sigmoid() * n).long().clamp(max=n - 1)
        return codes


class GumbelQuantizer(Quantizer):
    """A categorical `P_Ψ(k | latent) = softmax(logits)`, learned through the Gumbel-softmax.

    The forward pass sees a true draw, the gradient that of its relaxation at `temperature`, which
    anneals (Jang et al. 2017). Its KL(P_Ψ ‖ U) = Σ_k p_k log(K p_k) is in nats.

    Args:
        temperatures: at the start and at the end.
        decay: by how much the temperature is multiplied after each step.
    """

    TRAINING_STATE = ("temperature",)

    def __init__(self, size: int, dim: int, temperatures: Sequence[float], decay: float):
        super().__init__()
        self.first_temperature, self.final_temperature = temperatures
        self.decay = decay
        self.logits = nn.Linear(dim, size)
        self.codebook = nn.Parameter(torch.randn(size, dim))
        self.temperature: Tensor
        self.register_buffer("temperature", torch.tensor(float(self.first_temperature)))

    def init_weights(self):
        init.normal_(self.codebook)
        init.constant_(self.temperature, self.first_temperature)

    def assign(self, latents: Tensor, generator: Generators = None) -> QuantizerOutput:
        log_probs = self.log_probs(latents)
        noise = uniform(log_probs.shape, generator, log_probs.device)
        gumbel = -(-noise.clamp(min=1e-20).log()).log()
        soft = ((log_probs + gumbel) / self.temperature).softmax(-1)
        codes = soft.argmax(-1)
        hard = F.one_hot(codes, len(self.codebook)) + soft - soft.detach()
        quantized = (hard @ self.codebook.float()).movedim(-1, 1)
        kl = math.log(len(self.codebook)) * codes[0].numel() - _entropy(log_probs)
        return QuantizerOutput(codes, quantized.to(latents.dtype), kl)

    def encode(self, latents: Tensor, generator: Generators = None) -> Tensor:
        temperature = 0.0 if generator is None else 1.0
        return Sampler(len(latents), generator, temperature=temperature)(self.log_probs(latents))

    def entropy(self, latents: Tensor) -> Tensor:
        return _entropy(self.log_probs(latents))

    def log_probs(self, latents: Tensor) -> Tensor:
        """log P_Ψ(k | latent), fp32 (B, H, W, K)."""
        with torch.autocast(latents.device.type, enabled=False):
            vectors, weight = latents.movedim(1, -1).float(), self.logits.weight.float()
            return F.linear(vectors, weight, self.logits.bias.float()).log_softmax(-1)

    @torch.no_grad()
    def update_from(self, latents: Tensor, codes: Tensor, gather: Callable[[Tensor], Tensor]):
        self.temperature.mul_(self.decay).clamp_(min=self.final_temperature)


def _finish_step(quantizer: Quantizer, prefix: str, keep_vars: bool):
    """Before a state dict is taken: what is saved includes the last step."""
    quantizer.finish_step()


def _integers(codes: Tensor, count: int, generator: Generators) -> Tensor:
    """0 … count − 1, uniform, of the shape of `codes`."""
    return (uniform(codes.shape, generator, codes.device) * count).long()


def _entropy(log_probs: Tensor) -> Tensor:
    """−Σ p log p of (B, H, W, K), summed over the grid, (B,)."""
    return -(log_probs.exp() * log_probs).sum((1, 2, 3))


def make_quantizer(config: ProgressiveVAELevelConfig) -> Quantizer:
    size, dim = config.codebook_size, config.codebook_dim
    assert dim is not None  # the config sees to it
    if config.quantizer == "fsq":
        return FiniteScalarQuantizer(fsq_levels(size))
    if config.quantizer == "gumbel":
        return GumbelQuantizer(size, dim, config.gumbel_temperature, config.gumbel_decay)
    return VectorQuantizer(
        size, dim, config.commitment_weight, config.codebook_decay, config.restart_threshold
    )
