"""The nearest code, its straight-through gradient, and the codebook's update.

The codebook is a running k-means of the encoder's outputs (van den Oord et al. 2017, appendix
A.1). The quantizer knows nothing of processes: it takes statistics that are already summed.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def check_codes(
    codes: Tensor, codebook_size: int, size: tuple[int, ...] | None = None, name: str = "codes"
):
    """Raise a `ValueError` unless codes are int64 (B, H, W) in 0 … K − 1 (of the given H and W)."""
    expected = "(B, H, W)" if size is None else f"(B, {size[0]}, {size[1]})"
    if codes.ndim != 3 or not codes.numel() or (size and tuple(codes.shape[1:]) != tuple(size)):
        raise ValueError(f"expected {name} of shape {expected}, got {tuple(codes.shape)}")
    if codes.dtype != torch.long:
        raise ValueError(f"expected {name} of dtype torch.int64, got {codes.dtype}")
    lowest, highest = int(codes.min()), int(codes.max())
    if lowest < 0 or highest >= codebook_size:
        raise ValueError(
            f"expected {name} in 0 … {codebook_size - 1}, got values in {lowest} … {highest}"
        )


class QuantizerOutput(NamedTuple):
    codes: Tensor  # int64 (B, H, W)
    quantized: Tensor  # (B, D, H, W), with the straight-through gradient
    commitment_loss: Tensor  # scalar, mean squared distance to the chosen code


class VectorQuantizer(nn.Module):
    """K code vectors of length D, moved towards the latents that choose them.

    Buffers: `codebook` (K, D), and its running statistics `ema_counts` (K,) and `ema_sums` (K, D).
    """

    def __init__(
        self, codebook_size: int, codebook_dim: int, decay: float, restart_threshold: float
    ):
        super().__init__()
        self.decay, self.restart_threshold = decay, restart_threshold
        self.codebook: Tensor
        self.ema_counts: Tensor
        self.ema_sums: Tensor
        self.register_buffer("codebook", torch.zeros(codebook_size, codebook_dim))
        self.register_buffer("ema_counts", torch.zeros(codebook_size))
        self.register_buffer("ema_sums", torch.zeros(codebook_size, codebook_dim))

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """latents: (B, D, H, W)."""
        codes = self.nearest(latents)
        quantized = self.lookup(codes).to(latents.dtype)
        commitment_loss = F.mse_loss(latents.float(), quantized.detach().float())
        return QuantizerOutput(codes, latents + (quantized - latents).detach(), commitment_loss)

    def nearest(self, latents: Tensor) -> Tensor:
        """(B, D, H, W) -> int64 (B, H, W): argmin_k |latent − codebook[k]|², in fp32."""
        with torch.autocast(latents.device.type, enabled=False):
            vectors = latents.detach().movedim(1, -1).float()  # (B, H, W, D)
            codebook = self.codebook.float()
            # |latent|² is the same for every k; twice the negative of the rest is maximal.
            return (vectors @ codebook.T - codebook.square().sum(1) / 2).argmax(-1)

    def lookup(self, codes: Tensor) -> Tensor:
        """int64 (B, H, W) -> (B, D, H, W)."""
        return F.embedding(codes, self.codebook).movedim(-1, 1)

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
    def initialize(self, vectors: Tensor, generator: torch.Generator, num_iterations: int = 10):
        """k-means on vectors (n, D): the update with decay 0, empty clusters restarted."""
        vectors = vectors.float()
        order = torch.randperm(len(vectors), generator=generator).to(vectors.device)
        size = len(self.codebook)
        self.codebook.copy_(vectors[order[torch.arange(size) % len(vectors)]])
        latents = vectors[:, :, None, None]
        for iteration in range(num_iterations):
            self.update(*self.statistics(latents, self.nearest(latents)), decay=0.0)
            shuffled = vectors[order.roll(-size * (iteration + 1))]
            self.restart(self.ema_counts == 0, shuffled)
