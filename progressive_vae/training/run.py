"""What one training leaves behind: levels, caches of codes, costs, pictures; and where it lies."""

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
    InitProcessGroupKwargs,
    ProjectConfiguration,
    parse_flag_from_env,
)
from PIL.Image import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..configuration.validation import MAX_LEVELS, grid_sizes
from ..data.augmentation import IDENTITY, Augmentation, AugmentedDataset
from ..data.code_cache import GridDataset, Manifest, write_cache
from ..data.streaming import PixelStream
from ..models.fingerprint import fingerprint
from ..models.level import ProgressiveVAELevel
from ..paths import replacing
from ..serialization import read_json, write_json
from .args import RunSettings
from .checkpoints import Checkpoints, check_identity, errors_of_writing, is_sharded
from .lock import alone
from .muon import has_bf16

HISTORY, PHASES, REPLACED = "history.json", "phases.json", ".replaced"


@dataclass
class Run:
    """Where the artefacts of one training lie, and on what images it trains.

    Args:
        settings: of the run; `output_dir` is the pipeline's folder: `level_i/`, `prior/`, and
            beside them `cache/`, `validation/` and `phases.json`.
        pixels: for the splits "train" and "test" the cache of their images, or the stream of those
            to train on.
        class_names: names of the classes, [] where there are none.
        forms: in which the finest level sees the pixels.
        checkpoints: of phases that may be interrupted; `None` for phases that start anew.
    """

    settings: RunSettings
    accelerator: Accelerator
    num_levels: int
    pixels: dict[str, GridDataset | PixelStream] = field(default_factory=dict)
    class_names: list[str] = field(default_factory=list)
    forms: Augmentation = IDENTITY
    cache_batch_size: int = 500
    checkpoints: Checkpoints | None = None
    logged_steps: int = 0  # of the phases so far: some trackers want steps that only grow

    def __post_init__(self):
        with self.alone():
            found = self.output_dir.glob(f"*{REPLACED}")
            for replaced in found if self.accelerator.is_main_process else ():
                # A kill came between the two names of a save: before it, nothing had changed.
                if replaced.with_suffix("").exists():
                    shutil.rmtree(replaced)
                else:
                    os.replace(replaced, replaced.with_suffix(""))
        self.accelerator.wait_for_everyone()

    def alone(self):
        """For the moment in which files are written or renamed that other runs look at."""
        return alone(self.output_dir, self.accelerator)

    @property
    def output_dir(self) -> Path:
        return Path(self.settings.output_dir)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.pixels["train"].manifest.shape
        return channels, height, width

    def level(self, index: int) -> ProgressiveVAELevel:
        """The saved level, frozen."""
        folder = self.output_dir / f"level_{index}"
        for patience in (0.2, 0.5, 0.0):  # another run may be at replacing it
            try:
                if not (folder / "config.json").is_file():
                    raise ValueError(
                        f"expected a trained level in {folder}, got none: run its phase first"
                    )
                return ProgressiveVAELevel.from_pretrained(folder).requires_grad_(False).eval()
            except ValueError:
                if not patience:
                    raise
                time.sleep(patience)
        raise AssertionError

    def fingerprint(self, index: int) -> str | None:
        """Of the saved levels `index` … N; `None` if there are none."""
        levels = [self.level(i) for i in range(index, self.num_levels + 1)]
        return fingerprint(levels) if levels else None

    def grids(self, split: str, index: int) -> GridDataset | PixelStream:
        """z_index of a split, or its pixels for index = N + 1; encoded once, then cached.

        Raises:
            ValueError: the cache in place was made by other weights.
        """
        if index == self.num_levels + 1:
            return self.pixels[split]
        levels = [self.level(i) for i in range(index, self.num_levels + 1)]
        size = grid_sizes([level.config for level in levels], self.image_shape[1:])[0]
        manifest = Manifest(
            weights=fingerprint(levels),
            dataset=self.pixels[split].manifest.dataset,
            split=split,
            shape=size,
            num_values=levels[0].config.codebook_size,
        )
        folder = self.output_dir / "cache" / f"level_{index}" / split
        if not folder.exists():
            finer = self.grids(split, index + 1)
            self.accelerator.wait_for_everyone()  # all have seen that there is no cache yet
            start, count = time.perf_counter(), None
            with self.alone():
                if not folder.exists():  # another run may have been first
                    batches = self._encode(levels[0], finer)
                    write_cache(folder, manifest, batches, self.accelerator.state)
                    count = len(GridDataset(folder, manifest))
            if count is not None:
                self.record(f"encode_{split}_{index}", count, time.perf_counter() - start)
        return GridDataset(folder, manifest)

    def examples(self, index: int) -> GridDataset | AugmentedDataset | PixelStream:
        """What a level is fitted to: the training images' z_index, or for index = N + 1 their
        pixels in all forms."""
        grids = self.grids("train", index)
        is_varied = index == self.num_levels + 1 and self.forms != IDENTITY
        if is_varied and isinstance(grids, GridDataset):
            return AugmentedDataset(grids, self.forms)
        return grids

    def _encode(
        self, level: ProgressiveVAELevel, finer: GridDataset | PixelStream
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The codes of this process's share of the grids."""
        level = level.to(self.accelerator.device)
        share = finer.share(self.accelerator.process_index, self.accelerator.num_processes)
        batches = share.batches(self.cache_batch_size)
        count = share.num_examples and math.ceil(share.num_examples / self.cache_batch_size)
        is_quiet = not self.accelerator.is_main_process
        for grids, labels in tqdm(batches, desc="encode", total=count, disable=is_quiet):
            yield level.encode(as_finer(grids, level).to(level.device)).cpu(), labels

    def clear_cache(self, index: int):
        """Delete the cached codes of a level whose weights have just changed."""
        if self.accelerator.is_main_process:
            shutil.rmtree(self.output_dir / "cache" / f"level_{index}", ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def save(self, model: PreTrainedModel, name: str, history: list[dict[str, Any]]):
        """`save_pretrained` under a temporary name, then rename: complete or absent.

        Args:
            history: the identities of the phases that made it, which `history.json` beside the
                weights holds.
        """
        state = self.accelerator.get_state_dict(model) if is_sharded(self.accelerator) else None
        folder = self.output_dir / name
        temporary = folder.with_name(f"{name}.incomplete")
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            with errors_of_writing(temporary):
                model.save_pretrained(temporary, state_dict=state)
            (temporary / HISTORY).write_text(json.dumps(history, indent=2))
        with self.alone():
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
        """The identities of the phases that made the folder, in their order."""
        path = self.output_dir / name / HISTORY
        advice = "delete the folder, and the phases that made it are run again"
        return read_json(path, advice, list) if path.is_file() else []

    def _latest(self, name: str, phase: str) -> list[dict[str, Any]]:
        """The identity with which a phase made the folder, [] if it did not; of a refit that was
        made more than once the last counts."""
        return [each for each in self.history(name) if each.get("phase") == phase][-1:]

    def is_done(self, name: str, identity: dict[str, Any]) -> bool:
        """Whether a run that is resumed finds the phase's work in the folder `name`.

        Raises:
            ValueError: it finds work of other settings there, which it is not told to overwrite.
        """
        if self.checkpoints is None or self.checkpoints.resume is None:
            return False
        if identity in self._latest(name, identity["phase"]):
            return True
        if not self.checkpoints.overwrite:
            self.check_history(name, identity)
        return False

    def check_history(self, name: str, identity: dict[str, Any]):
        """Raise a `ValueError` if the folder `name` holds what other settings made."""
        where = self.output_dir / name
        if where.is_dir() and not self.history(name):
            raise ValueError(
                f"expected {HISTORY} in {where}, which says what made it, got none: choose another "
                "--output_dir, or replace it with --overwrite_output_dir"
            )
        for each in self._latest(name, identity["phase"]):
            check_identity(identity, each, str(where), of_settings=True)

    def check_settings(self, planned: list[tuple[str, dict[str, Any]]], is_whole: bool):
        """Before anything is trained or replaced: whether a run is meant to go on with what is
        there, and was made by the same settings.

        Args:
            planned: for each phase that is to be run its part, and what is known of its identity
                beforehand.
            is_whole: all phases are to be run; one that is asked for by its name may replace what
                it made before.

        Raises:
            ValueError: work that the run would replace, and was not told to overwrite.
        """
        checkpoints = self.checkpoints
        if checkpoints is None or checkpoints.overwrite:
            return
        if checkpoints.resume is None:
            names = [f"level_{i}" for i in range(1, MAX_LEVELS + 1)] + ["prior"]
            found = [name for name in names if (self.output_dir / name).is_dir()]
            found += [path.name for path in checkpoints.all()]
            if is_whole and found:
                raise ValueError(
                    f"expected an output_dir without the work of another run, got {self.output_dir}"
                    f" with {', '.join(found)}: go on with --resume_from_checkpoint latest, choose "
                    "another --output_dir, or replace it with --overwrite_output_dir"
                )
            return
        for part, identity in planned:
            self.check_history(part, identity)
            checkpoints.check(identity)
        if planned:
            checkpoints.check_named([identity["phase"] for _, identity in planned])

    def record(self, phase: str, num_images: int, seconds: float, **figures: float):
        """Note what a phase cost, and other figures of it, in `phases.json`."""
        cost = {
            "seconds": round(seconds, 2),
            "images": num_images,
            "images_per_second": round(num_images / seconds, 2),
            **figures,
        }
        with self.alone():
            if self.accelerator.is_main_process:
                write_json(self.output_dir / PHASES, {**self._costs(), phase: cost})

    def drop_record(self, phase: str):
        with self.alone():
            if self.accelerator.is_main_process:
                phases = self._costs()
                if phases.pop(phase, None) is not None:
                    write_json(self.output_dir / PHASES, phases)

    def phases(self) -> dict[str, dict[str, float]]:
        """What each phase of this run cost, in their order; rows of other levels are left out."""
        costs, names = self._costs(), []
        for i in range(self.num_levels, 0, -1):
            names += [f"level_{i}", f"encoder_{i}", f"encode_train_{i}", f"encode_test_{i}"]
        names += [f"decoder_{i}" for i in range(self.num_levels, 0, -1)]
        names += ["prior", *(f"refit_level_{i}" for i in range(self.num_levels, 0, -1))]
        return {name: costs[name] for name in names if name in costs}

    def _costs(self) -> dict[str, dict[str, float]]:
        path = self.output_dir / PHASES
        advice = "delete it: only what the phases cost is lost"
        costs = read_json(path, advice) if path.is_file() else {}
        wrong = [name for name, cost in costs.items() if not _is_cost(cost)]
        if wrong:
            raise ValueError(f"expected the costs of phases in {path}, got {wrong}: {advice}")
        return costs

    def show(self, phase: str, step: int, picture: Image, figures: dict[str, float]):
        """Send a validation to the trackers and keep its picture."""
        logged = self.logged_steps + step
        self.accelerator.log({f"{phase}/{k}": v for k, v in figures.items()}, step=logged)
        if self.accelerator.is_main_process:
            folder = self.output_dir / "validation" / phase
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / f"step-{step:06d}.png") as temporary:
                picture.save(temporary, "PNG")
            array = np.asarray(picture.convert("RGB"))[None]
            for tracker in self.accelerator.trackers:
                if hasattr(tracker, "log_images"):
                    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    tracker.log_images({phase: array}, step=logged, **layout)


def make_accelerator(settings: RunSettings, cpu: bool = False) -> Accelerator:
    """What a run needs of Accelerate, on the processes that were launched.

    Args:
        cpu: leave other devices alone.

    Raises:
        ValueError: this process has trained with another precision.
    """
    output_dir, precision = Path(settings.output_dir), settings.mixed_precision
    known = AcceleratorState._shared_state.get("_mixed_precision")
    is_on_cpu = (
        cpu or not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    )
    wanted = precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
    if is_on_cpu and wanted == "bf16" != known and not has_bf16(torch.device("cpu")):
        logging.getLogger(__name__).warning("mixed_precision='bf16': slow on this CPU, fp32 it is")
        precision = "no"
    if known is not None and precision not in (None, known):
        raise ValueError(
            f"expected mixed_precision={known!r}, with which this process began, got "
            f"{settings.mixed_precision!r}: Accelerate cannot change it, start another process"
        )
    accelerator = Accelerator(
        # Without this a launch of two processes on CPUs becomes two runs of one process each.
        cpu=is_on_cpu,
        mixed_precision=precision,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        # Others wait while the main process encodes, evaluates and pushes.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
        log_with=None if settings.report_to == "none" else settings.report_to,
        project_config=ProjectConfiguration(
            project_dir=str(output_dir), logging_dir=str(output_dir / settings.logging_dir)
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


def _is_cost(cost: Any) -> bool:
    names = ("seconds", "images", "images_per_second")
    return isinstance(cost, dict) and all(
        isinstance(cost.get(name), (int, float)) for name in names
    )


def as_finer(grids: Tensor, level: ProgressiveVAELevel) -> Tensor:
    """What a level sees of cached grids: pixels in [−1, 1] on the finest level, else symbols."""
    return level.value_type.from_indices(grids) if level.config.is_finest else grids
