# /// script
# requires-python = ">=3.10"
# dependencies = ["progressive-vae[train]"]
#
# [tool.uv.sources]
# progressive-vae = { path = "..", editable = true }
# ///
"""Count the operations of a sample and of a training step, on the CPU, as an accelerator runs them.

    python examples/count_operations.py --model examples/fashion_mnist
    python examples/count_operations.py --config examples/configs/cifar10.yaml --num_classes 10
    python examples/count_operations.py --compiled_transformer

Each operation starts about one kernel, so small batches on a GPU take time in proportion. The last
command prints the kernels of a transformer layer, forward and backward, in a compiled model: those
of three layers without those of two.
"""

from argparse import ArgumentParser
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from progressive_vae import ProgressiveVAELevel, ProgressiveVAEPipeline, ProgressiveVAEPrior
from progressive_vae.evaluation.op_count import (
    OpCount,
    as_on_accelerator,
    compiled_kernels,
    count_ops,
)
from progressive_vae.models.transformer import TransformerLayer, attention_mask
from progressive_vae.scripts import run_script
from progressive_vae.training.mixed_precision import MixedPrecisionForward
from progressive_vae.training.muon import Muon, matrices_and_others
from progressive_vae.training.recipe import read_recipe


def untrained_pipeline(
    recipe: str | Path,
    image_shape: tuple[int, int, int],
    num_classes: int,
    overrides: dict[str, Any] | None = None,
) -> ProgressiveVAEPipeline:
    """Return the pipeline of a recipe, with random weights, for images of (C, H, W)."""
    read = read_recipe(recipe, overrides)
    class_names = [str(i) for i in range(num_classes)]
    configs = read.level_configs(image_shape[0], class_names, pretrained={})
    prior = ProgressiveVAEPrior(read.prior_config(configs, image_shape[1:], class_names))
    levels = [ProgressiveVAELevel(config).eval() for config in configs]
    return ProgressiveVAEPipeline.from_levels(prior.eval(), levels)


@torch.no_grad()
def sampling_ops(pipe: ProgressiveVAEPipeline, batch_size: int) -> dict[str, OpCount]:
    """Return the operations of a sample of each factor."""
    assert pipe.prior is not None
    counts = {"prior": count_ops(lambda: pipe.prior.sample(batch_size))}
    for i, level in enumerate(pipe.levels):
        codes = torch.zeros(batch_size, *pipe.grid_sizes[i], dtype=torch.long)
        size = pipe.grid_sizes[i + 1]
        counts[f"level_{i + 1}"] = count_ops(
            lambda level=level, codes=codes, size=size: level.sample(codes, finer_size=size)
        )
    return counts


def training_ops(
    level: ProgressiveVAELevel, size: tuple[int, int], batch_size: int
) -> dict[str, OpCount]:
    """Return the operations of a training step of a level's decoder in bf16, for a finer grid of
    `size`."""
    config = level.config
    finer = torch.zeros(batch_size, config.value_channels, *size)
    finer = finer if config.is_finest else finer[:, 0].long()
    codes = level.encode(finer)
    model = level.with_decoder().train().to(memory_format=torch.channels_last)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    forward = MixedPrecisionForward(model, accelerator.prepare(model), accelerator)
    optimizer = Muon(*matrices_and_others(model), lr=1e-3, foreach=True)  # as on a GPU
    losses = []
    counts = {}
    for _ in range(2):  # the first step fills caches
        counts["forward"] = count_ops(
            lambda: losses.append(forward(finer=finer, codes=codes).loss), num_warmups=0
        )
        counts["backward"] = count_ops(losses.pop().backward, num_warmups=0)
        counts["optimizer"] = count_ops(optimizer.step, num_warmups=0)
        optimizer.zero_grad()
    return counts


def transformer_kernels(num_layers: int, width: int = 64, batch_size: int = 4) -> Counter[str]:
    """Return the kernels of compiled layers, forward and backward, for 8×8 codes given 4×4."""
    layers = [TransformerLayer(width) for _ in range(num_layers)]
    mask = attention_mask("lattice", 4, (8, 8), 16, torch.device("cpu"))
    state, embedded = torch.randn(2, 64, batch_size, width, requires_grad=True)
    z = torch.randn(16, batch_size, width, requires_grad=True)

    @torch.compile(fullgraph=True)
    def run(state, embedded, z):
        for layer in layers:
            state = layer(state, embedded, z, mask)
        return state

    return compiled_kernels(lambda: run(state, embedded, z).sum().backward())


def main(words: list[str]):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="examples/fashion_mnist", help="folder of a pipeline")
    parser.add_argument("--config", help="recipe of a pipeline with random weights, in its place")
    parser.add_argument("--image_shape", type=int, nargs=3, default=[3, 32, 32])
    parser.add_argument("--num_classes", type=int, default=0, help="of the data of the recipe")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument(
        "--compiled_transformer", action="store_true", help="count only its kernels"
    )
    arguments = parser.parse_args(words)
    if arguments.compiled_transformer:
        kernels = transformer_kernels(3) - transformer_kernels(2)
        print(f"transformer layer, compiled: {kernels.total()} kernels, {dict(kernels)}")
        return
    if arguments.config:
        shape = tuple(arguments.image_shape)
        pipe = untrained_pipeline(arguments.config, shape, arguments.num_classes)
    else:
        pipe = ProgressiveVAEPipeline.from_pretrained(arguments.model)
    with as_on_accelerator():
        table = {"sample": sampling_ops(pipe, arguments.batch_size)}
        for i, level in enumerate(pipe.levels, 1):
            counts = training_ops(level, pipe.grid_sizes[i], arguments.batch_size)
            table[f"training step of level_{i}"] = counts
    for title, counts in table.items():
        totals = {name: count.num_ops for name, count in counts.items()}
        print(f"{title}: {sum(totals.values())} operations, {totals}")


if __name__ == "__main__":
    run_script(main)
