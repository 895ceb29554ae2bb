"""Muon: an optimizer whose steps are orthogonal matrices (Jordan et al. 2024)."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from ..models.layers import ZeroLinear

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, steepest at zero (Jordan et al. 2024)
MAX_PADDED_WORK = 1.5  # times the arithmetic without padding

Shape: TypeAlias = tuple[int, int]


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
        torch._foreach_add_([self.state[matrix]["step"] for matrix in matrices], 1)
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        means = [self.state[matrix]["momentum"] for matrix in matrices]
        torch._foreach_lerp_(means, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, means, momentum)  # Nesterov momentum
        torch._foreach_mul_(matrices, 1 - lr * weight_decay)
        for matrix in matrices:
            matrix.grad = None  # AdamW skips it
        steps = orthogonal_steps(updates)
        sizes = [-lr * self.scale * max(_matrix_shape(matrix)) ** 0.5 for matrix in matrices]
        torch._foreach_mul_(steps, sizes)
        parts = [m.to_local() if isinstance(m, DTensor) else m for m in matrices]
        torch._foreach_add_(parts, steps)


def orthogonal(matrices: Tensor, num_iterations: int = 5) -> Tensor:
    """Return approximately U Vᵀ of matrices U S Vᵀ (..., m, n).

    Newton–Schulz iterations X ← a X + (b A + c A²) X with A = X Xᵀ bring all singular values
    between 0.7 and 1.2. They run in bf16 on devices with fast bf16 products.
    """
    x = matrices.bfloat16() if has_bf16(matrices.device) else matrices.float()
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    stack = x.reshape(-1, *x.shape[-2:])
    a, b, c = COEFFICIENTS
    for _ in range(num_iterations):
        gram = stack @ stack.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        stack = torch.baddbmm(stack, polynomial, stack, beta=a)
    x = stack.view(x.shape)
    return x.mT if is_tall else x


def orthogonal_steps(updates: Sequence[Tensor]) -> list[Tensor]:
    """Return `orthogonal` of each update as a matrix, in the shape and dtype of the update.

    A GPU takes as long for one small matrix as for a stack. So matrices of similar shapes are
    padded with zeros, which stay zeros, and go through one batched product. Of a sharded update
    the result is the part that this process holds.
    """
    by_shape: dict[Shape, list[int]] = {}
    for i, update in enumerate(updates):
        by_shape.setdefault(_matrix_shape(update), []).append(i)
    steps = list(updates)
    counts = tuple((shape, len(indices)) for shape, indices in by_shape.items())
    for part in _parts(counts):
        rows, columns = part.padded_shape
        stacks = []
        for shape, _ in part.counts:
            stack = torch.stack([_as_matrix(updates[i]) for i in by_shape[shape]])
            m, n = sorted(shape)
            stack = _as_wide(stack, shape)
            if (m, n) != (rows, columns):
                stack = F.pad(stack, (0, columns - n, 0, rows - m))
            stacks.append(stack)
        results = orthogonal(torch.cat(stacks) if len(stacks) > 1 else stacks[0])
        split = results.split([count for _, count in part.counts])
        for (shape, _), result in zip(part.counts, split, strict=True):
            m, n = sorted(shape)
            directions = _as_wide(result[:, :m, :n], shape)
            dtype = updates[by_shape[shape][0]].dtype
            # One copy makes them dense: updates of a list of dense tensors are few operations.
            directions = directions.to(dtype, memory_format=torch.contiguous_format).contiguous()
            for i, direction in zip(by_shape[shape], directions, strict=True):
                steps[i] = _as_update(direction, updates[i])
    return steps


@dataclass(frozen=True)
class _Part:
    """Matrices that are padded to one shape (rows ≤ columns).

    Args:
        counts: the number of matrices of each shape.
    """

    counts: tuple[tuple[Shape, int], ...]

    @property
    def padded_shape(self) -> Shape:
        sides = [sorted(shape) for shape, _ in self.counts]
        return max(rows for rows, _ in sides), max(columns for _, columns in sides)

    @property
    def work(self) -> int:
        """The multiplications of one Newton–Schulz iteration."""
        rows, columns = self.padded_shape
        return sum(count for _, count in self.counts) * rows * rows * (2 * columns + rows)


@functools.cache
def _parts(counts: tuple[tuple[Shape, int], ...]) -> list[_Part]:
    """Partition shapes into few parts whose padding multiplies the work by `MAX_PADDED_WORK` at
    most: merge those two parts that add the least, again and again."""
    parts = [_Part((count,)) for count in counts]
    budget = MAX_PADDED_WORK * sum(part.work for part in parts)
    while len(parts) > 1:
        pairs = itertools.combinations(parts, 2)
        first, second = min(pairs, key=lambda pair: _added_work(*pair))
        budget_left = budget - sum(part.work for part in parts)
        if _added_work(first, second) > budget_left:
            break
        parts = [part for part in parts if part not in (first, second)]
        parts.append(_Part(first.counts + second.counts))
    return parts


def _added_work(first: _Part, second: _Part) -> int:
    return _Part(first.counts + second.counts).work - first.work - second.work


def _matrix_shape(x: Tensor) -> Shape:
    return x.shape[0], x.shape[1:].numel()


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _as_matrix(x: Tensor) -> Tensor:
    """A whole update as a matrix (m, n). Its columns are in the order of the memory: U Vᵀ does not
    depend on their order, and no copy is needed."""
    x = x.full_tensor() if isinstance(x, DTensor) else x
    return (x.permute(0, 2, 3, 1) if _is_channels_last(x) else x).flatten(1)


def _as_wide(stack: Tensor, shape: Shape) -> Tensor:
    """Transpose matrices whose `shape` is tall; the inverse of itself."""
    return stack.mT if shape[0] > shape[1] else stack


def _as_update(direction: Tensor, update: Tensor) -> Tensor:
    """The inverse of `_as_matrix`; of a sharded update this process's part."""
    if isinstance(update, DTensor):
        full = direction.view(update.shape)
        mesh = update.device_mesh
        replicated = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return replicated.redistribute(mesh, update.placements).to_local()
    if _is_channels_last(update):
        kernels = direction.view(update.permute(0, 2, 3, 1).shape)
        return kernels.permute(0, 3, 1, 2)
    return direction.view(update.shape)


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
