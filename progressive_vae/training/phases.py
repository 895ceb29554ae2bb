"""The greedy order, from the data up: `train_level()` for N … 1, then `train_prior()`; and
`refit_level()`, which gives a trained level a stronger decoder on the same codes.

Each phase starts from saved artefacts (the finer levels, the cached grids) and ends in
`save_pretrained`, so any of them can be run again alone. All of them go through one `fit()`.
"""

import json
import math
from dataclasses import asdict, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from ..chain import grid_sizes
from ..configuration import ProgressiveVAELevelConfig, ProgressiveVAEPriorConfig
from ..level import ProgressiveVAELevel
from ..pipeline import ProgressiveVAEPipeline
from ..prior import ProgressiveVAEPrior
from .checkpoints import Progress, is_sharded
from .codes import GridDataset, Manifest, PairedDataset
from .evaluation import reconstruction_grid, sample_grid
from .fitting import FitSettings, fit
from .run import Run, as_finer
from .streaming import PixelStream

WRITTEN_BY = ("transformers_version", "progressive_vae", "format_version")
MAX_KMEANS_VECTORS = 100_000  # bounds the distances held at a time, whatever the image size


def train_level(
    run: Run, index: int, config: ProgressiveVAELevelConfig, settings: FitSettings
) -> ProgressiveVAELevel:
    """Train level `index` under the uniform prior on its codes, and save it.

    It starts from the saved finer levels and the cached codes z_{index + 1} (the pixels, for the
    finest level).
    """
    if config.corruption:
        raise ValueError(
            f"expected corruption=0 for a level to train, got {config.corruption}: corrupted codes "
            "are for refit_level"
        )
    train, name = run.grids("train", index + 1), f"level_{index}"
    config.finer_fingerprint = run.fingerprint(index + 1)
    identity = identify(name, config, settings, run.accelerator, _of_data(train))
    if run.is_done(name, identity):
        return run.level(index)
    set_seed(settings.seed)
    level = ProgressiveVAELevel(config)
    level.eval().check_causal()
    initialize_codebook(level, train, settings.seed)
    run.drop_record(f"refit_level_{index}")  # of the level that was there before
    _fit_level(run, index, level, train, settings, identity)
    return level


def refit_level(run: Run, index: int, changes: dict, settings: FitSettings) -> ProgressiveVAELevel:
    """Fit the decoder of level `index` again, on the cached codes, and save the level.

    The encoder and the codebook stay as they are, to the bit: nothing coarser has to be trained
    again.

    Args:
        changes: fields of the decoder's config, as in `ProgressiveVAELevel.with_decoder`.
    """
    finer, codes = run.grids("train", index + 1), run.grids("train", index)
    pairs = finer if isinstance(finer, PixelStream) else PairedDataset(finer, codes)
    set_seed(settings.seed)
    old = run.level(index)
    level = old.with_decoder(**changes)
    level.eval().check_causal()
    name = f"refit_level_{index}"
    identity = identify(name, level.config, settings, run.accelerator, _of_data(codes))
    if run.is_done(f"level_{index}", identity):
        return old
    _fit_level(run, index, level, pairs, settings, identity)
    return level


def identify(
    phase: str,
    config: ProgressiveVAELevelConfig | ProgressiveVAEPriorConfig,
    settings: FitSettings,
    accelerator: Accelerator,
    data: dict[str, Any],
) -> dict[str, Any]:
    """All that the weights of a phase depend on, and nothing else, as JSON holds it."""
    fields = asdict(settings)
    for name in ("logging_steps", "validation_steps", "dataloader_num_workers"):
        del fields[name]
    identity = {
        "phase": phase,
        "config": {k: v for k, v in config.to_dict().items() if k not in WRITTEN_BY},
        "data": data,
        "num_processes": accelerator.num_processes,
        "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
        "mixed_precision": accelerator.mixed_precision,
        **fields,
    }
    return json.loads(json.dumps(identity))


def plan(
    phase: str,
    config: ProgressiveVAELevelConfig | ProgressiveVAEPriorConfig,
    settings: FitSettings,
    accelerator: Accelerator,
    levels: list[ProgressiveVAELevelConfig],
    pixels: Manifest,
) -> dict[str, Any]:
    """The identity of a phase, as far as it is known before those before it are done.

    Args:
        levels: the configs of [level_1 … level_N].
        pixels: of the training split.
    """
    # z_index is what it learns from: a level from the finer grid, a refit from its own codes.
    index = 1 if phase == "prior" else int(phase.rpartition("_")[2]) + phase.startswith("level")
    if index <= len(levels):
        size = grid_sizes(levels, (pixels.shape[-2], pixels.shape[-1]))[index - 1]
        pixels = replace(pixels, shape=size, num_values=levels[index - 1].codebook_size)
    return identify(phase, config, settings, accelerator, asdict(pixels))


def _of_data(train: GridDataset | PixelStream) -> dict[str, Any]:
    return {**asdict(train.manifest), "num_examples": train.num_examples}


def _fit_level(
    run: Run,
    index: int,
    level: ProgressiveVAELevel,
    train: GridDataset | PairedDataset | PixelStream,
    settings: FitSettings,
    identity: dict[str, Any],
):
    """Fit, show the validations, note the cost, and save as `level_{index}`."""
    accelerator, held_out = run.accelerator, run.grids("test", index + 1)
    name = identity["phase"]
    finer_levels = [run.level(i) for i in range(index + 1, run.num_levels + 1)]
    # What this level says of an image, through the finer levels, which are trained already.
    view = ProgressiveVAEPipeline.from_levels(None, [level, *finer_levels], run.image_shape[1:])
    view.to(accelerator.device).set_progress_bar_config(disable=True)
    images = run.pixels["test"].batch(slice(0, run.num_validation_images))[0].to(torch.uint8)
    progress, figures = Progress(), {}

    def to_inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = {"finer": as_finer(batch["grid"], level)}
        if name.startswith("refit"):  # a stream has no codes beside it
            known = batch.get("codes")
            inputs["codes"] = level.encode(inputs["finer"]) if known is None else known
        return inputs | _class_labels(batch, level)

    for progress in fit(
        level, train, to_inputs, accelerator, settings, identity, run.checkpoints, run.logged_steps
    ):
        if accelerator.is_main_process:
            grids, nats = held_out.batch(slice(0, 1000))[0], 0.0
            with torch.no_grad(), accelerator.autocast():
                for chunk in grids.split(250):
                    finer = as_finer(chunk, level).to(level.device)
                    nats -= level.log_prob(finer, level.encode(finer)).sum().item()
            bits = nats / (len(grids) * math.log(2))
            figures = {"validation_bits_per_dim": bits / math.prod(run.image_shape)}
            run.show(name, progress.step, reconstruction_grid(view, images), figures)
    _record(run, name, settings, progress, **figures)
    run.logged_steps += settings.max_train_steps
    if not name.startswith("refit"):
        run.forget(index)  # the codes of the level that was there before
    run.save(level, f"level_{index}", identity)


def _class_labels(
    batch: dict[str, Tensor], model: ProgressiveVAELevel | ProgressiveVAEPrior
) -> dict[str, Tensor]:
    return {"class_labels": batch["label"]} if model.config.num_classes else {}


def initialize_codebook(level: ProgressiveVAELevel, train: GridDataset | PixelStream, seed: int):
    """k-means on latents of up to 2,000 images, drawn with the seed: alike on all processes.

    The statistics it leaves weigh as much as all those images, so that the codebook moves slowly
    during the first hundreds of steps, while the encoder changes most.
    """
    generator = torch.Generator().manual_seed(seed)
    grids = train.sample(2000, seed)
    with torch.no_grad():
        latents = [level.encoder(as_finer(part, level)) for part in grids.split(250)]
    vectors = torch.cat(latents).movedim(1, -1).flatten(0, -2)
    if len(vectors) > MAX_KMEANS_VECTORS:
        rows = torch.randperm(len(vectors), generator=generator)[:MAX_KMEANS_VECTORS]
        vectors = vectors[rows]
    level.quantizer.initialize(vectors, generator)


def train_prior(
    run: Run, config: ProgressiveVAEPriorConfig, settings: FitSettings
) -> ProgressiveVAEPrior:
    """Fit the prior to the cached z_1 by maximum likelihood, and save it."""
    accelerator = run.accelerator
    train, held_out = run.grids("train", 1), run.grids("test", 1)
    config.finer_fingerprint = run.fingerprint(1)
    identity = identify("prior", config, settings, accelerator, _of_data(train))
    if run.is_done("prior", identity):
        return ProgressiveVAEPrior.from_pretrained(run.output_dir / "prior")
    set_seed(settings.seed)
    prior, progress = ProgressiveVAEPrior(config), Progress()
    levels = [run.level(i) for i in range(1, run.num_levels + 1)]
    view = ProgressiveVAEPipeline.from_levels(prior, levels, run.image_shape[1:])
    view.to(accelerator.device).set_progress_bar_config(disable=True)

    def to_inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"codes": batch["grid"]} | _class_labels(batch, prior)

    for progress in fit(
        prior, train, to_inputs, accelerator, settings, identity, run.checkpoints, run.logged_steps
    ):
        if accelerator.is_main_process or is_sharded(accelerator):  # then all have to take part
            grids = held_out.batch(slice(0, 1000))[0].to(prior.device)
            with torch.no_grad():
                bits = -prior.log_prob(grids).mean().item() / math.log(2)
            figures = {"validation_bits_per_dim": bits / math.prod(run.image_shape)}
            picture = sample_grid(view, columns=run.num_validation_images)
            run.show("prior", progress.step, picture, figures)
    _record(run, "prior", settings, progress)
    run.logged_steps += settings.max_train_steps
    run.save(prior, "prior", identity)
    return prior


def _record(run: Run, phase: str, settings: FitSettings, progress: Progress, **figures: float):
    """Note what a fit cost, and the share of its time in which it waited for data."""
    processes = run.accelerator.num_processes * run.accelerator.gradient_accumulation_steps
    num_images = settings.max_train_steps * settings.train_batch_size * processes
    waiting = round(progress.waited / progress.seconds, 4)
    run.record(phase, num_images, progress.seconds, waiting_share=waiting, **figures)
