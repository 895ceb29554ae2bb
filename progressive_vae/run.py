"""What one training leaves behind: levels, caches of codes, costs, pictures; and where it lies."""

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL.Image import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .chain import grid_sizes
from .checkpoints import Checkpoints, is_sharded
from .codes import GridDataset, Manifest, write_cache
from .fingerprint import fingerprint
from .level import ProgressiveVAELevel
from .streaming import PixelStream

HISTORY, REPLACED = "history.json", ".replaced"


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
    pixels: dict[str, GridDataset | PixelStream]
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
        level, info = ProgressiveVAELevel.from_pretrained(folder, output_loading_info=True)
        if any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
            raise ValueError(f"expected the weights of {folder} to be those of its config: {info}")
        return level.requires_grad_(False).eval()

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
        return json.loads(path.read_text()) if path.is_file() else []

    def is_done(self, name: str, identity: dict[str, Any]) -> bool:
        """Whether a run that is resumed finds the phase's work in the folder `name`."""
        is_resumed = self.checkpoints is not None and self.checkpoints.resume is not None
        return is_resumed and identity in self._history(name)

    def record(self, phase: str, num_images: int, seconds: float, **figures: float):
        """Note what a phase cost, and other figures of it, in `phases.json`."""
        if self.accelerator.is_main_process:
            path = self.output_dir / "phases.json"
            phases = json.loads(path.read_text()) if path.is_file() else {}
            phases[phase] = {
                "seconds": round(seconds, 2),
                "images": num_images,
                "images_per_second": round(num_images / seconds, 2),
                **figures,
            }
            write_json(path, phases)

    def drop_record(self, phase: str):
        path = self.output_dir / "phases.json"
        if self.accelerator.is_main_process and path.is_file():
            phases = json.loads(path.read_text())
            if phases.pop(phase, None) is not None:
                write_json(path, phases)

    def phases(self) -> dict[str, dict[str, float]]:
        """What each phase of this run cost, in their order; rows of other levels are left out."""
        costs = json.loads((self.output_dir / "phases.json").read_text())
        names = []
        for i in range(self.num_levels, 0, -1):
            names += [f"level_{i}", f"encode_train_{i}", f"encode_test_{i}"]
        names += ["prior", *(f"refit_level_{i}" for i in range(self.num_levels, 0, -1))]
        return {name: costs[name] for name in names if name in costs}

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


def write_json(path: Path, contents: dict):
    """Write under a temporary name, then rename."""
    temporary = path.with_suffix(".incomplete")
    temporary.write_text(json.dumps(contents, indent=2) + "\n")
    os.replace(temporary, path)


def as_finer(grids: Tensor, level: ProgressiveVAELevel) -> Tensor:
    """What a level sees of cached grids: pixels in [−1, 1] on the finest level, else symbols."""
    return grids / 127.5 - 1 if level.config.is_finest else grids
