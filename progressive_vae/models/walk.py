"""The step protocol of `walk`: the autoregressive loop calls a step function at each step.

    values = step_fn(distribution, step)

`distribution` is the predictive distribution of the step's n values, given z and all earlier
values. Sampling returns samples from it, a codec writes or reads the values, and teacher forcing
returns the values of an existing grid.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .distributions import Distribution


class WalkStep(NamedTuple):
    """One step of the autoregressive loop: a channel of a group of positions.

    Args:
        group: index of the group in the ordering, from 0.
        channel: index of the color channel, from 0; for codes always 0.
        positions: row-major indices into the grid (H, W), ascending, int64 (n,).
    """

    group: int
    channel: int
    positions: Tensor


# (distribution, step) -> the values at the step's positions, int64 (B, n).
StepFn = Callable[[Distribution, WalkStep], Tensor]


def call_step_fn(
    step_fn: StepFn, distribution: Distribution, step: WalkStep, batch_size: int
) -> Tensor:
    """The values that `step_fn` returns, int64 (B, n).

    Raises:
        ValueError: values of another shape or dtype.
    """
    values = step_fn(distribution, step)
    expected_shape = (batch_size, len(step.positions))
    if values.dtype != torch.long or values.shape != expected_shape:
        raise ValueError(
            f"expected step_fn to return int64 of shape {expected_shape}, got {values.dtype} of "
            f"shape {tuple(values.shape)}"
        )
    return values


class TeacherForcing:
    """A `StepFn` that returns the values of an existing grid and adds up their log-probabilities.

    Args:
        values: int64 (B, C, H, W).
    """

    def __init__(self, values: Tensor):
        self.values = values.flatten(2)  # (B, C, H·W)
        self.step_log_probs: list[Tensor] = []  # nats of each step's values, (B,)

    def __call__(self, distribution: Distribution, step: WalkStep) -> Tensor:
        values = self.values[:, step.channel].index_select(1, step.positions)
        self.step_log_probs.append(distribution.log_prob(values).sum(1))
        return values

    def log_prob(self) -> Tensor:
        """Nats of all values so far, (B,)."""
        return torch.stack(self.step_log_probs).sum(0)
