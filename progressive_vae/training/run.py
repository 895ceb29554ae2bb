"""What one training leaves behind: levels, caches of codes, costs, pictures; and where it lies."""

import json
import math
import os
import shutil
import socket
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator, PartialState
from filelock import FileLock, Timeout
from PIL.Image import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..chain import MAX_LEVELS, grid_sizes
from ..entries import as_pixel_values
from ..fingerprint import fingerprint
from ..level import ProgressiveVAELevel
from ..saved import read_json, write_json
from .checkpoints import Checkpoints, check_identity, is_sharded
from .codes import GridDataset, Manifest, write_cache
from .streaming import PixelStream

HISTORY, PHASES, REPLACED = "history.json", "phases.json", ".replaced"
LOCK, OWNER = ".lock", ".lock.json"
WAIT_FOR_ORPHANS = 10.0  # seconds: the workers of a killed run hold its lock until they notice


@contextmanager
def locked(folder: Path, state: Accelerator | PartialState) -> Iterator[None]:
    """While it lasts no other run writes to the folder, on this machine or, where its file system
    has locks, on others. The lock goes with the process, however that ends.

    Raises:
        ValueError: another process has it; the error names it.
    """
    lock, owner = FileLock(folder / LOCK), folder / OWNER
    if state.is_main_process:
        try:
            lock.acquire(timeout=0 if _is_alive(owner) else WAIT_FOR_ORPHANS)
        except Timeout as error:
            raise ValueError(
                f"expected an output_dir that no other run writes to, got {folder}, which "
                f"{_shown(owner)} is at: wait for it, stop it, or choose another output_dir"
            ) from error
        except (OSError, NotImplementedError) as error:  # by a file system without locks
            warnings.warn(f"two runs in {folder} would not see each other: {error}", stacklevel=3)
        me = {"pid": os.getpid(), "host": socket.gethostname(), "command": " ".join(sys.argv)}
        write_json(owner, me)
    try:
        yield
    finally:
        if state.is_main_process:
            owner.unlink(missing_ok=True)
            lock.release()


def _owner(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, "delete it")
    except ValueError:  # not written yet, or not any more
        return {}


def _is_alive(path: Path) -> bool:
    """Whether the process that the file names still runs, as far as that can be seen from here."""
    owner = _owner(path)
    if owner.get("host") != socket.gethostname():
        return bool(owner)
    try:
        os.kill(int(owner["pid"]), 0)
    except (OSError, KeyError, TypeError, ValueError, OverflowError):
        return False
    return True


def _shown(path: Path) -> str:
    owner = _owner(path)
    if not owner:
        return "another process"
    return f"process {owner.get('pid')} on {owner.get('host')} ({owner.get('command')})"


@dataclass
class Run:
    """Where the artefacts of one training lie, and on what images it trains.

    Args:
        output_dir: the pipeline's folder: `level_i/`, `prior/`, and beside them `cache/`,
            `validation/` and `phases.json`.
        pixels: for the splits "train" and "test" the cache of their images, or the stream of those
            to train on.
        class_names: names of the classes, [] where there are none.
        checkpoints: of phases that may be interrupted; `None` for phases that start anew.
    """

    output_dir: Path
    accelerator: Accelerator
    num_levels: int
    pixels: dict[str, GridDataset | PixelStream] = field(default_factory=dict)
    class_names: list[str] = field(default_factory=list)
    num_validation_images: int = 8
    cache_batch_size: int = 500
    checkpoints: Checkpoints | None = None
    logged_steps: int = 0  # of the phases so far: some trackers want steps that only grow

    def __post_init__(self):
        if self.num_validation_images < 1:
            raise ValueError(
                f"expected num_validation_images >= 1, got {self.num_validation_images}"
            )
        if self.accelerator.is_main_process:
            for replaced in self.output_dir.glob(f"*{REPLACED}"):
                # A kill came between the two names of a save: before it, nothing had changed.
                if replaced.with_suffix("").exists():
                    shutil.rmtree(replaced)
                else:
                    os.replace(replaced, replaced.with_suffix(""))
        self.accelerator.wait_for_everyone()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.pixels["train"].manifest.shape
        return channels, height, width

    def level(self, index: int) -> ProgressiveVAELevel:
        """The saved level, frozen."""
        folder = self.output_dir / f"level_{index}"
        if not (folder / "config.json").is_file():
            raise ValueError(f"expected a trained level in {folder}, got none: run its phase first")
        return ProgressiveVAELevel.from_pretrained(folder).requires_grad_(False).eval()

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
            start = time.perf_counter()
            write_cache(folder, manifest, self._encode(levels[0], finer), self.accelerator.state)
            count = len(GridDataset(folder, manifest))
            self.record(f"encode_{split}_{index}", count, time.perf_counter() - start)
        return GridDataset(folder, manifest)

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

    def forget(self, index: int):
        """Delete the cached codes of a level whose weights have just changed."""
        if self.accelerator.is_main_process:
            shutil.rmtree(self.output_dir / "cache" / f"level_{index}", ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def save(self, model: PreTrainedModel, name: str, identity: dict[str, Any]):
        """`save_pretrained` under a temporary name, then rename: complete or absent.

        A file `history.json` beside the weights holds the identities of the phases that made them.
        """
        state = self.accelerator.get_state_dict(model) if is_sharded(self.accelerator) else None
        if self.accelerator.is_main_process:
            folder = self.output_dir / name
            temporary = folder.with_name(f"{name}.incomplete")
            shutil.rmtree(temporary, ignore_errors=True)
            model.save_pretrained(temporary, state_dict=state)
            is_refit = identity["phase"].startswith("refit")
            history = [*(self._history(name) if is_refit else []), identity]
            (temporary / HISTORY).write_text(json.dumps(history, indent=2))
            replaced = folder.with_name(f"{name}{REPLACED}")
            if folder.exists():
                os.replace(folder, replaced)
            os.replace(temporary, folder)
            shutil.rmtree(replaced, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.checkpoints is not None:
            self.checkpoints.remove(identity["phase"], self.accelerator)

    def _history(self, name: str) -> list[dict[str, Any]]:
        path = self.output_dir / name / HISTORY
        advice = "delete the folder, and the phases that made it are run again"
        return read_json(path, advice, list) if path.is_file() else []

    def _latest(self, name: str, phase: str) -> list[dict[str, Any]]:
        """The identity with which a phase made the folder, [] if it did not; of a refit that was
        made more than once the last counts."""
        return [each for each in self._history(name) if each.get("phase") == phase][-1:]

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
        if where.is_dir() and not self._history(name):
            raise ValueError(
                f"expected {HISTORY} in {where}, which says what made it, got none: choose another "
                "--output_dir, or replace it with --overwrite_output_dir"
            )
        for each in self._latest(name, identity["phase"]):
            check_identity(identity, each, str(where), of_settings=True)

    def check_settings(self, planned: Mapping[str, dict[str, Any]], is_whole: bool):
        """Before anything is trained or replaced: whether a run is meant to go on with what is
        there, and was made by the same settings.

        Args:
            planned: for each phase that is to be run what is known of its identity beforehand.
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
        for phase, identity in planned.items():
            name = phase.removeprefix("refit_")
            self.check_history(name, identity)
            checkpoints.check(identity)
        phases = {path.name.removeprefix("checkpoint-")[:-9] for path in checkpoints.named()}
        if planned and not phases <= set(planned):
            raise ValueError(
                f"expected resume_from_checkpoint of a phase among {list(planned)}, got "
                f"{checkpoints.resume}"
            )

    def record(self, phase: str, num_images: int, seconds: float, **figures: float):
        """Note what a phase cost, and other figures of it, in `phases.json`."""
        if self.accelerator.is_main_process:
            phases = self._costs()
            phases[phase] = {
                "seconds": round(seconds, 2),
                "images": num_images,
                "images_per_second": round(num_images / seconds, 2),
                **figures,
            }
            write_json(self.output_dir / PHASES, phases)

    def drop_record(self, phase: str):
        if self.accelerator.is_main_process:
            phases = self._costs()
            if phases.pop(phase, None) is not None:
                write_json(self.output_dir / PHASES, phases)

    def phases(self) -> dict[str, dict[str, float]]:
        """What each phase of this run cost, in their order; rows of other levels are left out."""
        costs, names = self._costs(), []
        for i in range(self.num_levels, 0, -1):
            names += [f"level_{i}", f"encode_train_{i}", f"encode_test_{i}"]
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
            picture.save(folder / f"step-{step:06d}.png")
            array = np.asarray(picture.convert("RGB"))[None]
            for tracker in self.accelerator.trackers:
                if hasattr(tracker, "log_images"):
                    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    tracker.log_images({phase: array}, step=logged, **layout)


def _is_cost(cost: Any) -> bool:
    names = ("seconds", "images", "images_per_second")
    return isinstance(cost, dict) and all(
        isinstance(cost.get(name), (int, float)) for name in names
    )


def as_finer(grids: Tensor, level: ProgressiveVAELevel) -> Tensor:
    """What a level sees of cached grids: pixels in [−1, 1] on the finest level, else symbols."""
    return as_pixel_values(grids) if level.config.is_finest else grids
