"""All outcomes of a grid, and the frequencies of samples."""

import torch


def all_grids(num_values: int, height: int, width: int) -> torch.Tensor:
    """Every grid, int64 (V^(H·W), H, W)."""
    positions = [torch.arange(num_values)] * (height * width)
    return torch.cartesian_prod(*positions).reshape(-1, height, width)


def total_variation(log_prob: torch.Tensor, grids: torch.Tensor, samples: torch.Tensor) -> float:
    """Between exp(log_prob) over all grids and the frequencies of samples."""
    powers = (int(grids.max()) + 1) ** torch.arange(grids[0].numel())
    frequency_table = torch.bincount((samples.flatten(1) * powers).sum(1), minlength=len(grids))
    order = (grids.flatten(1) * powers).sum(1)
    return (frequency_table[order] / len(samples) - log_prob.exp()).abs().sum().item() / 2
