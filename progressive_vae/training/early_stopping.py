"""Early stopping: a fit ends when its validations get worse, and retains its best weights."""

import math

import torch
from torch import Tensor


class EarlyStopping:
    """The weights of the lowest validation loss of a fit (Prechelt 1998).

    Args:
        patience: validations in sequence without a lower loss, after which the fit ends.
    """

    def __init__(self, patience: int):
        self.patience = patience
        self.best_step = 0
        self.lowest_loss = math.inf
        self.num_worse = 0
        self.weights: list[Tensor] = []

    def update(self, step: int, loss: float, weights: list[Tensor]) -> bool:
        """Return whether the fit ends with this validation; copy the weights if they are best."""
        self.num_worse += 1
        if loss < self.lowest_loss:
            self.best_step = step
            self.lowest_loss = loss
            self.num_worse = 0
            self.weights = [tensor.detach().clone() for tensor in weights]
        return self.num_worse >= self.patience

    @torch.no_grad()
    def restore(self, weights: list[Tensor]):
        """Copy the best weights into `weights`."""
        for tensor, best in zip(weights, self.weights, strict=True):
            tensor.copy_(best)

    def state_dict(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "patience"}

    def load_state_dict(self, state: dict):
        vars(self).update(state)
