"""The settings of one fit, and of a whole run."""

import math
from dataclasses import dataclass

from accelerate.tracking import get_available_trackers
from diffusers.optimization import SchedulerType

from ..data.args import check, expand_paths

OPTIMIZERS = ("muon", "adamw")
# The others need more than the names of this file say.
SCHEDULERS = tuple(each.value for each in SchedulerType if each.value != "piecewise_constant")
PRECISIONS = ("no", "bf16", "fp16")


@dataclass(frozen=True)
class FitSettings:
    """How to minimize one loss; the names are those of diffusers' training scripts.

    Args:
        max_train_steps: optimization steps; where a run has `max_train_minutes`, those that the
            schedule of the learning rate speaks of, which then lasts as long as the fit.
        time_share: of `max_train_minutes`, beside the shares of the other fits.
        train_batch_size: images a step, on each process.
        optimizer: "muon", which has AdamW for what are no matrices, or "adamw".
        learning_rate: after warm-up.
        lr_scheduler: a name of diffusers' `SchedulerType`.
        lr_warmup_steps: steps of warm-up.
        lr_warmup_share: of all steps, which warm-up takes at most.
        adam_beta1: decay of the gradient's mean; Muon's momentum too.
        adam_beta2: decay of its square.
        adam_weight_decay: decoupled weight decay.
        max_grad_norm: longer gradients are clipped; null for no clipping.
        use_ema: end with averaged weights.
        ema_decay: of that average.
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
        norm = self.max_grad_norm
        check(self, "max_grad_norm", norm is None or norm > 0, "> 0, or null for no clipping")
        check(self, "optimizer", self.optimizer in OPTIMIZERS, f"among {OPTIMIZERS}")
        check(self, "lr_scheduler", self.lr_scheduler in SCHEDULERS, f"among {SCHEDULERS}")

    @property
    def num_warmup_steps(self) -> int:
        return min(self.lr_warmup_steps, int(self.lr_warmup_share * self.max_train_steps))


@dataclass(frozen=True)
class PriorFitSettings(FitSettings):
    """How to fit the prior, a transformer on few symbols: it learns quickly, and soon by heart."""

    __doc__ = f"{__doc__}\n{FitSettings.__doc__}"

    max_train_steps: int = 5000
    time_share: float = 0.1
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    adam_weight_decay: float = 0.1


@dataclass(frozen=True)
class RunSettings:
    """Where a run writes, how it is watched and saved, and on what arithmetic it runs.

    Args:
        output_dir: the pipeline's folder.
        finest_level: folder of a level to start from: only what is coarser is trained.
        extend: folder of a pipeline that gets one more level, coarser than its others.
        max_train_minutes: the time that all fits share as their `time_share` says; null: they
            take as many steps as they say.
        seed: of everything.
        mixed_precision: no, bf16 or fp16; as Accelerate is configured if not given. On CPUs that
            emulate 16-bit floats bf16 becomes no.
        gradient_accumulation_steps: batches that make a step.
        dataloader_num_workers: processes that read the cached grids.
        logging_steps: steps from one logged loss to the next.
        validation_steps: steps from one validation to the next.
        num_validation_images: images that its picture shows.
        report_to: a tracker's name, "all" or "none".
        logging_dir: of the trackers, in output_dir.
        checkpointing_steps: steps from one checkpoint to the next; null: only when told to stop.
        checkpoints_total_limit: checkpoints of a phase that are kept; null: all.
        hub_license: of the weights, for the card; as the Hub names it.
    """

    output_dir: str = "runs/progressive_vae"
    finest_level: str | None = None
    extend: str | None = None
    max_train_minutes: float | None = None
    seed: int = 0
    mixed_precision: str | None = None
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

    def __post_init__(self):
        expand_paths(self, "output_dir", "finest_level", "extend", "logging_dir")
        for name in ("gradient_accumulation_steps", "logging_steps", "validation_steps",
                     "num_validation_images"):  # fmt: skip
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
        check(self, "mixed_precision", self.mixed_precision in (None, *PRECISIONS),
              f"among {PRECISIONS}")  # fmt: skip
        trackers = [*map(str, get_available_trackers()), "none", "all"]
        check(self, "report_to", self.report_to in trackers,
              f"among {trackers}, the trackers that are installed")  # fmt: skip
