# /// script
# requires-python = ">=3.10"
# dependencies = ["progressive-vae[train]"]
#
# [tool.uv.sources]
# progressive-vae = { path = "..", editable = true }
# ///
"""Plan the training of a recipe on many GPUs, before any of them is rented.

    python examples/plan_scale.py --config examples/configs/imagenet_256.yaml
        parameters, FLOP, tokens and memory of a training step, and hours, by number of GPUs.

    python examples/plan_scale.py --measure true
        the same of three sizes of a transformer, beside what a step takes on this CPU.

Parameters, FLOP and the bytes that the backward pass reads are counted on the real models, without
memory for the weights of levels (torch's device "meta"). A GPU has, in float32, weights, gradients,
momentum and averaged weights of the trained part, and the activations of its share of the batch,
which bf16 halves. Matrices of attention are not among them, as no kernel for GPUs saves them. A
token is a position of a grid of codes, or 256 pixels.
"""

import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from progressive_vae import ProgressiveVAELevel, ProgressiveVAELevelConfig, ProgressiveVAEPrior
from progressive_vae.configuration.validation import grid_sizes
from progressive_vae.evaluation.throughput import matrix_rate
from progressive_vae.scripts import print_markdown_table, run_script
from progressive_vae.training.recipe import read_recipe
from progressive_vae.training.sections import DECODER_SIZES

STATE_BYTES = 16  # of a parameter: weight, gradient, momentum and average, in float32
PIXELS_PER_TOKEN = 256
COUNTED = 2  # images of the batch that is counted; a step grows with its batch


@dataclass
class Step:
    """What a training step takes.

    Args:
        parameters: of the trained part.
        flop: of forward and backward pass of an image.
        saved_bytes: that the backward pass of an image reads, in float32.
        tokens: of an image.
    """

    parameters: int
    flop: float
    saved_bytes: float
    tokens: int

    def gigabytes(self, batch_size: float, is_bf16: bool = True) -> float:
        """Memory of a GPU with so many images of a batch."""
        activations = batch_size * self.saved_bytes / (2 if is_bf16 else 1)
        return (STATE_BYTES * self.parameters + activations) / 1e9


def count_step(model: torch.nn.Module, loss: Callable[[], Tensor], tokens: int) -> Step:
    """Count a step whose `loss` is of a batch of `COUNTED` images."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    attention = partial(checkpoint, F.scaled_dot_product_attention, use_reentrant=False)
    with (
        FlopCounterMode(display=False) as counter,
        patch.object(F, "scaled_dot_product_attention", attention),
    ):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = loss()
        saved_bytes = sum(saved.values())
        result.backward()
    count = sum(p.numel() for p in parameters)
    return Step(count, counter.get_total_flops() / COUNTED, saved_bytes / COUNTED, tokens)


def level_step(
    config: ProgressiveVAELevelConfig, size: tuple[int, int], checkpointing: bool
) -> Step:
    """Count a step of a level: of its decoder on frozen codes, or of the encoder too if there is
    only an auxiliary decoder."""
    with torch.device("meta"):
        model = ProgressiveVAELevel(config).train()
        if config.is_finest:
            finer = torch.zeros(COUNTED, config.value_channels, *size)
        else:
            finer = torch.zeros(COUNTED, *size, dtype=torch.long)
        codes = torch.zeros(COUNTED, *grid_sizes([config], size)[0], dtype=torch.long)
        labels = torch.zeros(COUNTED, dtype=torch.long) if config.num_classes else None
    model.quantizer.is_initialized = True  # k-means would read latents
    if checkpointing:
        model.gradient_checkpointing_enable()
    if model.decoder is not None:
        model = model.requires_grad_(False)
        model.decoder.requires_grad_(True)
    inputs = {"finer": finer, "class_labels": labels}
    if model.decoder is not None:
        inputs["codes"] = codes
    tokens = math.prod(size) // (PIXELS_PER_TOKEN if config.is_finest else 1)
    return count_step(model, lambda: model(**inputs).loss, tokens)


def print_plan(arguments):
    """Print a row for each part of the recipe, with its transformer at several sizes."""
    recipe = read_recipe(arguments.config)
    size = (arguments.resolution, arguments.resolution)
    names = [str(i) for i in range(arguments.num_classes)]
    configs = recipe.level_configs(3, names, {})
    sizes = grid_sizes(configs, size)
    checkpointing = recipe.run.gradient_checkpointing
    rows: list[tuple[str, Step, int, int]] = []  # with the batch size and the number of steps
    for i, (level, config) in enumerate(zip(recipe.levels, configs, strict=True), 1):
        fit = (level.fit.train_batch_size, level.fit.max_train_steps)
        if config.decoder_type != "transformer":
            rows.append((f"level_{i}", level_step(config, sizes[i], checkpointing), *fit))
            continue
        for name in arguments.sizes:
            sized = config.with_decoder(**DECODER_SIZES[name])
            rows.append((f"level_{i}, {name}", level_step(sized, sizes[i], checkpointing), *fit))
    # With weights: the masks of transformers read values.
    prior = ProgressiveVAEPrior(recipe.prior_config(configs, size, names)).train()
    codes = torch.zeros(COUNTED, *sizes[0], dtype=torch.long)
    step = count_step(prior, lambda: prior(codes).loss, math.prod(sizes[0]))
    prior_fit = recipe.prior.fit
    rows.append(("prior", step, prior_fit.train_batch_size, prior_fit.max_train_steps))
    gpus = arguments.gpus
    header = ["part", "parameters, M", "TFLOP a step", "tokens a step"]
    header += [f"GB, hours on {n}" for n in gpus]
    lines = [header]
    for name, step, batch_size, num_steps in rows:
        flop = batch_size * step.flop
        cells = [name, f"{step.parameters / 1e6:.1f}", f"{flop / 1e12:.2f}"]
        cells.append(f"{batch_size * step.tokens:,}")
        for n in gpus:
            hours = num_steps * flop / (n * arguments.tflops * 1e12 * arguments.utilization) / 3600
            cells.append(f"{step.gigabytes(batch_size / n):.1f}, {hours:.1f}")
        lines.append(cells)
    print_markdown_table(lines)
    print(
        f"\nHours of all steps of the recipe, on GPUs of {arguments.tflops:g} TFLOP/s, of which "
        f"{arguments.utilization:.0%} are reached. Batches are those of the recipe, over all GPUs."
    )


def print_measured(arguments):
    """Print counted and measured steps of transformers on this CPU, in float32."""
    lines = [["width, layers", "GFLOP", "GFLOP/s", "of large products", "GB counted", "measured"]]
    fastest = matrix_rate(torch.float32, torch.device("cpu"))
    for width, num_layers in (
        (128, 4),
        (256, 8),
        (384, 12),
    ):  # the peak is that of the largest so far
        config = ProgressiveVAELevelConfig(
            num_symbols=512, codebook_size=512, hidden_size=width, num_layers=num_layers,
            encoder_hidden_size=32, decoder_type="transformer",
        )  # fmt: skip
        counted = level_step(config, (16, 16), checkpointing=False)
        model = ProgressiveVAELevel(config).requires_grad_(False).train()
        assert model.decoder is not None
        model.decoder.requires_grad_(True)
        finer = torch.zeros(arguments.batch_size, 16, 16, dtype=torch.long)
        codes = model.encode(finer)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds = math.inf
        for _ in range(2):
            start = time.perf_counter()
            model(finer=finer, codes=codes).loss.backward()
            seconds = min(seconds, time.perf_counter() - start)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KB
        # Of the state only gradients are new: weights are there before, and no optimizer is.
        expected = (4 * counted.parameters + arguments.batch_size * counted.saved_bytes) / 1e9
        flop = arguments.batch_size * counted.flop
        cells = [f"{width}, {num_layers}", f"{flop / 1e9:.1f}", f"{flop / seconds / 1e9:.1f}"]
        cells += [f"{flop / seconds / fastest:.0%}", f"{expected:.2f}", f"{grown * 1024 / 1e9:.2f}"]
        lines.append(cells)
    print_markdown_table(lines)


def parse(words: list[str]):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="examples/configs/imagenet_256.yaml", help="a recipe")
    parser.add_argument("--resolution", type=int, default=256, help="of square images in color")
    parser.add_argument("--num_classes", type=int, default=1000)
    parser.add_argument(
        "--sizes", type=list[str], default=["base", "large"], help="of transformers"
    )
    parser.add_argument("--gpus", type=list[int], default=[1, 8, 64])
    parser.add_argument("--tflops", type=float, default=400, help="of a GPU, in bf16")
    parser.add_argument("--utilization", type=float, default=0.4, help="the share that is reached")
    parser.add_argument("--measure", type=bool, default=False, help="on this CPU")
    parser.add_argument("--batch_size", type=int, default=8, help="of what is measured")
    return parser.parse_args(words)


def main(words: list[str]):
    arguments = parse(words)
    if arguments.measure:
        print_measured(arguments)
    else:
        print_plan(arguments)


if __name__ == "__main__":
    run_script(main)
