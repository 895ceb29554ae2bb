"""The greedy order, from the data up: `train_level()` for N … 1, then `train_prior()`; and
`refit_level()`, which gives a trained level a stronger decoder on the same codes.

Each phase starts from saved artefacts (the finer levels, the cached grids) and ends in
`save_pretrained`, so any of them can be run again alone. All of them go through one `fit()`.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .codes import GridDataset, PairedDataset
from .configuration import ProgressiveVAELevelConfig, ProgressiveVAEPriorConfig
from .evaluation import reconstruction_grid, sample_grid
from .level import ProgressiveVAELevel
from .pipeline import ProgressiveVAEPipeline
from .prior import ProgressiveVAEPrior
from .run import Run, as_finer

MAX_KMEANS_VECTORS = 100_000  # bounds the distances held at a time, whatever the image size


@dataclass(frozen=True)
class FitSettings:
    """How to minimise one loss; the names are those of diffusers' training scripts."""

    max_train_steps: int = 1000
    train_batch_size: int = 64
    learning_rate: float = 2e-3
    lr_scheduler: str = "cosine"
    lr_warmup_steps: int = 100
    adam_beta1: float = 0.9
    adam_beta2: float = 0.99
    adam_weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    use_ema: bool = True
    ema_decay: float = 0.999
    dataloader_num_workers: int = 0
    logging_steps: int = 50
    validation_steps: int = 1000
    seed: int = 0

    def __post_init__(self):
        for name in ("max_train_steps", "train_batch_size", "logging_steps", "validation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, got {getattr(self, name)}")


def fit(
    model: PreTrainedModel,
    dataset: GridDataset | PairedDataset,
    to_inputs: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    accelerator: Accelerator,
    settings: FitSettings,
    name: str,
    logged_steps: int = 0,
) -> Iterator[int]:
    """Minimise `model(**inputs).loss`; a generator that pauses for each validation.

    It yields the step every `validation_steps` and at the end, with the averaged weights in the
    model, in evaluation mode; the model is left that way after the last one. A model that has an
    `after_step(output, gather)` gets it called after each step.

    Args:
        to_inputs: a batch of the data set -> keywords of the model.
        name: the prefix of what is logged.
        logged_steps: added to the steps that the trackers see.
    """
    set_seed(settings.seed, device_specific=True)  # the noise of each process is its own
    loader = DataLoader(
        dataset,
        settings.train_batch_size,
        shuffle=True,
        drop_last=len(dataset) >= settings.train_batch_size * accelerator.num_processes,
        num_workers=settings.dataloader_num_workers,
        persistent_workers=settings.dataloader_num_workers > 0,
        generator=torch.Generator().manual_seed(settings.seed),
    )
    model = model.to(accelerator.device, memory_format=torch.channels_last)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        weight_decay=settings.adam_weight_decay,
    )
    scheduler = get_scheduler(
        settings.lr_scheduler,
        optimizer,
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=settings.max_train_steps,
    )
    average = EMAModel(parameters, decay=settings.ema_decay, foreach=True)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    wrapped.train()
    step = epoch = 0
    progress = tqdm(
        total=settings.max_train_steps, desc=name, disable=not accelerator.is_local_main_process
    )
    while step < settings.max_train_steps:
        loader.set_epoch(epoch)
        epoch += 1
        for batch in loader:
            with accelerator.accumulate(wrapped):
                output = wrapped(**to_inputs(batch))
                accelerator.backward(output.loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(parameters, settings.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            if hasattr(model, "after_step"):
                model.after_step(output, accelerator.gather)
            if not accelerator.sync_gradients:
                continue
            scheduler.step()
            if settings.use_ema:
                average.step(parameters)
            step += 1
            progress.update()
            if step % settings.logging_steps == 0 or step == settings.max_train_steps:
                loss = accelerator.reduce(output.loss.detach(), "mean").item()
                if not math.isfinite(loss):
                    raise FloatingPointError(f"the loss of {name} became {loss} at step {step}")
                figures = {"loss": loss, "grad_norm": float(norm), "lr": scheduler.get_last_lr()[0]}
                progress.set_postfix(loss=f"{loss:.4f}")
                logged = {f"{name}/{k}": v for k, v in figures.items()}
                accelerator.log(logged, step=logged_steps + step)
            if step % settings.validation_steps == 0 or step == settings.max_train_steps:
                is_final = step == settings.max_train_steps
                if settings.use_ema:
                    average.store(parameters)
                    average.copy_to(parameters)
                wrapped.eval()
                yield step
                if settings.use_ema and not is_final:
                    average.restore(parameters)
                wrapped.train(not is_final)
            if step == settings.max_train_steps:
                break
    progress.close()
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    accelerator.free_memory()


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
    set_seed(settings.seed)
    level, train = ProgressiveVAELevel(config), run.grids("train", index + 1)
    level.config.finer_fingerprint = run.fingerprint(index + 1)
    if config.quantizer == "vq":
        initialize_codebook(level, train, settings.seed)
    run.drop_record(f"refit_level_{index}")  # of the level that was there before
    _fit_level(run, index, level, train, settings, f"level_{index}")
    run.forget(index)
    return level


def refit_level(run: Run, index: int, changes: dict, settings: FitSettings) -> ProgressiveVAELevel:
    """Fit the decoder of level `index` again, on the cached codes, and save the level.

    The encoder and the codebook stay as they are, to the bit: nothing coarser has to be trained
    again.

    Args:
        changes: fields of the decoder's config, as in `ProgressiveVAELevel.with_decoder`.
    """
    finer, codes = run.grids("train", index + 1), run.grids("train", index)
    set_seed(settings.seed)
    level = run.level(index).with_decoder(**changes)
    _fit_level(run, index, level, PairedDataset(finer, codes), settings, f"refit_level_{index}")
    return level


def _fit_level(
    run: Run,
    index: int,
    level: ProgressiveVAELevel,
    train: GridDataset | PairedDataset,
    settings: FitSettings,
    name: str,
):
    """Fit, show the validations, note the cost, and save as `level_{index}`."""
    accelerator, held_out = run.accelerator, run.grids("test", index + 1)
    finer_levels = [run.level(i) for i in range(index + 1, run.num_levels + 1)]
    # What this level says of an image, through the finer levels, which are trained already.
    view = ProgressiveVAEPipeline.from_levels(None, [level, *finer_levels], run.image_shape[1:])
    view.to(accelerator.device).set_progress_bar_config(disable=True)
    images = run.pixels["test"].batch(slice(0, run.num_validation_images))[0].to(torch.uint8)
    start, paused, figures = time.perf_counter(), 0.0, {}

    def to_inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = {"finer": as_finer(batch["grid"], level)}
        if "codes" in batch:
            inputs["codes"] = batch["codes"]
        return inputs | _class_labels(batch, level)

    for step in fit(level, train, to_inputs, accelerator, settings, name, run.logged_steps):
        pause = time.perf_counter()
        if accelerator.is_main_process:
            grids, nats = held_out.batch(slice(0, 1000))[0], 0.0
            with torch.no_grad(), accelerator.autocast():
                for chunk in grids.split(250):
                    finer = as_finer(chunk, level).to(level.device)
                    nats -= level.log_prob(finer, level.encode(finer)).sum().item()
            bits = nats / (len(grids) * math.log(2))
            figures = {"validation_bits_per_dim": bits / math.prod(run.image_shape)}
            run.show(name, step, reconstruction_grid(view, images), figures)
        paused += time.perf_counter() - pause
    seconds = time.perf_counter() - start - paused
    run.record(name, _images_seen(settings, accelerator), seconds, **figures)
    run.logged_steps += settings.max_train_steps
    run.save(level, f"level_{index}")


def _class_labels(
    batch: dict[str, Tensor], model: ProgressiveVAELevel | ProgressiveVAEPrior
) -> dict[str, Tensor]:
    return {"class_labels": batch["label"]} if model.config.num_classes else {}


def initialize_codebook(level: ProgressiveVAELevel, train: GridDataset, seed: int):
    """k-means on latents of up to 2,000 images, drawn with the seed: alike on all processes.

    The statistics it leaves weigh as much as all those images, so that the codebook moves slowly
    during the first hundreds of steps, while the encoder changes most.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(train), generator=generator)[:2000]
    with torch.no_grad():
        latents = [
            level.encoder(as_finer(train.batch(part.tolist())[0], level))
            for part in rows.split(250)
        ]
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
    set_seed(settings.seed)
    prior = ProgressiveVAEPrior(config)
    prior.config.finer_fingerprint = run.fingerprint(1)
    levels = [run.level(i) for i in range(1, run.num_levels + 1)]
    view = ProgressiveVAEPipeline.from_levels(prior, levels, run.image_shape[1:])
    view.to(accelerator.device).set_progress_bar_config(disable=True)
    start, paused = time.perf_counter(), 0.0

    def to_inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"codes": batch["grid"]} | _class_labels(batch, prior)

    for step in fit(prior, train, to_inputs, accelerator, settings, "prior", run.logged_steps):
        pause = time.perf_counter()
        if accelerator.is_main_process:
            grids = held_out.batch(slice(0, 1000))[0].to(prior.device)
            with torch.no_grad():
                bits = -prior.log_prob(grids).mean().item() / math.log(2)
            figures = {"validation_bits_per_dim": bits / math.prod(run.image_shape)}
            run.show("prior", step, sample_grid(view, columns=run.num_validation_images), figures)
        paused += time.perf_counter() - pause
    run.record("prior", _images_seen(settings, accelerator), time.perf_counter() - start - paused)
    run.logged_steps += settings.max_train_steps
    run.save(prior, "prior")
    return prior


def _images_seen(settings: FitSettings, accelerator: Accelerator) -> int:
    return (
        settings.max_train_steps
        * settings.train_batch_size
        * accelerator.num_processes
        * accelerator.gradient_accumulation_steps
    )
