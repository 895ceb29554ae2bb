"""Train a progressive VAE level by level, and its prior; evaluate it; write the pipeline.

    accelerate launch examples/train.py
        scikit-learn's digits (examples/configs/digits.yaml), N = 2: one minute on two CPU cores.

    accelerate launch examples/train.py --config examples/configs/fashion_mnist.yaml
        Fashion-MNIST, N = 2: 2.88 bits/dim in 105 minutes on one CPU core.

    accelerate launch examples/train.py --train_data_dir pictures --num_levels 3 --resolution 64 \
            --center_crop --mixed_precision bf16 --output_dir runs/pictures
        a folder of colour pictures.

A YAML file (`--config`) sets defaults, flags win. Lists over levels start with the coarsest level;
one value stands for all levels. `--phase` runs one phase again from the saved artefacts.
"""

import copy
import json
import os
import platform
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

from progressive_vae import (
    ProgressiveVAELevel,
    ProgressiveVAELevelConfig,
    ProgressiveVAEPipeline,
    ProgressiveVAEPrior,
    ProgressiveVAEPriorConfig,
    __version__,
)
from progressive_vae.card import PICTURES, figures_table
from progressive_vae.chain import MAX_LEVELS, check_image_size, grid_sizes
from progressive_vae.configuration import (
    CORRUPTIONS,
    DECODER_FIELDS,
    DECODER_ORDERS,
    PIXEL_DISTRIBUTIONS,
    QUANTIZERS,
)
from progressive_vae.fingerprint import fingerprint
from progressive_vae.hub import (
    INDEX,
    METRICS,
    figures,
    open_repository,
    push_or_warn,
    weights_digest,
    write_card,
)
from progressive_vae.saved import read_json, write_json
from progressive_vae.training.checkpoints import Checkpoints
from progressive_vae.training.data import MAX_IMAGE_PIXELS
from progressive_vae.training.evaluation import (
    distance_of_samples,
    evaluate,
    label_accuracy,
    reconstruction_grid,
    sample_grid,
    sampling_speed,
    train_classifier,
)
from progressive_vae.training.fitting import OPTIMIZERS, FitSettings
from progressive_vae.training.phases import plan, refit_level, train_level, train_prior
from progressive_vae.training.run import LOCK, OWNER, PHASES, Run, locked
from progressive_vae.training.sources import open_source

SETTINGS = "settings.json"
PRECISIONS = ("no", "bf16", "fp16")
MIN_FOR_DISTANCE = 2  # images whose features have a covariance
BESIDE_THE_PIPELINE = ("cache/", "logs/", "validation/", "checkpoint-*/", "*.incomplete",
                       "*.replaced/", "history.json", PHASES, SETTINGS, LOCK, OWNER)  # fmt: skip


def _list(value, help: str):
    return field(default_factory=lambda: [value], metadata={"help": help})


@dataclass
class DataArguments:
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "id on the Hub, local path, or the embedded `digits`"},
    )
    dataset_config_name: str | None = None
    train_data_dir: str | None = field(
        default=None, metadata={"help": "a folder of images or of parquet files"}
    )
    image_column: str | None = None
    label_column: str | None = None
    train_split: str = "train"
    eval_split: str = "test"
    eval_fraction: float = field(
        default=0.1,
        metadata={"help": "held out of the training split where there is no eval_split"},
    )
    resolution: int | None = field(
        default=None, metadata={"help": "resize the shorter side; images keep their size without"}
    )
    center_crop: bool = False
    random_flip: bool = False
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    max_image_pixels: int = field(
        default=MAX_IMAGE_PIXELS, metadata={"help": "images of more are left out, and named"}
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "read the training images as they come, never all of them to a disk"},
    )
    shuffle_buffer_size: int = field(
        default=1000, metadata={"help": "images among which a stream is shuffled"}
    )


@dataclass
class ModelArguments:
    num_levels: int = field(default=2, metadata={"help": f"N, 1 to {MAX_LEVELS}"})
    codebook_size: list[int] = _list(64, "codes of each level")
    codebook_dim: list[int] = _list(0, "length of a code vector; 0: what the quantizer needs")
    downsample: list[int] = _list(2, "linear factor to the finer grid: 2, 4, 8 … 64")
    hidden_size: list[int] = _list(96, "width of the decoder")
    num_layers: list[int] = _list(2, "residual blocks of the decoder before each group")
    pixel_distribution: list[str] = _list(
        "categorical", f"of the finest level, one of {', '.join(PIXEL_DISTRIBUTIONS)}"
    )
    pixel_logit_rank: list[int] = _list(64, "of the ordinal table of pixel values; 0: free logits")
    encoder_hidden_size: list[int] = _list(64, "width of the encoder")
    encoder_num_layers: list[int] = _list(1, "residual blocks of the encoder on each grid")
    block_kernel_size: list[int] = _list(1, "1 or 3: of the second convolution of each block")
    decoder_order: list[str] = _list("lattice", f"one of {', '.join(DECODER_ORDERS)}")
    num_groups: list[int] = _list(0, "groups of the decoder; 0: what the order stands for")
    quantizer: list[str] = _list("vq", f"one of {', '.join(QUANTIZERS)}")
    gumbel_decay: list[float] = _list(0.999, "of gumbel: the temperature's factor at each batch")
    class_conditional: bool = field(
        default=True, metadata={"help": "give the prior the labels, where the data set has any"}
    )
    class_conditional_levels: list[int] = field(
        default_factory=list,
        metadata={"help": "numbers of the levels whose decoders are given the labels too"},
    )
    class_dropout: float = 0.1
    # Of the decoders that are fitted again; what is not given stays as it is.
    refit_hidden_size: list[int] | None = None
    refit_num_layers: list[int] | None = None
    refit_decoder_order: list[str] | None = None
    refit_num_groups: list[int] | None = None
    refit_corruption: list[float] | None = field(
        default=None, metadata={"help": "share of wrong codes they learn to bear, up to this"}
    )
    refit_corruption_kind: list[str] | None = field(
        default=None, metadata={"help": f"one of {', '.join(CORRUPTIONS)}"}
    )
    prior_config: str = field(
        default='{"model_type": "llama", "hidden_size": 128, "intermediate_size": 352, '
        '"num_hidden_layers": 4, "num_attention_heads": 4}',
        metadata={"help": "any causal-LM config of transformers, as JSON with its model_type"},
    )


@dataclass
class TrainingArguments:
    output_dir: str = field(
        default="runs/progressive_vae", metadata={"help": "the pipeline's folder"}
    )
    finest_level: str | None = field(
        default=None,
        metadata={"help": "folder of a level to start from: only what is coarser is trained"},
    )
    extend: str | None = field(
        default=None,
        metadata={"help": "folder of a pipeline that gets one more level, coarser than its others"},
    )
    phase: str = field(
        default="all", metadata={"help": "all, level_N … level_1, prior, refit_level_i or evaluate"}
    )
    max_train_steps: list[int] = _list(10_000, "optimisation steps of each level")
    train_batch_size: list[int] = _list(64, "images a step, on each process")
    optimizer: str = field(
        default="muon", metadata={"help": f"of the levels, one of {', '.join(OPTIMIZERS)}"}
    )
    learning_rate: list[float] = _list(2e-3, "after warm-up")
    refit_max_train_steps: list[int] = _list(0, "steps of a second fit of its decoder; 0: none")
    refit_train_batch_size: list[int] = _list(64, "images a step, on each process")
    refit_learning_rate: list[float] = _list(2e-3, "after warm-up")
    prior_max_train_steps: int = 5000
    prior_train_batch_size: int = 64
    prior_learning_rate: float = 1e-3
    gradient_accumulation_steps: int = 1
    lr_scheduler: str = "cosine"
    lr_warmup_steps: int = 100
    adam_beta1: float = 0.9
    adam_beta2: float = 0.99
    adam_weight_decay: float = 0.01
    prior_adam_weight_decay: float = 0.1
    max_grad_norm: float = field(default=1.0, metadata={"help": "0: no clipping"})
    use_ema: bool = True
    ema_decay: float = 0.999
    mixed_precision: str | None = field(
        default=None,
        metadata={"help": "no, bf16 or fp16; as Accelerate is configured if not given"},
    )
    dataloader_num_workers: int = 0
    logging_steps: int = 50
    validation_steps: int = 1000
    num_validation_images: int = 8
    report_to: str = field(default="tensorboard", metadata={"help": "a tracker's name, or none"})
    logging_dir: str = "logs"
    overwrite_cache: bool = False
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "replace what is in output_dir; with resume_from_checkpoint only what "
                  "other settings made"},
    )  # fmt: skip
    checkpointing_steps: int = field(default=500, metadata={"help": "0: only when told to stop"})
    checkpoints_total_limit: int = field(
        default=2, metadata={"help": "checkpoints of a phase that are kept; 0: all"}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "`latest`: leave out phases that are done and go on with the others; or "
            "the path of a checkpoint"
        },
    )
    push_to_hub: bool = field(
        default=False, metadata={"help": "push the pipeline once it is whole, and when it changes"}
    )
    hub_model_id: str | None = field(
        default=None, metadata={"help": "the repository; the name of output_dir if not given"}
    )
    hub_license: str = field(
        default="apache-2.0", metadata={"help": "of the weights, for the card; as the Hub names it"}
    )
    hub_private_repo: bool = field(
        default=False, metadata={"help": "else as your account has it by default"}
    )
    seed: int = 0


def parse(arguments: list[str]) -> tuple[DataArguments, ModelArguments, TrainingArguments]:
    """The flags, preceded by those that a YAML file stands for: of two alike the later wins."""
    parser = HfArgumentParser(
        (DataArguments, ModelArguments, TrainingArguments),
        description="Train a progressive VAE and write its pipeline. Without --config, "
        "--dataset_name and --train_data_dir the recipe is examples/configs/digits.yaml. "
        "A list has one value for each level, the coarsest first, or one for all.",
    )
    parser.add_argument("--config", help="YAML file of defaults")
    chosen = parser.parse_known_args(arguments)[0]
    path = chosen.config
    if not (path or chosen.dataset_name or chosen.train_data_dir):
        path = Path(__file__).parent / "configs" / "digits.yaml"
    defaults = yaml.safe_load(Path(path).read_text()) or {} if path is not None else {}
    known = {f.name for kind in parser.dataclass_types for f in fields(kind)}
    if unknown := sorted(set(defaults) - known):
        raise ValueError(f"expected names of flags in {path}, got {unknown}")
    sources = ("dataset_name", "train_data_dir")  # one of them: a flag for either wins over both
    if any(a.split("=")[0] in [f"--{name}" for name in sources] for a in arguments):
        defaults = {name: value for name, value in defaults.items() if name not in sources}
    flags = []
    for name, value in defaults.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        if not values:
            continue
        flags += [f"--{name}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    return parser.parse_args_into_dataclasses([*flags, *arguments], look_for_args_file=False)[:3]


def per_level(name: str, values: list, num_levels: int) -> list:
    if len(values) not in (1, num_levels):
        raise ValueError(f"expected {name} of 1 or num_levels={num_levels} values, got {values}")
    return values * num_levels if len(values) == 1 else values


def level_configs(
    model: ModelArguments, num_channels: int, class_names: list[str], given: dict[int, Path]
) -> list[ProgressiveVAELevelConfig]:
    """The configs of levels 1 … N: as the flags say, but for those that are given."""
    conditional = model.class_conditional_levels
    if not set(conditional) <= set(range(1, model.num_levels + 1)) or (
        conditional and not class_names
    ):
        raise ValueError(
            f"expected class_conditional_levels in 1 … {model.num_levels}, and a data set with "
            f"labels, got {conditional} and {len(class_names)} classes"
        )
    names = ("codebook_size", "codebook_dim", "downsample", "hidden_size", "num_layers",
             "pixel_distribution", "pixel_logit_rank", "encoder_hidden_size", "encoder_num_layers",
             "block_kernel_size", "decoder_order", "num_groups", "quantizer",
             "gumbel_decay")  # fmt: skip
    columns = [per_level(name, getattr(model, name), model.num_levels) for name in names]
    knobs = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    for i, level in enumerate(knobs, 1):
        level |= {name: level[name] or None for name in ("codebook_dim", "num_groups")}
        if i in conditional:
            level |= class_fields(class_names, model.class_dropout)
    configs: list[ProgressiveVAELevelConfig] = []
    for i in range(model.num_levels, 0, -1):
        if i in given:
            config = ProgressiveVAELevelConfig.from_pretrained(given[i])
            if i == model.num_levels and config.num_channels != num_channels:
                raise ValueError(
                    f"expected a level of images with {num_channels} colours in {given[i]}, got "
                    f"one with num_channels={config.num_channels}"
                )
        elif configs:
            num_symbols = configs[0].codebook_size
            config = ProgressiveVAELevelConfig(num_symbols=num_symbols, **knobs[i - 1])
        else:
            config = ProgressiveVAELevelConfig(num_channels=num_channels, **knobs[-1])
        configs.insert(0, config)
    return configs


def find_given(model: ModelArguments, training: TrainingArguments) -> dict[int, Path]:
    """The folders of levels that are trained already; `--extend` sets the number of levels."""
    if training.extend is None:
        given = {model.num_levels: training.finest_level} if training.finest_level else {}
    else:
        found = Path(training.extend)
        count = len(list(found.glob("level_[1-8]")))
        if not (found / INDEX).is_file() or training.finest_level is not None:
            raise ValueError(
                f"expected extend to be the folder of a saved pipeline, and no finest_level, got "
                f"{found} and {training.finest_level}"
            )
        model.num_levels = count + 1
        for arguments in (model, training):
            for name, values in vars(arguments).items():
                # A recipe of the given levels: the new one is like the coarsest of them.
                if isinstance(values, list) and len(values) == count > 1:
                    if name != "class_conditional_levels":
                        setattr(arguments, name, [values[0], *values])
        given = {i + 1: found / f"level_{i}" for i in range(1, count + 1)}
    for folder in map(Path, given.values()):
        if not (folder / "config.json").is_file():
            raise ValueError(f"expected a saved level in {folder}, got none")
    if clash := [
        p for p in given.values() if Path(p).resolve().parent == Path(training.output_dir).resolve()
    ]:
        raise ValueError(f"expected an output_dir other than that of {clash}, got the same")
    return {i: Path(path) for i, path in given.items()}


def given_identity(index: int, level: ProgressiveVAELevel) -> dict[str, str]:
    return {"phase": f"level_{index}", "given": fingerprint([level])}


def take_given(run: Run, levels: dict[int, ProgressiveVAELevel]):
    """Copy the levels that are there already to where those that are trained will lie."""
    for index, level in levels.items():
        identity = given_identity(index, level)
        if not run.is_done(f"level_{index}", identity):
            run.save(level, f"level_{index}", identity)


def class_fields(names: list[str], class_dropout: float) -> dict:
    """The fields by which a config knows the classes."""
    return {
        "num_classes": len(names),
        "id2label": dict(enumerate(names)) or None,
        "class_dropout": class_dropout,
    }


def decoder_changes(model: ModelArguments, index: int, class_names: list[str]) -> dict:
    """The fields of its config that the refit of level `index` changes."""
    changes = {}
    for name in DECODER_FIELDS:
        flag = f"refit_{name}"
        if (values := getattr(model, flag, None)) is not None:
            changes[name] = per_level(flag, values, model.num_levels)[index - 1]
    if index in model.class_conditional_levels:
        changes |= class_fields(class_names, model.class_dropout)
    return changes


def prior_config(
    model: ModelArguments,
    levels: list[ProgressiveVAELevelConfig],
    size: tuple[int, ...],
    class_names: list[str],
) -> ProgressiveVAEPriorConfig:
    names = class_names if model.class_conditional else []
    try:
        backbone = json.loads(model.prior_config)
    except ValueError as error:
        raise ValueError(f"expected prior_config as JSON, got {model.prior_config!r}") from error
    return ProgressiveVAEPriorConfig(
        codebook_size=levels[0].codebook_size,
        grid_size=grid_sizes(levels, (size[0], size[1]))[0],
        **class_fields(names, model.class_dropout),
        backbone_config=backbone,
    )


def fit_settings(training: TrainingArguments, num_levels: int, phase: str) -> FitSettings:
    """The settings of the phase `level_i`, `refit_level_i` or `prior`."""
    shared = {f.name for f in fields(FitSettings)}
    values = {f.name: getattr(training, f.name) for f in fields(training) if f.name in shared}
    for name in ("max_train_steps", "train_batch_size", "learning_rate"):
        if phase == "prior":
            values[name] = getattr(training, f"prior_{name}")
        else:
            flag = f"refit_{name}" if phase.startswith("refit") else name
            columns = per_level(flag, getattr(training, flag), num_levels)
            values[name] = columns[int(phase.rpartition("_")[2]) - 1]
    if phase == "prior":
        values |= {"adam_weight_decay": training.prior_adam_weight_decay, "optimizer": "adamw"}
    if values["max_train_steps"] < 1:
        flag = f"{phase.partition('_')[0]}_max_train_steps".removeprefix("level_")
        raise ValueError(f"expected {flag} >= 1 for {phase}, got {values['max_train_steps']}")
    values["lr_warmup_steps"] = min(values["lr_warmup_steps"], values["max_train_steps"] // 4)
    try:
        return FitSettings(**values)
    except ValueError as error:
        raise ValueError(f"{phase}: {error}") from error


def without_paths(text: str) -> str:
    """What is to be seen by others: of absolute paths only the last name."""
    return re.sub(r"""(?<![\w.:/])/(?:[^\s'"/]+/)+([^\s'"/]+)""", r"\1", text)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} ({torch.get_num_threads()} threads)"


def assemble(run: Run) -> ProgressiveVAEPipeline:
    """The pipeline of the saved parts, its index and its card beside them."""
    folder = run.output_dir / "prior"
    if not (folder / "config.json").is_file():
        raise ValueError(f"expected a trained prior in {folder}, got none: run its phase first")
    levels = [run.level(i) for i in range(1, run.num_levels + 1)]
    prior = ProgressiveVAEPrior.from_pretrained(folder).eval()
    pipe = ProgressiveVAEPipeline.from_levels(prior, levels, run.image_shape[1:])
    write_json(run.output_dir / INDEX, json.loads(pipe.to_json_string()))
    write_card(run.output_dir)
    return pipe


def made_by(output_dir: Path) -> dict:
    """The command and the settings of a run; of several, the commands joined."""
    advice = "delete it and run the first phase again"
    found = read_json(output_dir / SETTINGS, advice)
    if not (isinstance(found.get("command"), str) and isinstance(found.get("settings"), dict)):
        raise ValueError(
            f"expected a command and settings in {output_dir / SETTINGS}, got {found}: {advice}"
        )
    return found


def evaluate_and_save(run: Run, training: TrainingArguments):
    """All held-out figures and pictures. What cannot be measured is named in their place: nothing
    that was trained or measured is lost for it."""
    pipe, output_dir, test = assemble(run), run.output_dir, run.pixels["test"]
    pipe.to(run.accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    name = test.manifest.dataset.split(" (")[0]
    metrics = {
        "dataset": Path(name).name if Path(name).exists() else name,
        "split": test.manifest.split,
        "num_images": len(test),
        **evaluate(pipe, test),
    }
    seed, failed = training.seed, {}

    def attempt(name: str, measure: Callable[[], Any]) -> Any:
        try:
            return measure()
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
            warnings.warn(f"{name} is not measured: {error!r}", stacklevel=2)

    train, classes, count = run.pixels["train"], len(run.class_names), min(len(test), 5000)
    figures: dict[str, Callable[[], Any]] = {}
    if classes and (
        classifier := attempt("classifier", lambda: train_classifier(train, classes, seed=seed))
    ):
        figures["label_accuracy"] = lambda: label_accuracy(pipe, classifier, test, seed)
        figures["frechet_distance"] = lambda: distance_of_samples(
            pipe, classifier, test, count, seed
        )
    figures["sampled_images_per_second"] = lambda: round(sampling_speed(pipe), 1)
    for name, measure in figures.items():
        if (figure := attempt(name, measure)) is not None:
            metrics[name] = figure
    if "frechet_distance" in metrics:
        metrics["num_drawn"] = count
    images = test.batch(slice(0, 10))[0].to(torch.uint8)
    pictures = {
        "samples.png": lambda: sample_grid(pipe, seed),
        "reconstructions.png": lambda: reconstruction_grid(pipe, images, seed),
    }
    for name, draw in pictures.items():
        if (picture := attempt(name, draw)) is not None:
            picture.save(output_dir / name)
    metrics |= {
        **({"not_measured": failed} if failed else {}),
        "phases": run.phases(),
        "parameters": {name: getattr(pipe, name).num_parameters() for name in pipe.factor_names},
        "seed": seed,
        "machine": f"{run.accelerator.num_processes} × {device_name(run.accelerator.device)}, "
        f"torch {torch.__version__}, progressive_vae {__version__}",
        "license": training.hub_license,
        "weights": weights_digest(output_dir),
        **json.loads(without_paths(json.dumps(made_by(output_dir)))),
    }
    write_json(output_dir / METRICS, metrics)
    write_card(output_dir)
    print(f"\n{figures_table(metrics)}\n\nwrote {output_dir}")


def after_phase(run: Run, training: TrainingArguments):
    """Figures and pictures of other weights are deleted; what makes a pipeline may be pushed."""
    if figures(run.output_dir):  # of these very weights: the phase was done before
        return
    for name in (METRICS, *PICTURES):
        (run.output_dir / name).unlink(missing_ok=True)
    if (run.output_dir / INDEX).is_file():
        write_card(run.output_dir)
    if training.push_to_hub:
        try:
            assemble(run)
        except ValueError:  # not all parts are there, or not for one another
            return
        push_or_warn(run.output_dir, training.hub_model_id, training.hub_private_repo or None)


def check_arguments(model: ModelArguments, training: TrainingArguments):
    """Find out before anything is read or written what is wrong with the flags alone."""
    if not 1 <= model.num_levels <= MAX_LEVELS:
        raise ValueError(f"expected num_levels in 1 … {MAX_LEVELS}, got {model.num_levels}")
    for arguments in (model, training):
        for name, values in vars(arguments).items():
            if isinstance(values, list) and name != "class_conditional_levels":
                per_level(name, values, model.num_levels)
    for name, minimum in (
        ("gradient_accumulation_steps", 1),
        ("num_validation_images", 1),
        ("checkpointing_steps", 0),
        ("checkpoints_total_limit", 0),
    ):
        if (value := getattr(training, name)) < minimum:
            raise ValueError(f"expected {name} >= {minimum}, got {value}")
    trackers = [*map(str, get_available_trackers()), "none", "all"]
    if training.report_to not in trackers:
        raise ValueError(
            f"expected report_to among {trackers}, the trackers that are installed, got "
            f"{training.report_to!r}"
        )
    if training.mixed_precision not in (None, *PRECISIONS):
        raise ValueError(
            f"expected mixed_precision among {PRECISIONS}, got {training.mixed_precision!r}"
        )


def make_accelerator(training: TrainingArguments) -> Accelerator:
    output_dir = Path(training.output_dir)
    accelerator = Accelerator(
        # Without this a launch of two processes on CPUs becomes two runs of one process each.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=training.mixed_precision,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        # Others wait while the main process encodes, evaluates and pushes.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
        log_with=None if training.report_to == "none" else training.report_to,
        project_config=ProjectConfiguration(
            project_dir=str(output_dir), logging_dir=str(output_dir / training.logging_dir)
        ),
    )
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise ValueError(
            f"expected {os.environ['WORLD_SIZE']} processes, got {accelerator.num_processes}"
        )
    is_launched = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & set(os.environ)
    if accelerator.device.type == "cpu" and is_launched and torch.get_num_threads() == 1:
        # A launcher, told nothing, gives each process one thread, as suits processes with a GPU.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // accelerator.num_processes))
    return accelerator


def main(arguments: list[str]):
    data, model, training = parse(arguments)
    given = find_given(model, training)
    check_arguments(model, training)
    output_dir = Path(training.output_dir)
    training.hub_model_id = training.hub_model_id or output_dir.resolve().name
    output_dir.mkdir(parents=True, exist_ok=True)
    accelerator = make_accelerator(training)
    transformers_logging.disable_progress_bar()  # a bar for each small file says nothing
    with locked(output_dir, accelerator):
        train(arguments, data, model, training, given, accelerator)
    accelerator.end_training()


def train(
    arguments: list[str],
    data: DataArguments,
    model: ModelArguments,
    training: TrainingArguments,
    given: dict[int, Path],
    accelerator: Accelerator,
):
    output_dir, private = Path(training.output_dir), training.hub_private_repo or None
    indices = range(model.num_levels, 0, -1)
    refits = per_level("refit_max_train_steps", training.refit_max_train_steps, model.num_levels)
    phases = [*(f"level_{i}" for i in indices if i not in given), "prior"]
    phases += [f"refit_level_{i}" for i in indices if refits[i - 1] or training.phase != "all"]
    phases.append("evaluate")
    if training.phase not in ("all", *phases):
        raise ValueError(f"expected phase among {['all', *phases]}, got {training.phase!r}")
    chosen = phases if training.phase == "all" else [training.phase]
    fitted = [phase for phase in chosen if phase != "evaluate"]
    settings = {phase: fit_settings(training, model.num_levels, phase) for phase in fitted}
    checkpoints = Checkpoints(
        output_dir,
        training.checkpointing_steps or None,
        training.checkpoints_total_limit or None,
        training.resume_from_checkpoint,
        training.overwrite_output_dir,
    )
    signal.signal(signal.SIGTERM, checkpoints.stop)
    source = open_source(**vars(data))
    names, (num_channels, *size) = source.class_names, source.manifests["train"].shape
    run = Run(
        output_dir,
        accelerator,
        model.num_levels,
        class_names=names,
        num_validation_images=training.num_validation_images,
        checkpoints=checkpoints,
    )
    # All configs are made, and all that is there is looked at, before any phase runs: a wrong flag
    # costs neither training nor what was trained before.
    configs = level_configs(model, num_channels, names, given)
    config_of_prior = prior_config(model, configs, size, names)
    changes = {
        f"refit_level_{i}": decoder_changes(model, i, names)
        for i in indices
        if f"refit_level_{i}" in chosen
    }
    unused = [name for name, value in vars(model).items() if name.startswith("refit") and value]
    if training.phase == "all" and unused and not changes:
        raise ValueError(f"expected refit_max_train_steps beside {unused}, got {refits}")
    # What is refitted is the saved level, which another command may have trained.
    refitted = [
        config.with_decoder(**changes.get(f"refit_level_{i}", {}))
        for i, config in enumerate(configs, 1)
    ]
    for chain in (configs, refitted):
        check_image_size(size, chain, None)
    if "prior" in chosen:
        try:
            ProgressiveVAEPrior(copy.deepcopy(config_of_prior)).eval().check_causal()
        except ValueError as error:
            raise ValueError(f"prior_config: {error}") from error
    config_of: dict[str, Any] = {"prior": config_of_prior}
    for i in indices:
        config_of |= {f"level_{i}": configs[i - 1], f"refit_level_{i}": refitted[i - 1]}
    pixels = source.manifests["train"]
    planned = {
        phase: plan(phase, config_of[phase], settings[phase], accelerator, configs, pixels)
        for phase in fitted
        if training.phase == "all" or phase not in changes  # else it is like the saved level
    }
    is_first = training.phase in ("all", phases[0])
    # All are read before any is written: one may lie where another is to go.
    given_levels = {
        i: ProgressiveVAELevel.from_pretrained(path) for i, path in given.items() if is_first
    }
    for index, level in given_levels.items():
        if not training.overwrite_output_dir:
            run.check_history(f"level_{index}", given_identity(index, level))
    run.check_settings(planned, training.phase == "all")
    cache = output_dir / "cache" / "pixels"
    run.pixels = source.pixels(cache, accelerator, training.overwrite_cache)
    held_out = len(run.pixels["test"])
    if names and held_out < MIN_FOR_DISTANCE:
        warnings.warn(
            f"{held_out} held-out images are too few for a Fréchet distance, which will not be "
            f"measured: it takes {MIN_FOR_DISTANCE}",
            stacklevel=2,
        )
    flags = {k: str(v) for k, v in {**vars(data), **vars(model), **vars(training)}.items()}
    accelerator.init_trackers("progressive_vae", flags)
    if accelerator.is_main_process:
        if training.push_to_hub:
            open_repository(training.hub_model_id, private)
        if not (output_dir / ".gitignore").exists():
            # What is not of the pipeline, for those who upload the folder by other means.
            (output_dir / ".gitignore").write_text("\n".join(BESIDE_THE_PIPELINE) + "\n")
        command = shlex.join(["accelerate", "launch", "examples/train.py", *arguments])
        path = output_dir / SETTINGS
        if is_first:
            write_json(path, {"command": command, "settings": flags})
        elif training.phase != "evaluate" and path.is_file():  # it comes on top of the others
            made = made_by(output_dir)
            if command not in made["command"].split(" && "):
                write_json(path, {**made, "command": f"{made['command']} && {command}"})
    take_given(run, given_levels)
    for phase in chosen:
        if phase == "evaluate":
            run.grids("test", 1)  # an error if a level has changed since the coarser were trained
            if accelerator.is_main_process:
                evaluate_and_save(run, training)
                if training.push_to_hub:
                    push_or_warn(output_dir, training.hub_model_id, private)
            continue
        if phase == "prior":
            train_prior(run, config_of_prior, settings[phase])
        else:
            index = int(phase.rpartition("_")[2])
            if phase in changes:
                refit_level(run, index, changes[phase], settings[phase])
            else:
                train_level(run, index, configs[index - 1], settings[phase])
        if accelerator.is_main_process:
            after_phase(run, training)
    if accelerator.is_main_process and training.phase not in ("all", "evaluate"):
        rest = phases[phases.index(training.phase) + 1 :]
        rest = [phase for phase in rest if not phase.startswith("refit")]
        print(f"wrote {output_dir}; what stands on it: --phase {', then '.join(rest)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:  # of flags, data or files: what was expected, and what came
        sys.exit(f"error: {error}")
