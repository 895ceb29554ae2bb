"""Muon: an optimizer whose steps are orthogonal matrices (Jordan et al. 2024)."""

import torch
from torch import Tensor, nn

from ..models.layers import ZeroLinear

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, steepest at zero (Jordan et al. 2024)


class Muon(torch.optim.AdamW):
    """Muon for matrices, AdamW for vectors and tables.

    The step of a matrix is its momentum, orthogonalized: all directions move equally far, also
    those with small gradients. The kernel of a convolution is a matrix (C_out, C_in·k²), which
    `torch.optim.Muon` does not accept. The root mean square of a matrix's step is `scale` · lr, so
    both kinds of parameters can have the same learning rate.

    Args:
        matrices: parameters of two or more dimensions.
        others: parameters for AdamW.
        momentum: decay of the mean of a matrix's gradient.
        scale: root mean square of a matrix's step, in learning rates.
        options: of AdamW.
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
            matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
            if group["momentum"] is not None and matrices:
                self._step_matrices(matrices, **group)
        super().step()
        return loss

    def _step_matrices(
        self,
        matrices: list[Tensor],
        lr: float,
        momentum: float,
        weight_decay: float,
        **adamw_options,
    ):
        for matrix in matrices:
            if not self.state[matrix]:  # AdamW expects a step in each state
                zeros = {"step": torch.zeros(()), "momentum": torch.zeros_like(matrix)}
                self.state[matrix] |= zeros
            self.state[matrix]["step"] += 1
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        means = [self.state[matrix]["momentum"] for matrix in matrices]
        torch._foreach_lerp_(means, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, means, momentum)  # Nesterov momentum
        torch._foreach_mul_(matrices, 1 - lr * weight_decay)
        by_shape: dict[torch.Size, list[int]] = {}
        for i, matrix in enumerate(matrices):
            by_shape.setdefault(matrix.flatten(1).shape, []).append(i)
            matrix.grad = None  # AdamW skips it
        # Matrices of one shape go through one batched product: single ones are small for a GPU.
        for shape, indices in by_shape.items():
            directions = orthogonal(torch.stack([updates[i].flatten(1) for i in indices]))
            step_size = lr * self.scale * max(shape) ** 0.5
            for i, direction in zip(indices, directions, strict=True):
                matrices[i].sub_(direction.view_as(matrices[i]).to(matrices[i]), alpha=step_size)


def orthogonal(matrices: Tensor, num_iterations: int = 5) -> Tensor:
    """Return approximately U Vᵀ of matrices U S Vᵀ (..., m, n).

    Newton–Schulz iterations X ← a X + (b A + c A²) X with A = X Xᵀ bring all singular values
    between 0.7 and 1.2. They run in bf16 on devices with fast bf16 products.
    """
    x = matrices.bfloat16() if has_bf16(matrices.device) else matrices.float()
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


def matrices_and_others(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the trainable weights of hidden linear and convolutional layers, and all others."""
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


def has_bf16(device: torch.device) -> bool:
    """Return whether a device multiplies matrices in bf16 at full speed.

    CPUs without wide vectors emulate bf16: a training step takes at least ten times as long as in
    fp32.
    """
    wide_vectors = ("AVX512", "AMX", "SVE")
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith(wide_vectors)
