"""Images a second, and the arithmetic that they take."""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..entries import as_pixel_values
from ..pipeline import ProgressiveVAEPipeline

TIMED_SECONDS = 3.0  # of each speed


def has_bf16(device: torch.device) -> bool:
    """Whether products of 16-bit floats are quick. CPUs without wide vectors emulate them: there a
    training step in bf16 takes ten times as long as one in fp32, or longer."""
    wide = ("AVX512", "AMX", "SVE")
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith(wide)


def sampling_speed(pipe: ProgressiveVAEPipeline, num_images: int = 250) -> float:
    """Images per second drawn in one batch of `num_images`, after a small one to warm up."""
    for count in (8, num_images):
        start = time.perf_counter()
        pipe(num_images_per_prompt=count, batch_size=num_images, output_type="pt")
    return num_images / (time.perf_counter() - start)


def rate(call: Callable[[], object], count: int) -> float:
    """`count` things a second, from calls that make so many; the first is for warming up."""
    call()
    start, calls = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < TIMED_SECONDS or not calls:
        call()
        calls += 1
    return count * calls / passed


def matrix_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """Floating-point operations a second of large matrix products."""
    matrix = torch.randn(size, size, dtype=dtype)
    return rate(lambda: matrix @ matrix, 2 * size**3)


def operations(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@torch.no_grad()
def speeds_of(pipe: ProgressiveVAEPipeline, images: Tensor) -> dict[str, float]:
    """Images a second, by batch size and factor, and GFLOP an image."""
    assert pipe.prior is not None
    figures: dict[str, float] = {}
    codes = pipe.encode(images)

    def draw(count: int):
        return pipe(num_images_per_prompt=count, batch_size=count, output_type="pt")

    for size in (1, len(images)):
        figures[f"drawn, batch {size}"] = rate(partial(draw, size), size)
        figures[f"prior, batch {size}"] = rate(partial(pipe.prior.sample, size), size)
        for i, (level, z) in enumerate(zip(pipe.levels, codes, strict=True), 1):
            figures[f"level_{i}, batch {size}"] = rate(partial(level.sample, z[:size]), size)
    figures["encoded"] = rate(lambda: pipe.encode(images), len(images))
    figures["GFLOP to draw an image"] = operations(lambda: draw(8)) / 8e9
    figures["GFLOP to encode an image"] = operations(lambda: pipe.encode(images[:8])) / 8e9
    return figures


def _one_step(model: torch.nn.Module, grid: Tensor):
    model(grid).loss.backward()


def training_operations(pipe: ProgressiveVAEPipeline, images: Tensor) -> dict[str, float]:
    """GFLOP of one image, forward and backward, for each level and the prior."""
    grids: list[Tensor] = [*pipe.encode(images), as_pixel_values(images)]
    figures = {}
    for name, model, grid in zip(
        pipe.factor_names, [pipe.prior, *pipe.levels], [grids[0], *grids[1:]], strict=True
    ):
        model.train().requires_grad_(True)
        count = operations(partial(_one_step, model, grid))
        model.eval().requires_grad_(False)
        figures[name] = count / (1e9 * len(images))
    return figures
