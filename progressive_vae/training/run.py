"""The files of a training run: trained parts, code caches, costs, validation images."""

import copy
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DataLoaderConfiguration,
    DynamoBackend,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    TorchDynamoPlugin,
    parse_flag_from_env,
)
from PIL.Image import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..configuration.level import ProgressiveVAELevelConfig
from ..configuration.validation import grid_sizes
from ..data.augmentation import IDENTITY, Augmentation, AugmentedDataset
from ..data.captions import (
    CaptionEmbeddings,
    CaptionManifest,
    Captions,
    caption_manifest,
    is_caption_cache,
    write_caption_embeddings,
)
from ..data.code_cache import GridDataset, Manifest, write_cache
from ..data.streaming import PixelStream
from ..models.fingerprint import fingerprint
from ..models.level import ProgressiveVAELevel
from ..models.modeling_utils import BLOCK_GRAPHS
from ..models.text_encoding import encode_texts, load_text_encoder
from ..paths import replacing
from ..serialization import read_json, write_json
from .args import RunSettings
from .budget import TimeBudget
from .checkpoints import Checkpoints, errors_of_writing, is_sharded
from .identity import check_identity
from .lock import exclusive
from .muon import has_bf16

HISTORY = "history.json"
PHASES = "phases.json"
REPLACED = ".replaced"


@dataclass
class DynamoPlugin(TorchDynamoPlugin):
    """Accelerate's settings of compilation, with one more argument of `torch.compile`."""

    recompile_limit: int | None = None


@dataclass
class Texts:
    """The captions of the training images and their text encoder.

    Args:
        name: repository or folder of the text encoder; `None` for hashed words.
    """

    captions: Captions
    name: str | None
    text_encoder: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    manifest: CaptionManifest

    @classmethod
    def load(cls, captions: Captions, name: str | None) -> "Texts | None":
        """Return captions with their text encoder, `None` if there are no captions."""
        if captions.column is None:
            return None
        text_encoder, tokenizer = load_text_encoder(name)
        manifest = caption_manifest(captions, text_encoder, tokenizer)
        return cls(captions, name, text_encoder, tokenizer, manifest)

    @property
    def condition_dim(self) -> int:
        """Length of the embeddings."""
        return encode_texts(self.text_encoder, self.tokenizer, [""])[0].shape[-1]


@dataclass
class Run:
    """The folder of a training run, and the images it trains on.

    Args:
        settings: `output_dir` is the pipeline's folder: `level_i/`, `prior/`, and beside them
            `cache/`, `validation/` and `phases.json`.
        pixels: for the splits "train" and "test", and "validation" if there is one, the cache of
            their images; the training images may be a stream.
        class_names: [] if there are no classes.
        texts: captions of the training images, if there are any.
        augmentation: of the pixels, for the finest level.
        checkpoints: `None` for phases that cannot be resumed.
        budget: of the run's time; the default has no limit.
        logged_steps: optimization steps of the finished phases: some trackers require steps that
            increase.
    """

    settings: RunSettings
    accelerator: Accelerator
    num_levels: int
    pixels: dict[str, GridDataset | PixelStream] = field(default_factory=dict)
    class_names: list[str] = field(default_factory=list)
    texts: Texts | None = None
    augmentation: Augmentation = IDENTITY
    cache_batch_size: int = 500
    checkpoints: Checkpoints | None = None
    budget: TimeBudget = field(default_factory=lambda: TimeBudget(None))
    logged_steps: int = 0
    # By index: the times of the level's files, and the level.
    _loaded: dict[int, tuple[list[int], ProgressiveVAELevel]] = field(
        default_factory=dict, init=False, repr=False
    )
    _caption_cache: CaptionEmbeddings | None = field(default=None, init=False, repr=False)

    def __post_init__(self):
        with self.exclusive():
            paths = self.output_dir.glob(f"*{REPLACED}")
            for replaced in paths if self.accelerator.is_main_process else ():
                # The process was killed between the two renames of `save`.
                if replaced.with_suffix("").exists():
                    shutil.rmtree(replaced)
                else:
                    os.replace(replaced, replaced.with_suffix(""))
        self.accelerator.wait_for_everyone()

    def exclusive(self):
        """Return a context in which no other run reads or writes files that runs have in common."""
        return exclusive(self.output_dir, self.accelerator)

    @property
    def output_dir(self) -> Path:
        return Path(self.settings.output_dir)

    @property
    def validation_split(self) -> str:
        """The split whose metrics are logged: test images, unless others are held out for it."""
        return "validation" if "validation" in self.pixels else "test"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.pixels["train"].manifest.shape
        return channels, height, width

    def level(self, index: int) -> ProgressiveVAELevel:
        """Return a copy of the saved level, frozen, in evaluation mode."""
        return copy.deepcopy(self._load(index))

    def fingerprint(self, index: int) -> str | None:
        """Return the fingerprint of the saved levels `index` … N; `None` if there are none."""
        return self._saved_levels(index)[1] if index <= self.num_levels else None

    def _saved_levels(self, index: int) -> tuple[list[ProgressiveVAELevelConfig], str]:
        """Return the configs and the fingerprint of the saved levels `index` … N."""
        levels = [self._load(i) for i in range(index, self.num_levels + 1)]
        return [level.config for level in levels], fingerprint(levels)

    def _load(self, index: int) -> ProgressiveVAELevel:
        """Return the saved level, not to be changed.

        All phases and caches need it, so it is loaded again only after a save.
        """
        folder = self.output_dir / f"level_{index}"
        for patience in (0.2, 0.5, 0.0):  # another run may be replacing it
            try:
                config = folder / "config.json"
                if not config.is_file():
                    raise ValueError(
                        f"expected a trained level in {folder}, got none: run its phase first"
                    )
                times = [
                    path.stat().st_mtime_ns for path in (config, *folder.glob("*.safetensors"))
                ]
                if index not in self._loaded or self._loaded[index][0] != times:
                    level = ProgressiveVAELevel.from_pretrained(folder)
                    self._loaded[index] = times, level.requires_grad_(False).eval()
                return self._loaded[index][1]
            except (ValueError, FileNotFoundError):
                if not patience:
                    raise
                time.sleep(patience)
        raise AssertionError

    def grids(self, split: str, index: int) -> GridDataset | PixelStream:
        """Return z_index of a split, or its pixels for index = N + 1; encode once, then cache.

        Raises:
            ValueError: other weights made the cache.
        """
        if index == self.num_levels + 1:
            return self.pixels[split]
        configs, weights = self._saved_levels(index)
        manifest = Manifest(
            weights=weights,
            dataset=self.pixels[split].manifest.dataset,
            split=split,
            shape=grid_sizes(configs, self.image_shape[1:])[0],
            num_values=configs[0].codebook_size,
        )
        folder = self.output_dir / "cache" / f"level_{index}" / split
        if not folder.exists():
            finer = self.grids(split, index + 1)
            self.accelerator.wait_for_everyone()  # all processes know that there is no cache
            start = time.perf_counter()
            count = None
            with self.exclusive():
                if not folder.exists():  # another run may have made it
                    batches = self._encode(self.level(index), finer)
                    write_cache(folder, manifest, batches, self.accelerator)
                    count = len(GridDataset(folder, manifest))
            if count is not None:
                self.record(f"encode_{split}_{index}", count, time.perf_counter() - start)
        return GridDataset(folder, manifest)

    def examples(self, index: int) -> GridDataset | AugmentedDataset | PixelStream:
        """Return the training examples of a level: z_index, or augmented pixels for N + 1."""
        grids = self.grids("train", index)
        is_augmented = index == self.num_levels + 1 and self.augmentation != IDENTITY
        if is_augmented and isinstance(grids, GridDataset):
            return AugmentedDataset(grids, self.augmentation)
        return grids

    def caption_embeddings(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return embeddings, float16 (B, T, D), and mask, bool (B, T), of captions.

        Args:
            indices: of training images; those of augmented images count on.
        """
        pixels = self.pixels["train"]
        assert isinstance(pixels, GridDataset)  # a stream has no captions
        ids = pixels.captions[[i % len(pixels) for i in indices]]
        embeddings, mask = self.captions().batch(ids.tolist())
        device = self.accelerator.device
        if device.type == "cuda":  # a copy of pinned memory does not make the host wait
            embeddings = embeddings.pin_memory()
            mask = mask.pin_memory()
        return embeddings.to(device, non_blocking=True), mask.to(device, non_blocking=True)

    def captions(self) -> CaptionEmbeddings:
        """Return the embeddings of all captions, which are computed once."""
        assert self.texts is not None
        if self._caption_cache is None:
            folder = self.output_dir / "cache" / "captions"
            texts = self.texts
            with self.exclusive():
                is_due = not is_caption_cache(folder, texts.manifest)
                if is_due and self.accelerator.is_main_process:
                    text_encoder = texts.text_encoder.to(self.accelerator.device)
                    parts = (texts.captions, text_encoder, texts.tokenizer)
                    write_caption_embeddings(folder, texts.manifest, *parts)
                    text_encoder.cpu()
            self.accelerator.wait_for_everyone()
            self._caption_cache = CaptionEmbeddings(folder, texts.manifest)
        return self._caption_cache

    def _encode(
        self, level: ProgressiveVAELevel, finer: GridDataset | PixelStream
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield codes and labels of this process's share of the grids."""
        level = level.to(self.accelerator.device)
        share = finer.share(self.accelerator.process_index, self.accelerator.num_processes)
        batches = share.batches(self.cache_batch_size)
        count = share.num_examples and math.ceil(share.num_examples / self.cache_batch_size)
        is_quiet = not self.accelerator.is_main_process
        for grids, labels in tqdm(batches, desc="encode", total=count, disable=is_quiet):
            yield level.encode(as_finer(grids, level).to(level.device)).cpu(), labels

    def clear_cache(self, index: int):
        """Delete the cached codes of a level whose weights have changed."""
        if self.accelerator.is_main_process:
            shutil.rmtree(self.output_dir / "cache" / f"level_{index}", ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def save(self, model: PreTrainedModel, name: str, history: list[dict[str, Any]]):
        """Save a model under a temporary name, then rename: complete or absent.

        Args:
            history: identities of the phases that made it, for `history.json` beside the weights.
        """
        state = self.accelerator.get_state_dict(model) if is_sharded(self.accelerator) else None
        folder = self.output_dir / name
        temporary = folder.with_name(f"{name}.incomplete")
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            with errors_of_writing(temporary):
                model.save_pretrained(temporary, state_dict=state)
            (temporary / HISTORY).write_text(json.dumps(history, indent=2))
        with self.exclusive():
            replaced = folder.with_name(f"{name}{REPLACED}")
            if self.accelerator.is_main_process:
                if folder.exists():
                    os.replace(folder, replaced)
                os.replace(temporary, folder)
                shutil.rmtree(replaced, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.checkpoints is not None:
            self.checkpoints.remove(history[-1]["phase"], self.accelerator)

    def history(self, name: str) -> list[dict[str, Any]]:
        """Return the identities of the phases that made the folder, in their order."""
        path = self.output_dir / name / HISTORY
        advice = "delete the folder, then its phases run again"
        return read_json(path, advice, list) if path.is_file() else []

    def _saved_identity(self, part: str, phase: str) -> dict[str, Any] | None:
        """Return the identity with which a phase made the part; of several refits, the last."""
        identities = [saved for saved in self.history(part) if saved.get("phase") == phase]
        return identities[-1] if identities else None

    def is_done(self, part: str, identity: dict[str, Any]) -> bool:
        """Return whether a resumed run finds the result of a phase in the folder of its part.

        Raises:
            ValueError: other settings made the part, and the run may not overwrite it.
        """
        if self.checkpoints is None or self.checkpoints.resume is None:
            return False
        if self._saved_identity(part, identity["phase"]) == identity:
            return True
        if not self.checkpoints.overwrite:
            self.check_part(part, identity)
        return False

    def check_part(self, part: str, identity: dict[str, Any]):
        """Raise a `ValueError` if other settings made the part, or if that is unknown."""
        folder = self.output_dir / part
        if folder.is_dir() and not self.history(part):
            raise ValueError(
                f"expected {HISTORY} in {folder}, which lists the phases that made it, got none: "
                "choose another --output_dir, or replace it with --overwrite_output_dir"
            )
        saved = self._saved_identity(part, identity["phase"])
        if saved is not None:
            check_identity(identity, saved, str(folder), settings_only=True)

    def record(self, phase: str, num_images: int, seconds: float, **metrics: float):
        """Write the cost of a phase, and other metrics of it, to `phases.json`."""
        cost = {
            "seconds": round(seconds, 2),
            "images": num_images,
            "images_per_second": round(num_images / seconds, 2),
            **metrics,
        }
        with self.exclusive():
            if self.accelerator.is_main_process:
                write_json(self.output_dir / PHASES, {**self._costs(), phase: cost})

    def drop_record(self, phase: str):
        """Remove a phase from `phases.json`."""
        with self.exclusive():
            if self.accelerator.is_main_process:
                phases = self._costs()
                if phases.pop(phase, None) is not None:
                    write_json(self.output_dir / PHASES, phases)

    def phases(self) -> dict[str, dict[str, float]]:
        """Return the cost of each phase, in their order, for the levels of this run."""
        costs = self._costs()
        names = []
        for i in range(self.num_levels, 0, -1):
            names += [f"level_{i}", f"encoder_{i}", f"encode_train_{i}"]
            names += [f"encode_validation_{i}", f"encode_test_{i}"]
        names += [f"decoder_{i}" for i in range(self.num_levels, 0, -1)]
        names += ["prior", *(f"refit_level_{i}" for i in range(self.num_levels, 0, -1))]
        return {name: costs[name] for name in names if name in costs}

    def _costs(self) -> dict[str, dict[str, float]]:
        path = self.output_dir / PHASES
        advice = "delete it: only the costs of phases are lost"
        costs = read_json(path, advice) if path.is_file() else {}
        wrong = [name for name, cost in costs.items() if not _is_cost(cost)]
        if wrong:
            raise ValueError(f"expected the costs of phases in {path}, got {wrong}: {advice}")
        return costs

    def log_validation(self, phase: str, step: int, image: Image, metrics: dict[str, float]):
        """Send a validation to the trackers and save its image."""
        logged_step = self.logged_steps + step
        values = {f"{phase}/{name}": value for name, value in metrics.items()}
        self.accelerator.log(values, step=logged_step)
        if self.accelerator.is_main_process:
            folder = self.output_dir / "validation" / phase
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / f"step-{step:06d}.png") as temporary:
                image.save(temporary, "PNG")
            array = np.asarray(image.convert("RGB"))[None]
            for tracker in self.accelerator.trackers:
                if hasattr(tracker, "log_images"):
                    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    tracker.log_images({phase: array}, step=logged_step, **layout)


def make_accelerator(settings: RunSettings, cpu: bool = False) -> Accelerator:
    """Return Accelerate's object for a run, on the processes that were launched.

    Args:
        cpu: use no other device.

    Raises:
        ValueError: this process has trained with another precision.
    """
    output_dir = Path(settings.output_dir)
    on_cpu = (
        cpu or not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    )
    accelerator = Accelerator(
        # Without this a launch of two processes on CPUs becomes two runs of one process each.
        cpu=on_cpu,
        mixed_precision=_precision(settings.mixed_precision, on_cpu),
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        # Others wait while the main process encodes, evaluates and pushes.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
        # Copies of pinned memory, which the loaders of a fit have on CUDA.
        dataloader_config=DataLoaderConfiguration(non_blocking=torch.cuda.is_available()),
        log_with=None if settings.report_to == "none" else settings.report_to,
        project_config=ProjectConfiguration(
            project_dir=str(output_dir), logging_dir=str(output_dir / settings.logging_dir)
        ),
    )
    accelerator.state.dynamo_plugin = _dynamo_plugin(settings)
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise ValueError(
            f"expected {os.environ['WORLD_SIZE']} processes, got {accelerator.num_processes}"
        )
    is_launched = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & set(os.environ)
    if accelerator.device.type == "cpu" and is_launched and torch.get_num_threads() == 1:
        # By default a launcher sets one thread for each process, which suits only GPUs.
        torch.set_num_threads(max(1, _num_cpus() // accelerator.num_processes))
    return accelerator


def _num_cpus() -> int:
    """Those that this process may use: `taskset` and schedulers of clusters give it some."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _precision(precision: str | None, on_cpu: bool) -> str | None:
    """Return the precision of this run: "no" in place of bf16 on a CPU that emulates it.

    Accelerate has one precision for each process; `None` leaves it as it is configured.
    """
    current = AcceleratorState._shared_state.get("_mixed_precision")
    requested = precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
    is_slow = on_cpu and requested == "bf16" and not has_bf16(torch.device("cpu"))
    supported = precision
    if is_slow and current != "bf16":
        logging.getLogger(__name__).warning(
            "mixed_precision='bf16' is slow on this CPU: training in fp32"
        )
        supported = "no"
    if current is not None and supported not in (None, current):
        raise ValueError(
            f"expected mixed_precision={current!r}, with which this process started, got "
            f"{precision!r}: Accelerate cannot change it, start another process"
        )
    return supported


def _dynamo_plugin(settings: RunSettings) -> TorchDynamoPlugin:
    """Return how Accelerate compiles models: as it is configured, and by regions for
    `compile=True`."""
    plugin = DynamoPlugin()
    if settings.compile:
        plugin.use_regional_compilation = True
        if plugin.backend == DynamoBackend.NO:
            plugin.backend = DynamoBackend.INDUCTOR
    if plugin.use_regional_compilation:
        plugin.recompile_limit = BLOCK_GRAPHS.get("recompile_limit")
    return plugin


def _is_cost(cost: Any) -> bool:
    names = ("seconds", "images", "images_per_second")
    return isinstance(cost, dict) and all(
        isinstance(cost.get(name), (int, float)) for name in names
    )


def as_finer(grids: Tensor, level: ProgressiveVAELevel) -> Tensor:
    """Return the input of a level from cached grids: pixels in [−1, 1] or codes."""
    return level.value_type.from_indices(grids) if level.config.is_finest else grids
