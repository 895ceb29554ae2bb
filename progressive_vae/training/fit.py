"""One loss minimized: `fit()`, through which all phases go, on one process or many.

Noise and order depend on the seed, the epoch and the example, not on the process: two processes
with half the batch see what one sees. A model may be sharded over the processes (FSDP2).
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.code_cache import GridDataset, PairedDataset
from ..data.streaming import PixelStream
from ..models.prior import ProgressiveVAEPrior
from .args import FitSettings, RunSettings
from .checkpoints import Checkpoints, Progress, is_sharded
from .muon import Muon, matrices_and_others


class ResumableSampler(Sampler):
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
    *,
    run: RunSettings | None = None,
    checkpoints: Checkpoints | None = None,
    logged_steps: int = 0,
    seconds: float | None = None,
    began: float | None = None,
    title: str | None = None,
    seconds_after: float = 0.0,
) -> Iterator[Progress]:
    """Minimise `model(**inputs).loss`; a generator that pauses for each validation.

    It yields where it stands every `validation_steps` and at the end, with the averaged weights in
    the model, in evaluation mode; the model is left that way after the last one. A model that has
    an `after_step(output, gather)` gets it called after each step.

    Args:
        to_inputs: a batch of the data set -> keywords of the model.
        identity: of the fit, `"phase"` its name: a checkpoint of another one is refused.
        run: how it is watched; `None` stands for the defaults.
        checkpoints: where to save and go on from; `None` for neither.
        logged_steps: added to the steps that the trackers see.
        seconds: how long it lasts, in place of `max_train_steps`; the last validation is among
            them, and after a resume all that came before the checkpoint.
        began: since when they pass, as `time.perf_counter()` tells; `None`: from now.
        title: of the bar; the phase's name where not given.
        seconds_after: what else is to be done then, of which the bar tells, too.

    Raises:
        FloatingPointError: the loss is infinite or NaN at a step that is logged, or the weights are
            at one that is saved.
        SystemExit: with code 0, after a checkpoint, where `checkpoints.stop` has been called.
    """
    name, run = identity["phase"], run or RunSettings()
    began = time.perf_counter() if began is None else began
    set_seed(run.seed, device_specific=True)  # a backbone may have dropout
    loader, order = _loader(dataset, accelerator, settings.train_batch_size, run)
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
        num_warmup_steps=settings.num_warmup_steps,
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
    began -= progress.elapsed
    max_norm = math.inf if settings.max_grad_norm is None else settings.max_grad_norm
    bar = tqdm(
        total=settings.max_train_steps if seconds is None else None,
        initial=progress.step,
        desc=title or name,
        disable=not accelerator.is_local_main_process,
    )
    clock, is_final = time.perf_counter(), False
    while not is_final:
        batches_of_all = progress.batch * accelerator.num_processes
        order.begin_at(progress.epoch, batches_of_all * settings.train_batch_size)
        for batch in _timed(loader, progress):
            progress.batch += 1
            noise = _generators(batch["index"], progress.epoch, run.seed)
            with accelerator.accumulate(wrapped):
                output = wrapped(**to_inputs(batch), generator=noise)
                accelerator.backward(output.loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(parameters, max_norm)
                optimizer.step()
                optimizer.zero_grad()
            if hasattr(model, "after_step"):
                model.after_step(output, accelerator.gather)
            if not accelerator.sync_gradients:
                continue
            if settings.use_ema:
                average.step(_local(parameters))
            progress.step += 1
            step = progress.step
            is_due = step % run.validation_steps == 0
            if seconds is None:
                is_final = step >= settings.max_train_steps
            else:  # the schedule goes by the clock, on which all processes have to agree
                progress.elapsed = _agreed(time.perf_counter() - began, accelerator)
                share = min(progress.elapsed / seconds, 1.0)
                # What a validation takes is known after the first, which therefore comes early.
                is_due = is_due or (not progress.validating and share > 0.1)
                # Time is left for the last one, which is this one if no other would fit.
                is_final = progress.elapsed + progress.validating * (1 + is_due) >= seconds
                scheduler.last_epoch = int(share * settings.max_train_steps) - 1
            scheduler.step()
            bar.update()
            if step % run.logging_steps == 0 or is_final:
                loss = accelerator.reduce(output.loss.detach(), "mean").item()
                if not math.isfinite(loss):
                    what = f"the loss of {name} became {loss}"
                    raise FloatingPointError(_diverged(what, name, step, checkpoints))
                figures = {"loss": loss, "grad_norm": float(norm), "lr": scheduler.get_last_lr()[0]}
                shown = {"loss": f"{loss:.4f}"}
                if seconds is not None:
                    left = max(0.0, seconds - progress.elapsed)
                    minutes = [f"{each / 60:.0f}" for each in (left, left + seconds_after)]
                    shown["left"] = f"{' of '.join(dict.fromkeys(minutes))} min"
                bar.set_postfix(shown)
                logged = {f"{name}/{k}": v for k, v in figures.items()}
                accelerator.log(logged, step=logged_steps + step)
            if is_final:
                _check_weights(parameters, accelerator, name, step, checkpoints)
            if is_due or is_final:
                if settings.use_ema:
                    average.store(_local(parameters))
                    average.copy_to(_local(parameters))
                    _reshard(wrapped)
                wrapped.eval()
                progress.seconds += time.perf_counter() - clock
                begun = time.perf_counter()
                yield progress
                clock = time.perf_counter()
                progress.validating = _agreed(clock - begun, accelerator)
                if settings.use_ema and not is_final:
                    average.restore(_local(parameters))
                    _reshard(wrapped)
                wrapped.train(not is_final)
            if is_final:
                break
            if checkpoints and checkpoints.is_due(step, accelerator, run.logging_steps):
                progress.seconds += time.perf_counter() - clock
                clock = time.perf_counter()
                progress.elapsed = clock - began
                _check_weights(parameters, accelerator, name, step, checkpoints)
                checkpoints.save(identity, progress, states, accelerator)
                if checkpoints.is_stopping:
                    bar.close()
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
    batch_size: int,
    run: RunSettings,
) -> tuple[DataLoader, ResumableSampler | PixelStream]:
    """The batches of this process, and what is told where they begin."""
    shared: dict[str, Any] = dict(
        batch_size=batch_size,
        num_workers=run.dataloader_num_workers,
        persistent_workers=run.dataloader_num_workers > 0,
        worker_init_fn=_ignore_signals,
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator().manual_seed(run.seed),  # of the workers
    )
    if isinstance(dataset, PixelStream):
        share = dataset.share(accelerator.process_index, accelerator.num_processes)
        loader = DataLoader(share, **shared)
        # Only moved to the device: the stream is divided already.
        return prepare_data_loader(
            loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True
        ), share
    order = ResumableSampler(len(dataset), run.seed)
    drop_last = len(dataset) >= batch_size * accelerator.num_processes
    loader = DataLoader(dataset, sampler=order, drop_last=drop_last, **shared)
    return accelerator.prepare(loader), order


def _ignore_signals(worker: int):
    """Ctrl-C, and the SIGTERM of `timeout` and Slurm, reach workers too. They have to live on until
    the fit has saved; then its `DataLoader` ends them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _agreed(seconds: float, accelerator: Accelerator) -> float:
    """What the main process says of them."""
    if accelerator.num_processes == 1:
        return seconds
    told = torch.tensor(seconds, device=accelerator.device)
    return broadcast(told).item()


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


def _check_weights(
    parameters: list[torch.nn.Parameter],
    accelerator: Accelerator,
    name: str,
    step: int,
    checkpoints: Checkpoints | None,
):
    """Raise a `FloatingPointError` unless all weights are finite: those that are saved replace
    good ones. It waits for the device, and is for steps that do so anyway."""
    is_finite = torch.stack([weights.isfinite().all() for weights in _local(parameters)]).all()
    if accelerator.reduce(is_finite.float(), "mean").item() < 1:  # each process may hold a part
        what = f"the weights of {name} became infinite or NaN"
        raise FloatingPointError(_diverged(what, name, step, checkpoints))


def _diverged(what: str, name: str, step: int, checkpoints: Checkpoints | None) -> str:
    saved = checkpoints.of(name) if checkpoints else []
    place = f"the last checkpoint before is {saved[-1]}" if saved else "there is no checkpoint"
    return f"{what} at step {step}: lower its learning_rate or raise its lr_warmup_steps; {place}"
