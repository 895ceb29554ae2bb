"""Throughput in images per second, and floating-point operations (FLOP) per image."""

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

TIMED_SECONDS = 2.0  # of each measurement


def sampling_speed(pipe: ProgressiveVAEPipeline, num_images: int = 250) -> float:
    """Return samples per second, in one batch of `num_images` after a small warm-up batch."""
    for count in (8, num_images):
        start = time.perf_counter()
        pipe(num_images_per_prompt=count, temperature=1.0, batch_size=num_images, output_type="pt")
    return num_images / (time.perf_counter() - start)


def rate(call: Callable[[], object], count: int) -> float:
    """Return items per second of a function that makes `count` items; its first call warms up."""

    def call_and_wait():
        call()
        if torch.accelerator.is_available():  # its kernels run asynchronously
            torch.accelerator.synchronize()

    call_and_wait()
    start = time.perf_counter()
    num_calls = 0
    while (seconds := time.perf_counter() - start) < TIMED_SECONDS or not num_calls:
        call_and_wait()
        num_calls += 1
    return count * num_calls / seconds


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Return the FLOP/s of large matrix products."""
    size = 2048 if device.type == "cpu" else 8192
    matrix = torch.randn(size, size, dtype=dtype, device=device)
    return rate(lambda: matrix @ matrix, 2 * size**3)


def count_flops(call: Callable[[], object]) -> int:
    """Return the floating-point operations of one call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@torch.no_grad()
def speeds_of(pipe: ProgressiveVAEPipeline, images: Tensor) -> dict[str, float]:
    """Return images per second by batch size and factor, and GFLOP per image.

    Args:
        images: uint8 (B, C, H, W), to encode; B is the larger batch size.
    """
    assert pipe.prior is not None
    metrics: dict[str, float] = {}
    codes = [z.to(pipe.device) for z in pipe.encode(images)]

    def sample(count: int):
        return pipe(
            num_images_per_prompt=count, temperature=1.0, batch_size=count, output_type="pt"
        )

    for size in (1, len(images)):
        metrics[f"sampled, batch {size}"] = rate(partial(sample, size), size)
        metrics[f"prior, batch {size}"] = rate(partial(pipe.prior.sample, size), size)
        for i, (level, z) in enumerate(zip(pipe.levels, codes, strict=True), 1):
            metrics[f"level_{i}, batch {size}"] = rate(partial(level.sample, z[:size]), size)
    metrics["encoded"] = rate(lambda: pipe.encode(images), len(images))
    metrics["GFLOP to sample an image"] = count_flops(lambda: sample(8)) / 8e9
    metrics["GFLOP to encode an image"] = count_flops(lambda: pipe.encode(images[:8])) / 8e9
    return metrics


def training_flops(pipe: ProgressiveVAEPipeline, images: Tensor) -> dict[str, float]:
    """Return GFLOP per image of a training step, forward and backward, for each possible phase.

    Args:
        images: uint8 (B, C, H, W), one batch.
    """
    assert pipe.prior is not None
    # Each phase is a module and the arguments of its loss.
    grids = [grid.to(pipe.device) for grid in (*pipe.encode(images), uint8_to_signed(images))]
    calls: dict[str, tuple[torch.nn.Module, dict[str, Any]]] = {}
    triples = zip(pipe.levels, grids[:-1], grids[1:], strict=True)
    calls["prior"] = pipe.prior, {"codes": grids[0]}
    for i, (level, codes, finer) in enumerate(triples, 1):
        inputs: dict[str, Any] = {"finer": finer}
        if i < pipe.num_levels and pipe.stack.has_previews:
            inputs["preview_decoder"] = PreviewDecoder(pipe.levels[i:], pipe.grid_sizes[i + 1 :])
        calls[f"level_{i}"] = level, inputs
        for name in (f"decoder_{i}", f"refit_level_{i}"):
            calls[name] = level, {"finer": finer, "codes": codes}
        if level.auxiliary is not None:
            plain = level.with_decoder(decoder_type="auxiliary", num_classes=0, id2label=None)
            calls[f"encoder_{i}"] = plain, inputs
    # Only the parameters of the trained module take a backward pass.
    metrics = {}
    for name in pipe.factor_names:
        getattr(pipe, name).requires_grad_(False)
    for name, (model, inputs) in calls.items():
        model.to(pipe.device).requires_grad_(True).train()
        count = count_flops(partial(_one_step, model, inputs))
        model.eval().requires_grad_(False)
        metrics[name] = count / (1e9 * len(images))
    return metrics


def _one_step(model: torch.nn.Module, inputs: dict[str, Any]):
    model(**inputs).loss.backward()
