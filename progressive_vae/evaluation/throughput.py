"""Images a second, and the arithmetic that they take."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..models.preview_decoder import PreviewDecoder
from ..models.value_types import uint8_to_signed
from ..pipeline import ProgressiveVAEPipeline
from ..visualization import has_previews

TIMED_SECONDS = 2.0  # of each speed


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

    def finished():
        call()
        if torch.accelerator.is_available():  # which may still be at work
            torch.accelerator.synchronize()

    finished()
    start, calls = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < TIMED_SECONDS or not calls:
        finished()
        calls += 1
    return count * calls / passed


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second of large matrix products."""
    size = 2048 if device.type == "cpu" else 8192
    matrix = torch.randn(size, size, dtype=dtype, device=device)
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
    codes = [z.to(pipe.device) for z in pipe.encode(images)]

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


def training_operations(pipe: ProgressiveVAEPipeline, images: Tensor) -> dict[str, float]:
    """GFLOP of one image, forward and backward, in each phase of training that there may be."""
    assert pipe.prior is not None
    grids = [grid.to(pipe.device) for grid in (*pipe.encode(images), uint8_to_signed(images))]
    calls: dict[str, tuple[torch.nn.Module, dict[str, Any]]] = {}
    triples = zip(pipe.levels, grids[:-1], grids[1:], strict=True)
    calls["prior"] = pipe.prior, {"codes": grids[0]}
    for i, (level, codes, finer) in enumerate(triples, 1):
        can_paint = i < pipe.num_levels and has_previews(pipe)
        paint = PreviewDecoder(pipe.levels[i:], pipe.grid_sizes[i + 1 :])
        told = {"preview_decoder": paint} if can_paint else {}
        calls[f"level_{i}"] = level, {"finer": finer, **told}
        for name in (f"decoder_{i}", f"refit_level_{i}"):
            calls[name] = level, {"finer": finer, "codes": codes}
        if level.auxiliary is not None:
            plain = level.with_decoder(decoder_type="auxiliary", num_classes=0, id2label=None)
            plain = plain.to(pipe.device)
            calls[f"encoder_{i}"] = plain, {"finer": finer, **told}
    figures = {}
    for name in pipe.factor_names:
        getattr(pipe, name).requires_grad_(False)
    for name, (model, inputs) in calls.items():
        model.requires_grad_(True).train()
        count = operations(partial(_one_step, model, inputs))
        model.eval().requires_grad_(False)
        figures[name] = count / (1e9 * len(images))
    return figures


def _one_step(model: torch.nn.Module, inputs: dict[str, Any]):
    model(**inputs).loss.backward()
