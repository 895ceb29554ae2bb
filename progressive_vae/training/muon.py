"""Muon: an optimizer whose steps are orthogonal matrices (Jordan et al. 2024)."""

import torch
from torch import Tensor, nn

from ..networks import ZeroLinear
from .speed import has_bf16

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, steepest at zero (Jordan et al. 2024)


class Muon(torch.optim.AdamW):
    """AdamW for vectors and tables; matrices follow their momentum, made orthogonal.

    So a step moves all directions of a matrix alike, those with small gradients too. The kernel of
    a convolution is a matrix (C_out, C_in·k²), which `torch.optim.Muon` does not take. Steps of
    matrices have a root mean square of `scale` · lr, so that one learning rate serves both kinds.

    Args:
        matrices: parameters of two or more dimensions.
        others: what AdamW is for; `options` are its own.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[nn.Parameter],
        momentum: float = 0.95,
        scale: float = 0.4,
        **options,
    ):
        groups: list[dict] = [
            {"params": matrices, "momentum": momentum},
            {"params": others, "momentum": None},
        ]
        super().__init__([group for group in groups if group["params"]], **options)
        self.scale = scale

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["momentum"] is None:
                continue
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:  # AdamW wants to find a step in every state
                    state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(matrix)}
                state["step"] += 1
                state["momentum"].lerp_(matrix.grad, 1 - group["momentum"])
                ahead = matrix.grad.lerp(state["momentum"], group["momentum"])  # Nesterov's
                update = orthogonal(ahead.flatten(1))
                size = group["lr"] * self.scale * max(update.shape) ** 0.5
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.sub_(update.view_as(matrix).to(matrix), alpha=size)
                matrix.grad = None  # AdamW leaves it alone
        super().step()
        return loss


def orthogonal(matrix: Tensor, num_iterations: int = 5) -> Tensor:
    """U Vᵀ of a matrix U S Vᵀ, roughly: singular values come out near 1 (between 0.7 and 1.2).

    Newton–Schulz iterations X ← a X + (b A + c A²) X with A = X Xᵀ, in bf16 where that is quick.
    """
    x = matrix.bfloat16() if has_bf16(matrix.device) else matrix.float()
    is_tall = len(x) > x.shape[1]
    x = x.T if is_tall else x
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(num_iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def matrices_and_others(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters: those of maps between hidden layers, and all else."""
    hidden = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not isinstance(module, ZeroLinear)
    }
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return (
        [parameter for parameter in parameters if id(parameter) in hidden],
        [parameter for parameter in parameters if id(parameter) not in hidden],
    )
