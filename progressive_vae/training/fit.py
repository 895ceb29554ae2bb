"""The training loop `Fit`, which all phases use, on one process or several.

Noise and order of the examples depend on seed, epoch and example, not on the process: two processes
with half the batch size compute the steps of one. A model may be sharded over processes (FSDP2).
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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
from torch.utils.data import DataLoader, Sampler, default_collate
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.augmentation import AugmentedDataset
from ..data.code_cache import GridDataset, PairedDataset
from ..data.streaming import PixelStream
from .args import FitSettings, RunSettings
from .checkpoints import Checkpoints, Progress, is_sharded
from .early_stopping import EarlyStopping
from .mixed_precision import MixedPrecisionForward
from .muon import Muon, matrices_and_others

SHARDABLE_PHASES = ("prior", "decoder_", "refit_level_")
# Of levels, priors and `TransformerLayer`.
GATHERING_METHODS = (
    *("log_prob", "sample", "encode", "expectation", "expect"),
    *("attend", "project_visible"),
)


class ResumableSampler(Sampler):
    """The indices 0 … n − 1 in an order that depends only on seed and epoch.

    A fit that is resumed within an epoch therefore gets the examples that were left.
    """

    def __init__(self, count: int, seed: int):
        self.count = count
        self.seed = seed
        self.begin_at(0, 0)

    def begin_at(self, epoch: int, start: int):
        """Set the epoch of the next pass, which skips its first `start` indices."""
        self.epoch = epoch
        self.start = start

    def __len__(self) -> int:
        return self.count - self.start

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        for part in torch.randperm(self.count, generator=generator)[self.start :].split(1000):
            yield from part.tolist()


@dataclass
class Fit:
    """Minimize `model(**inputs).loss`: iterating over a fit, once, trains the model.

    The iterator yields the progress every `validation_steps` and at the end. Then the model is in
    evaluation mode and holds the averaged weights; it stays so after the last one. If the model has
    a method `after_step(output, gather)`, it is called after each batch.

    With `early_stopping_patience` the caller sets `progress.validation_loss` at each of them, and
    the model holds the weights of the lowest one at the end.

    Args:
        to_inputs: a batch of the data set -> keyword arguments of the model.
        identity: all that the weights depend on; `"phase"` is the name of the fit. A checkpoint
            with another identity is refused.
        run: seed, steps between validations and logs.
        checkpoints: where to save and to resume from; `None` for neither.
        logged_steps: optimization steps of earlier fits, added to the steps that trackers get.
        seconds: duration of the fit, which replaces `max_train_steps`. It includes the last
            validation, and after a resume the time before the checkpoint.
        start_time: `time.perf_counter()` at the start of the duration; `None`: now.
        title: of the progress bar; the default is the name of the fit.
        seconds_after: planned duration of later fits, which the progress bar adds.

    Raises:
        FloatingPointError: the loss is infinite or NaN at a step that is logged, or the weights are
            at a step that is saved.
        SystemExit: with code 0, after a checkpoint, if `checkpoints.stop` has been called.
    """

    model: PreTrainedModel
    dataset: GridDataset | PairedDataset | AugmentedDataset | PixelStream
    to_inputs: Callable[[dict[str, Any]], dict[str, Any]]
    accelerator: Accelerator
    settings: FitSettings
    identity: dict[str, Any]
    run: RunSettings = field(default_factory=RunSettings)
    checkpoints: Checkpoints | None = None
    logged_steps: int = 0
    seconds: float | None = None
    start_time: float | None = None
    title: str | None = None
    seconds_after: float = 0.0

    def __post_init__(self):
        self.name = self.identity["phase"]
        if is_sharded(self.accelerator) and not self.name.startswith(SHARDABLE_PHASES):
            raise ValueError(
                f"expected FSDP for the prior or a decoder alone, {SHARDABLE_PHASES}, got it for "
                f"{self.name}, which trains a codebook"
            )
        norm = self.settings.max_grad_norm
        self.max_grad_norm = math.inf if norm is None else norm
        patience = self.settings.early_stopping_patience
        self.early_stopping = None if patience is None else EarlyStopping(patience)

    def __iter__(self) -> Iterator[Progress]:
        self._set_up()
        for batch in self._batches():
            output = self._accumulate_gradients(batch)
            if not self.accelerator.sync_gradients:
                continue  # the other batches of this optimization step are still to come
            self._update_average()
            is_validation, is_final = self._advance_schedule()
            if self.progress.step % self.run.logging_steps == 0 or is_final:
                self._log(output.loss)
            if is_final:
                self._check_weights()  # they replace the previous ones when the phase is saved
            if is_validation or is_final:
                # The caller validates the averaged weights while the loop waits here.
                self._begin_validation()
                start = time.perf_counter()
                yield self.progress
                is_final = self._stops_early() or is_final
                self._end_validation(start, is_final)
            if is_final:
                break
            self._save_if_due()
        self._tear_down()

    def _set_up(self):
        """Make loader, optimizer, schedule and average, and load the checkpoint to resume from."""
        start_time = time.perf_counter() if self.start_time is None else self.start_time
        accelerator = self.accelerator
        set_seed(self.run.seed, device_specific=True)  # a backbone may have dropout
        self.loader, self.order = _make_loader(
            self.dataset, accelerator, self.settings.train_batch_size, self.run
        )
        # FSDP shards contiguous parameters only.
        memory_format = torch.contiguous_format if is_sharded(accelerator) else torch.channels_last
        model = self.model.to(accelerator.device, memory_format=memory_format)
        if self.run.gradient_checkpointing:
            # The name of transformers 5.24 and later, and the one before.
            name = "activation_checkpointing_enable"
            getattr(model, name, model.gradient_checkpointing_enable)()
        optimizer = _make_optimizer(model, self.settings)
        self.scheduler = get_scheduler(
            self.settings.lr_scheduler,
            optimizer,
            num_warmup_steps=self.settings.num_warmup_steps,
            num_training_steps=self.settings.max_train_steps,
        )
        self.wrapped, self.optimizer = accelerator.prepare(model, optimizer)
        self.wrapped.train()
        self.forward = MixedPrecisionForward(model, self.wrapped, accelerator)
        if is_sharded(accelerator):
            _gather_in_methods(self.wrapped)
        self.parameters = [p for p in self.wrapped.parameters() if p.requires_grad]
        self.average = EMAModel(
            _local(self.parameters), decay=self.settings.ema_decay, foreach=True
        )
        self.states = {"scheduler": self.scheduler, "average": self.average}
        if self.early_stopping is not None:
            self.states["early_stopping"] = self.early_stopping
        self.progress = Progress()
        if self.checkpoints is not None:
            self.progress = self.checkpoints.load(self.identity, self.states, accelerator)
            self.checkpoints.is_fitting = True
        self.zero_time = start_time - self.progress.elapsed  # time before the checkpoint counts
        self.bar = tqdm(
            total=self.settings.max_train_steps if self.seconds is None else None,
            initial=self.progress.step,
            desc=self.title or self.name,
            disable=not accelerator.is_local_main_process,
        )
        self.timer_start = time.perf_counter()

    def _batches(self) -> Iterator[dict[str, Any]]:
        """Yield the batches of this process, epoch after epoch, from where the progress is."""
        progress = self.progress
        while True:
            num_batches = progress.batch * self.accelerator.num_processes
            self.order.begin_at(progress.epoch, num_batches * self.settings.train_batch_size)
            for batch in _timed(self.loader, progress):
                progress.batch += 1
                yield batch
            if not progress.batch:
                raise ValueError(f"expected examples to fit {self.name} to, got none")
            progress.epoch += 1
            progress.batch = 0

    def _accumulate_gradients(self, batch: dict[str, Any]) -> Any:
        """Forward and backward pass, and a step of the optimizer if it is the last batch of one."""
        accelerator = self.accelerator
        noise = _generators(batch["index"], self.progress.epoch, self.run.seed)
        with accelerator.accumulate(self.wrapped):
            output = self.forward(**self.to_inputs(batch), generator=noise)
            accelerator.backward(output.loss)
            if accelerator.sync_gradients:
                self.grad_norm = accelerator.clip_grad_norm_(self.parameters, self.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        after_step = getattr(self.model, "after_step", None)
        if after_step is not None:
            after_step(output, accelerator.gather)
        return output

    def _update_average(self):
        if self.settings.use_ema:
            self.average.step(_local(self.parameters))

    def _advance_schedule(self) -> tuple[bool, bool]:
        """Count the step, set the learning rate; return whether to validate and whether to end."""
        progress = self.progress
        progress.step += 1
        is_validation = progress.step % self.run.validation_steps == 0
        if self.seconds is None:
            is_final = progress.step >= self.settings.max_train_steps
        else:
            # The schedule follows the clock, on which all processes have to agree.
            elapsed = self._synchronize(time.perf_counter() - self.zero_time)
            progress.elapsed = elapsed
            share = min(elapsed / self.seconds, 1.0)
            # The first validation comes early: it tells how long the last one will take.
            is_validation = is_validation or (not progress.validating and share > 0.1)
            # Time is reserved for the last validation, which is this one if no other would fit.
            is_final = elapsed + progress.validating * (1 + is_validation) >= self.seconds
            self.scheduler.last_epoch = int(share * self.settings.max_train_steps) - 1
        self.scheduler.step()
        self.bar.update()
        return is_validation, is_final

    def _log(self, loss: Tensor):
        """Send loss, gradient norm and learning rate to the trackers and the progress bar."""
        mean_loss = self.accelerator.reduce(loss.detach(), "mean").item()
        if not math.isfinite(mean_loss):
            raise FloatingPointError(
                self._divergence(f"the loss of {self.name} became {mean_loss}")
            )
        postfix = {"loss": f"{mean_loss:.4f}"}
        if self.seconds is not None:
            left = max(0.0, self.seconds - self.progress.elapsed)
            minutes = [f"{value / 60:.0f}" for value in (left, left + self.seconds_after)]
            postfix["left"] = f"{' of '.join(dict.fromkeys(minutes))} min"
        self.bar.set_postfix(postfix)
        values = {
            f"{self.name}/loss": mean_loss,
            f"{self.name}/grad_norm": float(self.grad_norm),
            f"{self.name}/lr": self.scheduler.get_last_lr()[0],
        }
        self.accelerator.log(values, step=self.logged_steps + self.progress.step)

    def _begin_validation(self):
        """Put the averaged weights into the model, in evaluation mode."""
        if self.settings.use_ema:
            self.average.store(_local(self.parameters))
            self.average.copy_to(_local(self.parameters))
            _reshard(self.wrapped)
        self.wrapped.eval()
        self.progress.seconds += time.perf_counter() - self.timer_start

    def _stops_early(self) -> bool:
        """Return whether the last validations were worse than the best one."""
        if self.early_stopping is None:
            return False
        loss = self._synchronize(self.progress.validation_loss)
        return self.early_stopping.update(self.progress.step, loss, self._weights())

    def _weights(self) -> list[Tensor]:
        """Return all that the model saves: its codebook may be a buffer."""
        return [*_local(self.parameters), *self.model.buffers()]

    def _end_validation(self, start: float, is_final: bool):
        """Restore the trained weights, unless the fit ends here."""
        self.timer_start = time.perf_counter()
        self.progress.validating = self._synchronize(self.timer_start - start)
        if self.settings.use_ema and not is_final:
            self.average.restore(_local(self.parameters))
            _reshard(self.wrapped)
        if self.early_stopping is not None and is_final:
            self.early_stopping.restore(self._weights())
            _reshard(self.wrapped)
        self.wrapped.train(not is_final)

    def _save_if_due(self):
        """Save a checkpoint every `checkpointing_steps`, and before a signal ends the program."""
        checkpoints, progress = self.checkpoints, self.progress
        if checkpoints is None:
            return
        if not checkpoints.is_due(progress.step, self.accelerator, self.run.logging_steps):
            return
        now = time.perf_counter()
        progress.seconds += now - self.timer_start
        progress.elapsed = now - self.zero_time
        self.timer_start = now
        self._check_weights()
        checkpoints.save(self.identity, progress, self.states, self.accelerator)
        if checkpoints.is_stopping:
            self.bar.close()
            self.accelerator.print(f"stopped in {self.name} at step {progress.step}, saved it")
            raise SystemExit(0)

    def _tear_down(self):
        self.bar.close()
        if self.checkpoints is not None:
            self.checkpoints.is_fitting = False
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        self.accelerator.free_memory()
        if self.forward.is_compiled:  # later fits run the same functions, whose graphs are limited
            torch.compiler.reset()

    def _synchronize(self, value: float) -> float:
        """Return the value of the main process, on all processes."""
        if self.accelerator.num_processes == 1:
            return value
        return broadcast(torch.tensor(value, device=self.accelerator.device)).item()

    def _check_weights(self):
        """Raise a `FloatingPointError` unless all weights are finite, as a save replaces good ones.

        It waits for the device; only steps that do so anyway call it.
        """
        finite = torch.stack([weights.isfinite().all() for weights in _local(self.parameters)])
        # Each process may hold a part of the weights.
        if self.accelerator.reduce(finite.all().float(), "mean").item() < 1:
            what = f"the weights of {self.name} became infinite or NaN"
            raise FloatingPointError(self._divergence(what))

    def _divergence(self, what: str) -> str:
        saved = self.checkpoints.of(self.name) if self.checkpoints else []
        place = f"the last checkpoint is {saved[-1]}" if saved else "there is no checkpoint"
        return (
            f"{what} at step {self.progress.step}: lower its learning_rate or raise its "
            f"lr_warmup_steps; {place}"
        )


def _make_optimizer(model: PreTrainedModel, settings: FitSettings) -> Muon:
    matrices, others = matrices_and_others(model)
    if settings.optimizer == "adamw":
        others = matrices + others
        matrices = []
    return Muon(
        matrices,
        others,
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        weight_decay=settings.adam_weight_decay,
    )


def _timed(loader: DataLoader, progress: Progress) -> Iterator[dict]:
    """Yield the batches, and add the time spent waiting for them to `progress.waited`."""
    batches = iter(loader)
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        progress.waited += time.perf_counter() - start
        if batch is None:
            return
        yield batch


def _make_loader(
    dataset: GridDataset | PairedDataset | AugmentedDataset | PixelStream,
    accelerator: Accelerator,
    batch_size: int,
    run: RunSettings,
) -> tuple[DataLoader, ResumableSampler | PixelStream]:
    """Return the loader of this process, and what sets the position in its data (`begin_at`)."""
    options: dict[str, Any] = dict(
        batch_size=batch_size,
        num_workers=run.dataloader_num_workers,
        persistent_workers=run.dataloader_num_workers > 0,
        worker_init_fn=_ignore_signals,
        pin_memory=accelerator.device.type == "cuda",
        collate_fn=_collate,
        generator=torch.Generator().manual_seed(run.seed),  # of the workers
    )
    if isinstance(dataset, PixelStream):
        share = dataset.share(accelerator.process_index, accelerator.num_processes)
        loader = DataLoader(share, **options)
        # The stream is divided among processes already: Accelerate only moves its batches.
        loader = prepare_data_loader(
            loader,
            accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,  # else the main process would read for all
            non_blocking=accelerator.non_blocking,
        )
        return loader, share
    order = ResumableSampler(len(dataset), run.seed)
    drop_last = len(dataset) >= batch_size * accelerator.num_processes
    loader = DataLoader(dataset, sampler=order, drop_last=drop_last, **options)
    return accelerator.prepare(loader), order


def _collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a batch whose indices are a list: Accelerate leaves it on the host, which reads it."""
    indices = [example["index"] for example in examples]
    rest = [{k: v for k, v in example.items() if k != "index"} for example in examples]
    return {**default_collate(rest), "index": indices}


def _ignore_signals(worker: int):
    """Ignore Ctrl-C and the SIGTERM of `timeout` and Slurm, which also reach the workers.

    The workers have to run until the fit has saved; then its `DataLoader` ends them.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _local(parameters: list[torch.nn.Parameter]) -> list[Tensor]:
    """Return the part of sharded parameters that this process holds, in the same memory.

    So the averaged weights are sharded as the model is.
    """
    return [
        p.to_local().detach().requires_grad_() if isinstance(p, DTensor) else p for p in parameters
    ]


def _gather_in_methods(model: torch.nn.Module):
    """Let the methods of a sharded model gather its weights, as its forward does."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for name in GATHERING_METHODS:
                if hasattr(module, name):
                    register_fsdp_forward_method(module, name)


def _reshard(model: torch.nn.Module):
    """Drop the gathered weights of a sharded model, which are stale after its parts changed."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _generators(indices: list[int], epoch: int, seed: int) -> list[torch.Generator]:
    """Return a generator for each example: its noise does not depend on process and batch."""
    start = (seed * 1_000_003 + epoch) * 1_000_003
    return [torch.Generator().manual_seed((start + i) % 2**64) for i in indices]
