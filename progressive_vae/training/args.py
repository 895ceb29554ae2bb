"""Settings of one fit and of a run."""

import math
from dataclasses import dataclass

from accelerate.tracking import get_available_trackers
from diffusers.optimization import SchedulerType

from ..data.args import check, expand_paths

OPTIMIZERS = ("muon", "adamw")
# "piecewise_constant" needs rules that these settings do not have.
SCHEDULERS = tuple(
    scheduler.value for scheduler in SchedulerType if scheduler.value != "piecewise_constant"
)
PRECISIONS = ("no", "bf16", "fp16")


@dataclass(frozen=True)
class FitSettings:
    """Optimization of one loss; the names are those of diffusers' training scripts.

    Args:
        max_train_steps: optimization steps. If a run has `max_train_minutes`, only the schedule of
            the learning rate uses them, and the clock decides its position.
        time_share: relative part of `max_train_minutes`.
        train_batch_size: images of a batch on each process.
        optimizer: "muon", with AdamW for parameters that are no matrices, or "adamw".
        learning_rate: after warm-up.
        lr_scheduler: a name of diffusers' `SchedulerType`.
        lr_warmup_steps: steps of warm-up.
        lr_warmup_share: maximal part of all steps that warm-up takes.
        adam_beta1: decay of the gradient's mean in AdamW; the momentum of Muon is 0.95.
        adam_beta2: decay of the squared gradient's mean.
        adam_weight_decay: decoupled weight decay.
        max_grad_norm: norm to which longer gradients are clipped; null for no clipping.
        use_ema: validate and save averaged weights.
        ema_decay: of that average.
        early_stopping_patience: validations in sequence without fewer bits, on images held out by
            `validation_fraction`, after which the fit ends; its best weights are saved. null: the
            last weights are saved.
    """

    max_train_steps: int = 10_000
    time_share: float = 1.0
    train_batch_size: int = 64
    optimizer: str = "muon"
    learning_rate: float = 2e-3
    lr_scheduler: str = "cosine"
    lr_warmup_steps: int = 100
    lr_warmup_share: float = 0.25
    adam_beta1: float = 0.9
    adam_beta2: float = 0.99
    adam_weight_decay: float = 0.01
    max_grad_norm: float | None = 1.0
    use_ema: bool = True
    ema_decay: float = 0.999
    early_stopping_patience: int | None = None

    def __post_init__(self):
        for name in ("max_train_steps", "train_batch_size"):
            check(self, name, getattr(self, name) >= 1, ">= 1")
        for name in ("lr_warmup_steps", "adam_weight_decay"):
            check(self, name, 0 <= getattr(self, name) < math.inf, ">= 0")
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            check(self, name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        for name in ("learning_rate", "time_share"):
            check(self, name, 0 < getattr(self, name) < math.inf, "> 0")
        check(self, "lr_warmup_share", 0 <= self.lr_warmup_share <= 1, "in [0, 1]")
        patience = self.early_stopping_patience
        check(self, "early_stopping_patience", patience is None or patience >= 1, ">= 1 or null")
        norm = self.max_grad_norm
        check(self, "max_grad_norm", norm is None or norm > 0, "> 0, or null for no clipping")
        check(self, "optimizer", self.optimizer in OPTIMIZERS, f"among {OPTIMIZERS}")
        check(self, "lr_scheduler", self.lr_scheduler in SCHEDULERS, f"among {SCHEDULERS}")

    @property
    def num_warmup_steps(self) -> int:
        return min(self.lr_warmup_steps, int(self.lr_warmup_share * self.max_train_steps))


@dataclass(frozen=True)
class PriorFitSettings(FitSettings):
    """Optimization of the prior: a transformer on few codes, which overfits early."""

    __doc__ = f"{__doc__}\n{FitSettings.__doc__}"

    max_train_steps: int = 5000
    time_share: float = 0.1
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    adam_weight_decay: float = 0.1


@dataclass(frozen=True)
class RunSettings:
    """Output, logging, checkpoints and precision of a run.

    Args:
        output_dir: folder of the pipeline.
        finest_level: folder of a pretrained finest level: only coarser ones are trained.
        extend: folder of a pipeline that gets one more level, the coarsest.
        max_train_minutes: time of the run, with its metrics and images; null: the
            `max_train_steps` of the fits count.
        seed: of all random numbers.
        mixed_precision: no, bf16 or fp16; by default as Accelerate is configured. On CPUs that
            emulate bf16 it becomes no.
        compile: compile the stages of decoders and the layers of priors by torch.compile.
        gradient_checkpointing: the backward pass computes activations again, in a third more time,
            so that they do not fill the memory.
        gradient_accumulation_steps: batches of an optimization step.
        dataloader_num_workers: processes that read the examples.
        logging_steps: steps between logged losses.
        validation_steps: steps between validations.
        num_validation_images: images of each validation's grid.
        report_to: a tracker's name, "all" or "none".
        logging_dir: of the trackers, in output_dir.
        checkpointing_steps: steps between checkpoints; null: only before the run is stopped.
        checkpoints_total_limit: retained checkpoints of a phase; null: all.
        hub_license: of the weights, for the model card; an identifier of the Hub.
        save_text_encoder: save the text encoder of captions with the pipeline; if false, the
            pipeline names it and loads it with the first prompt.
    """

    output_dir: str = "runs/progressive_vae"
    finest_level: str | None = None
    extend: str | None = None
    max_train_minutes: float | None = None
    seed: int = 0
    mixed_precision: str | None = None
    compile: bool = False
    gradient_checkpointing: bool = False
    gradient_accumulation_steps: int = 1
    dataloader_num_workers: int = 0
    logging_steps: int = 50
    validation_steps: int = 1000
    num_validation_images: int = 8
    report_to: str = "tensorboard"
    logging_dir: str = "logs"
    checkpointing_steps: int | None = 500
    checkpoints_total_limit: int | None = 2
    hub_license: str = "apache-2.0"
    save_text_encoder: bool = True

    def __post_init__(self):
        expand_paths(self, "output_dir", "finest_level", "extend", "logging_dir")
        for name in (
            "gradient_accumulation_steps",
            "logging_steps",
            "validation_steps",
            "num_validation_images",
        ):
            check(self, name, getattr(self, name) >= 1, ">= 1")
        for name in ("checkpointing_steps", "checkpoints_total_limit"):
            value = getattr(self, name)
            check(self, name, value is None or value >= 1, ">= 1 or null")
        is_path = isinstance(self.output_dir, str) and self.output_dir != ""
        check(self, "output_dir", is_path, "to be a folder")
        minutes = self.max_train_minutes
        check(self, "max_train_minutes", minutes is None or 0 < minutes < math.inf, "> 0 or null")
        check(self, "dataloader_num_workers", self.dataloader_num_workers >= 0, ">= 0")
        check(self, "seed", 0 <= self.seed < 2**32, "in 0 … 2³² − 1")
        precisions = (None, *PRECISIONS)
        check(self, "mixed_precision", self.mixed_precision in precisions, f"among {PRECISIONS}")
        trackers = [*map(str, get_available_trackers()), "none", "all"]
        installed = f"among {trackers}, the trackers that are installed"
        check(self, "report_to", self.report_to in trackers, installed)
