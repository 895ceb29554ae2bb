"""Quantizers as layers: `VectorQuantizer`, `FiniteScalarQuantizer` and `GumbelQuantizer`; those of
`binary_quantizers.py`, LFQ and BSQ, are for large codebooks.

    quantizer = VectorQuantizer(codebook_size=512, dim=16)
    quantized, codes, loss = quantizer(latents)  # (B, 16, H, W) -> (B, 16, H, W), (B, H, W), ()
    quantizer.encode(latents), quantizer.lookup(codes)

`QUANTIZERS` maps the names in a level's config to the classes.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..arguments import as_integer
from ..configuration.level import ProgressiveVAELevelConfig
from ..configuration.quantizers import QUANTIZER_RULES
from .binary_quantizers import BinarySphericalQuantizer, LookupFreeQuantizer
from .quantizer_base import Quantizer, QuantizerOutput, to_vectors
from .sampling import Generators, Sampler, uniform


def straight_through(latents: Tensor, quantized: Tensor) -> Tensor:
    """`quantized`, (B, D, ...), whose gradient is passed on to the latents as it is."""
    return latents + (quantized - latents).detach()


def rotate(latents: Tensor, quantized: Tensor) -> Tensor:
    """`quantized`, (B, D, ...), as the rotated and scaled latents: the angle of a gradient to the
    vector stays (Fifty et al. 2024, "Restructuring vector quantization with the rotation trick").
    """
    x, q = latents.float(), quantized.detach().float()
    x_unit, q_unit = F.normalize(x.detach(), dim=1), F.normalize(q, dim=1)
    between = F.normalize(x_unit + q_unit, dim=1)
    # The reflection at `between` and the one at q: together the rotation of x_unit to q_unit.
    rotated = x - 2 * between * (between * x).sum(1, keepdim=True)
    rotated = rotated + 2 * q_unit * (x_unit * x).sum(1, keepdim=True)
    norms = [y.norm(dim=1, keepdim=True) for y in (q, x.detach())]
    scaled = rotated * (norms[0] / norms[1].clamp(min=1e-6))
    # Exactly the code vector, whatever the rounding.
    return (scaled + (q - scaled).detach()).to(latents.dtype)


def move(latents: Tensor, quantized: Tensor) -> Tensor:
    """`quantized`, (B, D, ...), as the latents moved by their distance to it in a fixed direction:
    the gradient has no part along the error, which moves with the latents (DiVeQ, Vali, Bäckström
    & Solin 2025, with noise of variance 0; the codebook learns from running means)."""
    error = quantized.detach().float() - latents.float()
    distance = error.norm(dim=1, keepdim=True)
    moved = latents.float() + distance * F.normalize(error.detach(), dim=1)
    return (moved + (quantized.float() - moved).detach()).to(latents.dtype)


GRADIENTS = {"straight_through": straight_through, "rotation": rotate, "diveq": move}


class VectorQuantizer(Quantizer):
    """K code vectors of length D, each a running mean of the latents assigned to it.

    The codebook is a running k-means of the encoder's outputs (VQ-VAE with EMA, van den Oord et
    al. 2017, appendix A.1). The first latents of training initialize it by k-means; codes that are
    rarely used are moved to latents of the batch. Buffers: `codebook` (K, D), and its running
    statistics `ema_counts` (K,) and `ema_sums` (K, D).

    Args:
        codebook_size: K.
        dim: D.
        commitment_weight: β of the loss β·|latent − code|², averaged.
        decay: of the running statistics.
        restart_threshold: a code used less than this fraction of the mean use is restarted.
        gradient: of the latents, one of `GRADIENTS`.
    """

    supports_dither = True
    TRAINING_STATE = ("ema_counts", "ema_sums")

    @classmethod
    def from_config(cls, config: ProgressiveVAELevelConfig) -> "VectorQuantizer":
        assert config.codebook_dim is not None  # the config sets it
        return cls(
            codebook_size=config.codebook_size,
            dim=config.codebook_dim,
            commitment_weight=config.commitment_weight,
            decay=config.codebook_decay,
            restart_threshold=config.restart_threshold,
            gradient=config.quantizer_gradient,
        )

    @classmethod
    def validate(cls, config: ProgressiveVAELevelConfig):
        if not config.codebook_decay < 1:
            raise ValueError(f"expected codebook_decay < 1, got {config.codebook_decay}")
        if config.quantizer_gradient not in GRADIENTS:
            raise ValueError(
                f"expected quantizer_gradient in {tuple(GRADIENTS)}, got "
                f"{config.quantizer_gradient!r}"
            )

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        restart_threshold: float = 0.03,
        gradient: str = "straight_through",
    ):
        super().__init__()
        size = as_integer("codebook_size", codebook_size, 1)
        dim = as_integer("dim", dim, 1)
        self.commitment_weight = commitment_weight
        self.decay = decay
        self.restart_threshold = restart_threshold
        self.pass_gradient = GRADIENTS[gradient]
        self.ema_counts: Tensor
        self.ema_sums: Tensor
        self.register_buffer("codebook", torch.zeros(size, dim))
        self.register_buffer("ema_counts", torch.zeros(size))
        self.register_buffer("ema_sums", torch.zeros(size, dim))

    def init_weights(self):
        for buffer in self.buffers():
            init.zeros_(buffer)

    def start(self, latents: Tensor):
        """k-means on the latents (B, D, ...), unless the codebook was initialized or loaded.

        A compiled graph does not run it: there, restarts of unused codes initialize the codebook.
        """
        if self.is_initialized or torch.compiler.is_compiling():
            return
        self.is_initialized = True  # checked once: the host waits for the device here
        if not self.codebook.any():
            vectors = to_vectors(latents.detach(), self.codebook.shape[1]).flatten(0, -2)
            self.initialize(vectors, torch.Generator().manual_seed(0))

    def assign(
        self, latents: Tensor, generator: Generators = None, num_values: int | None = None
    ) -> QuantizerOutput:
        """The nearest code, with the gradient of the config.

        The loss is the commitment; the KL of one code to the uniform prior is a constant.
        """
        codes = self.encode(latents)
        quantized = self.lookup(codes).to(latents.dtype)
        loss = self.commitment_weight * F.mse_loss(latents.float(), quantized.detach().float())
        return QuantizerOutput(self.pass_gradient(latents, quantized), codes, loss)

    def encode(self, latents: Tensor, generator: Generators = None) -> Tensor:
        """(B, D, ...) -> int64 (B, ...): argmin_k |latent − codebook[k]|², in fp32."""
        with torch.autocast(latents.device.type, enabled=False):
            codebook = self.codebook.float()
            vectors = to_vectors(latents.detach(), codebook.shape[1])  # (B, ..., D)
            # |latent|² is the same for every k; twice the negative of the rest is maximal.
            return (vectors @ codebook.T - codebook.square().sum(1) / 2).argmax(-1)

    @torch.no_grad()
    def statistics(self, latents: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Counts (K,) and sums (K, D) of the latents (B, D, ...) by their codes, in fp32."""
        sums = self._counts_and_sums(latents, codes)
        return sums[:, 0], sums[:, 1:]

    def _counts_and_sums(self, latents: Tensor, codes: Tensor) -> Tensor:
        """`statistics` in one tensor, (K, 1 + D)."""
        vectors = F.pad(_as_rows(latents), (1, 0), value=1.0)  # a column of ones counts
        sums = vectors.new_zeros(len(self.codebook), vectors.shape[1])
        return sums.index_add_(0, codes.flatten(), vectors)

    @torch.no_grad()
    def update(self, counts: Tensor, sums: Tensor, decay: float | None = None):
        """One step of k-means: codebook = running sums / running counts."""
        decay = self.decay if decay is None else decay
        self.ema_counts.lerp_(counts.to(self.ema_counts), 1 - decay)
        self.ema_sums.lerp_(sums.to(self.ema_sums), 1 - decay)
        used = self.ema_counts > 0
        means = (self.ema_sums / self.ema_counts[:, None]).to(self.codebook)
        self.codebook.copy_(torch.where(used[:, None], means, self.codebook))

    def dead(self) -> Tensor:
        """bool (K,): codes whose running count is below a fraction of the mean count."""
        return self.ema_counts < self.restart_threshold * self.ema_counts.mean()

    @torch.no_grad()
    def restart(self, dead: Tensor, replacements: Tensor):
        """Move the dead codes to their replacements, with the mean count of the other codes.

        Args:
            dead: bool (K,).
            replacements: (K, D), whose rows of dead codes are used.

        Unless the statistics are reset, the next update undoes the move. The host does not wait to
        know whether any code is dead.
        """
        alive = ~dead
        mean_count = (self.ema_counts * alive).sum() / alive.sum()
        count = torch.where(alive.any(), mean_count, torch.ones_like(mean_count))
        sums = replacements.to(self.ema_sums) * count
        vectors = replacements.to(self.codebook)
        self.codebook.copy_(torch.where(dead[:, None], vectors, self.codebook))
        self.ema_counts.copy_(torch.where(dead, count, self.ema_counts))
        self.ema_sums.copy_(torch.where(dead[:, None], sums, self.ema_sums))

    @torch.no_grad()
    def initialize(
        self,
        vectors: Tensor,
        generator: torch.Generator,
        weight: float | None = None,
        num_iterations: int = 10,
    ):
        """k-means on vectors (n, D): the update with decay 0, empty clusters restarted."""
        self.is_initialized = True
        vectors = vectors.float()
        order = torch.randperm(len(vectors), generator=generator, device=generator.device).to(
            vectors.device
        )
        size = len(self.codebook)
        self.codebook.copy_(vectors[order[torch.arange(size, device=order.device) % len(vectors)]])
        for iteration in range(num_iterations):
            self.update(*self.statistics(vectors, self.encode(vectors)), decay=0.0)
            shuffled = vectors[order.roll(-size * (iteration + 1))]
            empty = self.ema_counts == 0
            self.restart(empty, shuffled[_rank(empty) % len(shuffled)])
        if weight is not None:
            share = weight / self.ema_counts.sum()
            self.ema_counts.mul_(share)
            self.ema_sums.mul_(share)

    @torch.no_grad()
    def update_from(self, latents: Tensor, codes: Tensor, gather: Callable[[Tensor], Tensor]):
        """Update the codebook from the latents of all processes, and restart its dead codes.

        A process sends K sums and K latents, however many latents it has: the host does not know
        how many codes are dead.
        """
        joined = gather(self._counts_and_sums(latents, codes)[None])  # (processes, K, 1 + D)
        sums = joined.sum(0)
        self.update(sums[:, 0], sums[:, 1:])
        dead = self.dead()
        # Replacements are spread over the latents of all processes.
        vectors = _as_rows(latents)
        num_vectors = len(joined) * len(vectors)
        step = (num_vectors // dead.sum().clamp(min=1)).clamp(min=1)
        start = dead.int().argmax() % step
        num_replacements = 1 + (num_vectors - 1 - start) // step
        rows = start + step * (_rank(dead) % num_replacements)  # (K,)
        sent = gather(vectors[rows % len(vectors)][None])  # (processes, K, D)
        process = (rows // len(vectors))[:, None].expand_as(sent[0])
        self.restart(dead, sent.gather(0, process[None])[0])


def _as_rows(latents: Tensor) -> Tensor:
    """(B, D, ...) -> (n, D) in fp32."""
    return latents.detach().movedim(1, -1).flatten(0, -2).float()


def _rank(mask: Tensor) -> Tensor:
    """The number of true entries before each true one, int64 (n,)."""
    return (mask.cumsum(0) - 1).clamp(min=0)


class FiniteScalarQuantizer(Quantizer):
    """FSQ: each of the D latents is squashed and rounded to a few values (Mentzer et al. 2023).

    The codebook is fixed, the product grid in [−1, 1]^D, and cannot collapse. All values of a
    scalar have intervals of one length in sigmoid(latent).

    Args:
        levels: the number of values of each of the D scalars, such as [8, 5, 5, 5]; K is their
            product.
    """

    @classmethod
    def from_config(cls, config: ProgressiveVAELevelConfig) -> "FiniteScalarQuantizer":
        return cls(fsq_levels(config.codebook_size))

    @classmethod
    def default_codebook_dim(cls, config: ProgressiveVAELevelConfig) -> int:
        return len(fsq_levels(config.codebook_size))

    @classmethod
    def validate(cls, config: ProgressiveVAELevelConfig):
        levels = fsq_levels(config.codebook_size)
        if config.codebook_dim != len(levels):
            raise ValueError(
                f"expected codebook_dim={len(levels)}, the number of scalars {levels} of "
                f"quantizer='fsq', got {config.codebook_dim}"
            )

    def __init__(self, levels: Sequence[int]):
        super().__init__()
        self.levels = [as_integer("levels", n, 1) for n in levels]
        self.register_buffer("codebook", self.product_grid())

    def product_grid(self) -> Tensor:
        axes = [
            torch.linspace(-1, 1, n, dtype=torch.float32) if n > 1 else torch.zeros(1).float()
            for n in self.levels
        ]
        grid = torch.cartesian_prod(*axes).view(-1, len(axes))
        return grid.to(torch.get_default_dtype())  # the dtype of the weights of other modules

    def init_weights(self):
        init.copy_(self.codebook, self.product_grid())

    def assign(
        self, latents: Tensor, generator: Generators = None, num_values: int | None = None
    ) -> QuantizerOutput:
        codes = self.encode(latents)
        squashed = 2 * latents.sigmoid() - 1
        quantized = self.lookup(codes).to(latents.dtype)
        quantized = squashed + (quantized - squashed).detach()
        return QuantizerOutput(quantized, codes, loss=latents.new_zeros((), dtype=torch.float32))

    def encode(self, latents: Tensor, generator: Generators = None) -> Tensor:
        vectors = to_vectors(latents.detach(), len(self.levels))  # (B, ..., D)
        codes = torch.zeros_like(vectors[..., 0], dtype=torch.long)
        for scalar, n in zip(vectors.unbind(-1), self.levels, strict=True):
            codes = codes * n + (scalar.sigmoid() * n).long().clamp(max=n - 1)
        return codes


class GumbelQuantizer(Quantizer):
    """A categorical `P_Ψ(k | latent) = softmax(logits)`, learned through the Gumbel-softmax.

    The forward pass uses a sample, the gradient its relaxation at `temperature`, which anneals
    (Jang et al. 2017, straight-through). The loss is KL(P_Ψ ‖ U) = Σ_k p_k log(K p_k) in nats, a
    mean over all codes unless `num_values` is passed.

    Args:
        codebook_size: K.
        dim: D, of latents and of code vectors.
        temperature: at the start and at the end.
        temperature_decay: factor of the temperature after each step.
    """

    is_stochastic = True
    TRAINING_STATE = ("temperature",)

    @classmethod
    def from_config(cls, config: ProgressiveVAELevelConfig) -> "GumbelQuantizer":
        assert config.codebook_dim is not None  # the config sets it
        return cls(
            codebook_size=config.codebook_size,
            dim=config.codebook_dim,
            temperature=config.gumbel_temperature,
            temperature_decay=config.gumbel_temperature_decay,
        )

    @classmethod
    def validate(cls, config: ProgressiveVAELevelConfig):
        temperature = config.gumbel_temperature
        if len(temperature) != 2 or not temperature[0] >= temperature[1] > 0:
            raise ValueError(
                f"expected gumbel_temperature [start, end] with start >= end > 0, got {temperature}"
            )
        decay = config.gumbel_temperature_decay
        if not 0 < decay <= 1:
            raise ValueError(f"expected gumbel_temperature_decay in (0, 1], got {decay}")

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        temperature: Sequence[float] = (1.0, 0.5),
        temperature_decay: float = 0.999,
    ):
        super().__init__()
        size = as_integer("codebook_size", codebook_size, 1)
        dim = as_integer("dim", dim, 1)
        self.first_temperature, self.final_temperature = temperature
        self.temperature_decay = temperature_decay
        self.logits = nn.Linear(dim, size)
        self.codebook = nn.Parameter(torch.randn(size, dim))
        self.temperature: Tensor
        self.register_buffer("temperature", torch.tensor(float(self.first_temperature)))

    def init_weights(self):
        init.normal_(self.codebook)
        init.constant_(self.temperature, self.first_temperature)

    def assign(
        self, latents: Tensor, generator: Generators = None, num_values: int | None = None
    ) -> QuantizerOutput:
        log_probs = self.log_probs(latents)
        noise = uniform(log_probs.shape, generator, log_probs.device)
        gumbel = -(-noise.clamp(min=1e-20).log()).log()
        temperature = self.temperature.clone()  # which may change before the backward pass
        soft = ((log_probs + gumbel) / temperature).softmax(-1)
        codes = soft.argmax(-1)
        hard = F.one_hot(codes, len(self.codebook)) + soft - soft.detach()
        quantized = (hard @ self.codebook.float()).movedim(-1, 1)
        num_codes = codes[0].numel()
        kl = math.log(len(self.codebook)) * num_codes - _entropy(log_probs)  # nats, (B,)
        loss = (kl / (num_values or num_codes)).mean()
        return QuantizerOutput(quantized.to(latents.dtype), codes, loss)

    def encode(self, latents: Tensor, generator: Generators = None) -> Tensor:
        temperature = 0.0 if generator is None else 1.0
        return Sampler(len(latents), generator, temperature=temperature)(self.log_probs(latents))

    def entropy(self, latents: Tensor) -> Tensor:
        return _entropy(self.log_probs(latents))

    def log_probs(self, latents: Tensor) -> Tensor:
        """log P_Ψ(k | latent), fp32 (B, ..., K)."""
        with torch.autocast(latents.device.type, enabled=False):
            vectors = to_vectors(latents, self.codebook.shape[1])  # (B, ..., D)
            logits = F.linear(vectors, self.logits.weight.float(), self.logits.bias.float())
            return logits.log_softmax(-1)

    @torch.no_grad()
    def update_from(self, latents: Tensor, codes: Tensor, gather: Callable[[Tensor], Tensor]):
        self.temperature.mul_(self.temperature_decay).clamp_(min=self.final_temperature)


def _entropy(log_probs: Tensor) -> Tensor:
    """−Σ p log p of (B, ..., K), summed over the codes, (B,)."""
    return -(log_probs.exp() * log_probs).flatten(1).sum(1)


def fsq_levels(codebook_size: int) -> list[int]:
    """K as a product of the fewest numbers up to 8, as equal as possible: 64 -> [8, 8].

    Each is the number of values of one dimension of a finite scalar quantizer.

    Raises:
        ValueError: K has a prime factor above 7.
    """
    rest = codebook_size
    for prime in (2, 3, 5, 7):
        while rest > 1 and rest % prime == 0:
            rest //= prime
    for length in range(1, 1 + codebook_size.bit_length()) if rest == 1 else ():
        choices = itertools.combinations_with_replacement(range(1, 9), length)
        products = [c for c in choices if math.prod(c) == codebook_size]
        if products:
            return list(max(products))
    raise ValueError(
        f"expected codebook_size to be a product of numbers up to 8 for quantizer='fsq', "
        f"got {codebook_size}"
    )


# A new quantizer is a class in a file of its own and a line here. The names are hashed into
# fingerprints: do not rename them.
QUANTIZERS: dict[str, type[Quantizer]] = {
    "vq": VectorQuantizer,
    "fsq": FiniteScalarQuantizer,
    "gumbel": GumbelQuantizer,
    "lfq": LookupFreeQuantizer,
    "bsq": BinarySphericalQuantizer,
}
QUANTIZER_RULES.update(QUANTIZERS)


def make_quantizer(config: ProgressiveVAELevelConfig) -> Quantizer:
    return QUANTIZERS[config.quantizer].from_config(config)
