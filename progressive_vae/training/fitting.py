"""One loss minimised: `fit()`, through which all phases go, on one process or many.

Noise and order depend on the seed, the epoch and the example, not on the process: two processes
with half the batch see what one sees. A model may be sharded over the processes (FSDP2).
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import set_seed
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..prior import ProgressiveVAEPrior
from .checkpoints import Checkpoints, Progress, is_sharded
from .codes import GridDataset, PairedDataset
from .muon import Muon, matrices_and_others
from .streaming import PixelStream

OPTIMIZERS = ("muon", "adamw")
# The others need more than the names of this file say.
SCHEDULERS = tuple(each.value for each in SchedulerType if each.value != "piecewise_constant")


@dataclass(frozen=True)
class FitSettings:
    """How to minimise one loss; the names are those of diffusers' training scripts.

    Args:
        optimizer: `"muon"`, which has AdamW for what are no matrices, or `"adamw"`.
        lr_scheduler: a name of diffusers' `SchedulerType`.
        max_grad_norm: 0 for no clipping.
    """

    max_train_steps: int = 1000
    train_batch_size: int = 64
    optimizer: str = "muon"
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
            self._check(name, getattr(self, name) >= 1, ">= 1")
        for name in ("lr_warmup_steps", "adam_weight_decay", "dataloader_num_workers"):
            self._check(name, 0 <= getattr(self, name) < math.inf, ">= 0")
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            self._check(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        self._check("max_grad_norm", self.max_grad_norm >= 0, ">= 0 (0: no clipping)")
        self._check("learning_rate", 0 < self.learning_rate < math.inf, "> 0")
        self._check("seed", 0 <= self.seed < 2**32, "in 0 … 2³² − 1")
        self._check("optimizer", self.optimizer in OPTIMIZERS, f"among {OPTIMIZERS}")
        self._check("lr_scheduler", self.lr_scheduler in SCHEDULERS, f"among {SCHEDULERS}")

    def _check(self, name: str, is_right: bool, expected: str):
        if not is_right:  # so that NaN is never right
            raise ValueError(f"expected {name} {expected}, got {getattr(self, name)!r}")


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
        for part in torch.randperm(self.count, generator=generator)[self.start :].split(1000):
            yield from part.tolist()


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
    matrices, others = matrices_and_others(model)
    if settings.optimizer == "adamw":
        matrices, others = [], matrices + others
    optimizer = Muon(
        matrices,
        others,
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
        for batch in _timed(loader, progress):
            progress.batch += 1
            noise = _generators(batch["index"], progress.epoch, settings.seed)
            with accelerator.accumulate(wrapped):
                output = wrapped(**to_inputs(batch), generator=noise)
                accelerator.backward(output.loss)
                if accelerator.sync_gradients:
                    most = settings.max_grad_norm or math.inf
                    norm = accelerator.clip_grad_norm_(parameters, most)
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


def _timed(loader: DataLoader, progress: Progress) -> Iterator[dict]:
    """The batches; the time spent waiting for them is added up."""
    batches = iter(loader)
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        progress.waited += time.perf_counter() - start
        if batch is None:
            return
        yield batch


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
        pin_memory=accelerator.device.type == "cuda",
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
    """Drop the whole weights that a sharded model holds from before its parts changed."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _generators(indices: Tensor, epoch: int, seed: int) -> list[torch.Generator]:
    """The noise of an example is its own: the same in whichever process and batch it stands."""
    start = (seed * 1_000_003 + epoch) * 1_000_003
    return [torch.Generator().manual_seed((start + i) % 2**64) for i in indices.tolist()]


def _diverged(name: str, loss: float, step: int, checkpoints: Checkpoints | None) -> str:
    saved = checkpoints.of(name) if checkpoints else []
    advice = f"the last checkpoint before is {saved[-1]}" if saved else "there is no checkpoint"
    return f"the loss of {name} became {loss} at step {step}; {advice}"
