"""The greedy order, from the data up: `train_level()` for N … 1, then `train_prior()`; and
`refit_level()`, which gives a trained level a stronger decoder on the same codes.

Each phase starts from saved artefacts (the finer levels, the cached grids) and ends in
`save_pretrained`, so any of them can be run again alone. All of them go through one `fit()`.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .checkpoints import Checkpoints, Progress, is_sharded
from .codes import GridDataset, PairedDataset
from .configuration import ProgressiveVAELevelConfig, ProgressiveVAEPriorConfig
from .evaluation import reconstruction_grid, sample_grid
from .level import ProgressiveVAELevel
from .pipeline import ProgressiveVAEPipeline
from .prior import ProgressiveVAEPrior
from .run import Run, as_finer
from .streaming import PixelStream

WRITTEN_BY = ("transformers_version", "progressive_vae", "format_version")
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


class Shuffled(Sampler):
    """The indices 0 … n − 1 in an order that depends on the seed and the epoch alone, so that a fit
    that goes on within an epoch sees what it would have seen."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed
        self.begin_at(0, 0)

    def begin_at(self, epoch: int, start: int):
        """The next pass is that of `epoch`, without its first `start` indices."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.count - self.start

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(torch.randperm(self.count, generator=generator)[self.start :].tolist())


def fit(
    model: PreTrainedModel,
    dataset: GridDataset | PairedDataset | PixelStream,
    to_inputs: Callable[[dict[str, Tensor]], dict[str, Any]],
    accelerator: Accelerator,
    settings: FitSettings,
    identity: dict[str, Any],
    checkpoints: Checkpoints | None = None,
    logged_steps: int = 0,
) -> Iterator[Progress]:
    """Minimise `model(**inputs).loss`; a generator that pauses for each validation.

    It yields where it stands every `validation_steps` and at the end, with the averaged weights in
    the model, in evaluation mode; the model is left that way after the last one. A model that has
    an `after_step(output, gather)` gets it called after each step.

    Args:
        to_inputs: a batch of the data set -> keywords of the model.
        identity: of the fit, `"phase"` its name: a checkpoint of another one is refused.
        checkpoints: where to save and go on from; `None` for neither.
        logged_steps: added to the steps that the trackers see.

    Raises:
        FloatingPointError: the loss is no number any more.
        SystemExit: with code 0, after a checkpoint, where `checkpoints.stop` has been called.
    """
    name = identity["phase"]
    set_seed(settings.seed, device_specific=True)  # a backbone may have dropout
    loader, order = _loader(dataset, accelerator, settings)
    if is_sharded(accelerator) and not isinstance(model, ProgressiveVAEPrior):
        raise ValueError(f"expected FSDP for the phase prior alone, got it for {name}")
    model = model.to(accelerator.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
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
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    wrapped.train()
    if is_sharded(accelerator):
        for method in ("log_prob", "sample"):  # these gather the weights as forward does
            register_fsdp_forward_method(wrapped, method)
    parameters = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    average = EMAModel(_local(parameters), decay=settings.ema_decay, foreach=True)
    progress, states = Progress(), {"scheduler": scheduler, "average": average}
    if checkpoints is not None:
        progress = checkpoints.load(identity, states, accelerator)
        checkpoints.is_fitting = True
    bar = tqdm(
        total=settings.max_train_steps,
        initial=progress.step,
        desc=name,
        disable=not accelerator.is_local_main_process,
    )
    clock = time.perf_counter()
    while progress.step < settings.max_train_steps:
        batches_of_all = progress.batch * accelerator.num_processes
        order.begin_at(progress.epoch, batches_of_all * settings.train_batch_size)
        for batch in loader:
            progress.batch += 1
            noise = _generators(batch["index"], progress.epoch, settings.seed)
            with accelerator.accumulate(wrapped):
                output = wrapped(**to_inputs(batch), generator=noise)
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
                average.step(_local(parameters))
            progress.step += 1
            step, is_final = progress.step, progress.step == settings.max_train_steps
            bar.update()
            if step % settings.logging_steps == 0 or is_final:
                loss = accelerator.reduce(output.loss.detach(), "mean").item()
                if not math.isfinite(loss):
                    raise FloatingPointError(_diverged(name, loss, step, checkpoints))
                figures = {"loss": loss, "grad_norm": float(norm), "lr": scheduler.get_last_lr()[0]}
                bar.set_postfix(loss=f"{loss:.4f}")
                logged = {f"{name}/{k}": v for k, v in figures.items()}
                accelerator.log(logged, step=logged_steps + step)
            if step % settings.validation_steps == 0 or is_final:
                if settings.use_ema:
                    average.store(_local(parameters))
                    average.copy_to(_local(parameters))
                    _reshard(wrapped)
                wrapped.eval()
                progress.seconds += time.perf_counter() - clock
                yield progress
                clock = time.perf_counter()
                if settings.use_ema and not is_final:
                    average.restore(_local(parameters))
                    _reshard(wrapped)
                wrapped.train(not is_final)
            if is_final:
                break
            if checkpoints and checkpoints.is_due(step, accelerator, settings.logging_steps):
                progress.seconds += time.perf_counter() - clock
                clock = time.perf_counter()
                checkpoints.save(identity, progress, states, accelerator)
                if checkpoints.is_stopping:
                    accelerator.print(f"stopped in {name} at step {step}, which is saved")
                    raise SystemExit(0)
        if not progress.batch:
            raise ValueError(f"expected examples to fit {name} to, got none")
        progress.epoch, progress.batch = progress.epoch + 1, 0
    bar.close()
    if checkpoints is not None:
        checkpoints.is_fitting = False
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    accelerator.free_memory()


def _loader(
    dataset: GridDataset | PairedDataset | PixelStream,
    accelerator: Accelerator,
    settings: FitSettings,
) -> tuple[DataLoader, Shuffled | PixelStream]:
    """The batches of this process, and what is told where they begin."""
    shared: dict[str, Any] = dict(
        batch_size=settings.train_batch_size,
        num_workers=settings.dataloader_num_workers,
        persistent_workers=settings.dataloader_num_workers > 0,
        generator=torch.Generator().manual_seed(settings.seed),  # of the workers
    )
    if isinstance(dataset, PixelStream):
        share = dataset.share(accelerator.process_index, accelerator.num_processes)
        loader = DataLoader(share, **shared)
        # Only moved to the device: the stream is divided already.
        return prepare_data_loader(
            loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True
        ), share
    order = Shuffled(len(dataset), settings.seed)
    drop_last = len(dataset) >= settings.train_batch_size * accelerator.num_processes
    loader = DataLoader(dataset, sampler=order, drop_last=drop_last, **shared)
    return accelerator.prepare(loader), order


def _local(parameters: list[torch.nn.Parameter]) -> list[Tensor]:
    """Of a sharded model the part that this process holds, in the same memory: the average is
    sharded alike."""
    return [
        p.to_local().detach().requires_grad_() if isinstance(p, DTensor) else p for p in parameters
    ]


def _reshard(model: torch.nn.Module):
    """Whole weights that a sharded model still holds from its last pass are older than its parts."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _generators(indices: Tensor, epoch: int, seed: int) -> list[torch.Generator]:
    """The noise of an example is its own: the same in whichever process and batch it stands."""
    seeds = (seed * 1_000_003 + epoch) * 1_000_003 + indices.cpu()  # wraps around at 2^64
    return [torch.Generator().manual_seed(value) for value in seeds.tolist()]


def _diverged(name: str, loss: float, step: int, checkpoints: Checkpoints | None) -> str:
    saved = checkpoints.of(name) if checkpoints else []
    advice = f"the last checkpoint before is {saved[-1]}" if saved else "there is no checkpoint"
    return f"the loss of {name} became {loss} at step {step}; {advice}"


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
    identity = identify(name, config, settings, train, run)
    if run.is_done(name, identity):
        return run.level(index)
    set_seed(settings.seed)
    level = ProgressiveVAELevel(config)
    if config.quantizer == "vq":
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
    identity = identify(f"refit_level_{index}", level.config, settings, codes, run)
    if run.is_done(f"level_{index}", identity):
        return old
    _fit_level(run, index, level, pairs, settings, identity)
    return level


def identify(
    phase: str,
    config: ProgressiveVAELevelConfig | ProgressiveVAEPriorConfig,
    settings: FitSettings,
    train: GridDataset | PixelStream,
    run: Run,
) -> dict[str, Any]:
    """All that the weights of a phase depend on, and nothing else, as JSON holds it."""
    fields = asdict(settings)
    for name in ("logging_steps", "validation_steps", "dataloader_num_workers"):
        del fields[name]
    identity = {
        "phase": phase,
        "config": {k: v for k, v in config.to_dict().items() if k not in WRITTEN_BY},
        "data": {**asdict(train.manifest), "num_examples": train.num_examples},
        "num_processes": run.accelerator.num_processes,
        "gradient_accumulation_steps": run.accelerator.gradient_accumulation_steps,
        "mixed_precision": run.accelerator.mixed_precision,
        **fields,
    }
    return json.loads(json.dumps(identity))


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
    run.record(name, _images_seen(settings, accelerator), progress.seconds, **figures)
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
    identity = identify("prior", config, settings, train, run)
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
    run.record("prior", _images_seen(settings, accelerator), progress.seconds)
    run.logged_steps += settings.max_train_steps
    run.save(prior, "prior", identity)
    return prior


def _images_seen(settings: FitSettings, accelerator: Accelerator) -> int:
    return (
        settings.max_train_steps
        * settings.train_batch_size
        * accelerator.num_processes
        * accelerator.gradient_accumulation_steps
    )
