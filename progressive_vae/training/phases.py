"""The phases of training, as values: each is one fit, from saved artefacts to a saved part.

`LevelPhase` learns an encoder and a decoder under the uniform prior on their codes, `PriorPhase`
learns `P_Φ(z_1)`, and `RefitPhase` gives a trained level another decoder of the same codes. They
share nothing but what is saved, so any of them can be run again alone.
"""

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeAlias

import torch
from accelerate.utils import set_seed
from torch import Tensor

from ..configuration.level import ProgressiveVAELevelConfig
from ..configuration.prior import ProgressiveVAEPriorConfig
from ..configuration.validation import MAX_LEVELS, grid_sizes
from ..data.augmentation import IDENTITY
from ..data.classes import NO_LABEL
from ..data.code_cache import GridDataset, Manifest, PairedDataset
from ..data.streaming import PixelStream
from ..models.level import ProgressiveVAELevel
from ..models.preview_decoder import PreviewDecoder
from ..models.prior import ProgressiveVAEPrior
from ..pipeline import ProgressiveVAEPipeline
from ..visualization import reconstruction_grid, sample_grid
from .args import FitSettings
from .checkpoints import Progress, is_sharded
from .fit import fit
from .run import Run, as_finer

WRITTEN_BY = ("transformers_version", "progressive_vae", "format_version")
MAX_KMEANS_VECTORS = 100_000  # bounds the distances held at a time, whatever the image size

Model: TypeAlias = ProgressiveVAELevel | ProgressiveVAEPrior
ModelConfig: TypeAlias = ProgressiveVAELevelConfig | ProgressiveVAEPriorConfig
Validate: TypeAlias = Callable[[Progress], dict[str, float]]


@dataclass(kw_only=True)
class Phase:
    """What the kinds share. Each has

    - `name`, in flags, files and figures, and `part`, the folder that it ends in;
    - `source`: it is fitted to z_source, the pixels being z_{N + 1};
    - `history(run)`: of the part, before it: the identities of the phases on which it stands;
    - `model_config(levels)`: of the model that it makes, given the configs of all levels;
    - `__call__(run)`: fits the model and saves it; what a resumed run finds done stays as it is.

    Args:
        settings: of the fit.
        seconds: how long it may take, in place of the steps that the settings say.
        place: which of how many phases it is, for people.
        seconds_after: how long those that follow may take.
    """

    settings: FitSettings
    seconds: float | None = None
    place: str = ""
    seconds_after: float = 0.0

    name: str = field(init=False)
    part: str = field(init=False)
    source: int = field(init=False)

    def identity(self, run: Run, config: ModelConfig, data: dict[str, Any]) -> dict[str, Any]:
        """All that the weights of a phase depend on, and nothing else, as JSON holds it."""
        accelerator, settings = run.accelerator, asdict(self.settings)
        del settings["time_share"]
        identity = {
            "phase": self.name,
            "config": {k: v for k, v in config.to_dict().items() if k not in WRITTEN_BY},
            "data": data,
            "num_processes": accelerator.num_processes,
            "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
            "mixed_precision": accelerator.mixed_precision,
            "seed": run.settings.seed,
            "seconds": self.seconds,
            **settings,
        }
        if self.part == f"level_{run.num_levels}" and run.forms != IDENTITY:
            identity["forms"] = asdict(run.forms)
        return json.loads(json.dumps(identity))

    def history(self, run: Run) -> list[dict[str, Any]]:
        return []

    def planned(
        self, run: Run, levels: list[ProgressiveVAELevelConfig], pixels: Manifest
    ) -> dict[str, Any]:
        """The identity as far as it is known before the phases before it are done.

        Args:
            levels: the configs of [level_1 … level_N].
            pixels: of the training split.
        """
        if self.source <= len(levels):
            size = grid_sizes(levels, (pixels.shape[-2], pixels.shape[-1]))[self.source - 1]
            num_values = levels[self.source - 1].codebook_size
            pixels = replace(pixels, shape=size, num_values=num_values)
        return self.identity(run, self.model_config(levels), asdict(pixels))

    def model_config(self, levels: list[ProgressiveVAELevelConfig]) -> ModelConfig:
        raise NotImplementedError

    def __call__(self, run: Run) -> Model:
        raise NotImplementedError

    def _fit(
        self,
        run: Run,
        model: Model,
        train: GridDataset | PairedDataset | PixelStream,
        to_inputs: Callable[[dict[str, Tensor]], dict[str, Any]],
        validate: Validate,
        identity: dict[str, Any],
        began: float,
    ):
        """Fit, show the validations, note the cost, and save."""
        accelerator, progress, figures = run.accelerator, Progress(), {}
        for progress in fit(
            model,
            train,
            to_inputs,
            accelerator,
            self.settings,
            identity,
            run=run.settings,
            checkpoints=run.checkpoints,
            logged_steps=run.logged_steps,
            seconds=self.seconds,
            began=began,
            title=f"{self.name} ({self.place})" if self.place else self.name,
            seconds_after=self.seconds_after,
        ):
            if accelerator.is_main_process or is_sharded(accelerator):  # then all have to take part
                figures = validate(progress)
        batches = accelerator.num_processes * accelerator.gradient_accumulation_steps
        num_images = progress.step * self.settings.train_batch_size * batches
        waiting = round(progress.waited / progress.seconds, 4)
        figures = {"steps": progress.step, "waiting_share": waiting, **figures}
        run.record(self.name, num_images, progress.seconds, **figures)
        run.logged_steps += progress.step
        run.save(model, self.part, [*self.history(run), identity])
        if run.checkpoints is not None:
            run.checkpoints.end_of_fit(accelerator)


@dataclass(kw_only=True)
class LevelPhase(Phase):
    """Level `index`, from the saved finer levels and the cached z_{index + 1}: its encoder, its
    codebook and its decoder, under the uniform prior on its codes.

    Args:
        is_encoder: the decoder is the auxiliary one alone; a `RefitPhase` gives it a stronger one.
    """

    index: int
    config: ProgressiveVAELevelConfig
    is_encoder: bool = False

    def __post_init__(self):
        self.part = f"level_{self.index}"
        self.name = f"encoder_{self.index}" if self.is_encoder else self.part
        self.source = self.index + 1

    def model_config(self, levels: list[ProgressiveVAELevelConfig]) -> ProgressiveVAELevelConfig:
        return self.config

    def __call__(self, run: Run) -> ProgressiveVAELevel:
        began, train = time.perf_counter(), run.examples(self.source)
        config = copy.deepcopy(self.config)
        config.finer_fingerprint = run.fingerprint(self.index + 1)
        identity = self.identity(run, config, _of_data(train, run))
        if run.is_done(self.part, identity):
            return run.level(self.index)
        set_seed(run.settings.seed)
        level = ProgressiveVAELevel(config)
        finer_levels = [run.level(i) for i in range(self.index + 1, run.num_levels + 1)]
        if finer_levels:
            generator = torch.Generator().manual_seed(run.settings.seed)
            level.encoder.embed_like(finer_levels[0].quantizer.codebook, generator)
        # An encoder alone takes few steps: its codebook has to follow it soon.
        batch_size = self.settings.train_batch_size * run.accelerator.num_processes
        weight = batch_size if self.is_encoder else None
        initialize_codebook(level, train, run.settings.seed, weight)
        for name in (f"refit_{self.part}", f"decoder_{self.index}"):
            run.drop_record(name)  # of the level that was there before
        told = {}
        if finer_levels and all(each.auxiliary is not None for each in [level, *finer_levels]):
            told["preview_decoder"] = _painter(run, finer_levels)

        def to_inputs(batch: dict[str, Tensor]) -> dict[str, Any]:
            return {"finer": as_finer(batch["grid"], level), **_class_labels(batch, level), **told}

        validate = _level_validation(run, self, level)
        self._fit(run, level, train, to_inputs, validate, identity, began)
        run.clear_cache(self.index)  # the codes of the level that was there before
        return level


@dataclass(kw_only=True)
class RefitPhase(Phase):
    """The decoder of level `index` again, on the cached codes. The encoder and the codebook stay as
    they are, to the bit: nothing coarser has to be trained again.

    Args:
        changes: fields of the decoder's config, and
        from_scratch: whether its weights begin anew, as in `ProgressiveVAELevel.with_decoder`.
        is_first: it is the first decoder beside the auxiliary one, and replaces any other.
        on_top: it may be another refit, after those that the level has had.
    """

    index: int
    changes: dict[str, Any]
    from_scratch: bool = False
    is_first: bool = False
    on_top: bool = False

    def __post_init__(self):
        self.part = f"level_{self.index}"
        self.name = f"decoder_{self.index}" if self.is_first else f"refit_{self.part}"
        self.source, self.from_scratch = self.index, self.from_scratch or self.is_first

    def identity(self, run: Run, config: ModelConfig, data: dict[str, Any]) -> dict[str, Any]:
        more = {"from_scratch": self.from_scratch, "refits_before": 0}
        if self.on_top and not self.is_first:
            more["refits_before"] = len(self._refits(run))
        return {**super().identity(run, config, data), **more}

    def history(self, run: Run) -> list[dict[str, Any]]:
        whole = run.history(self.part)
        return whole[:1] if self.is_first else whole  # after the encoder's, or after all

    def _refits(self, run: Run) -> list[dict[str, Any]]:
        """What the level's decoder has gone through since the level was trained."""
        return [each for each in run.history(self.part) if each.get("phase") == self.name]

    def model_config(self, levels: list[ProgressiveVAELevelConfig]) -> ProgressiveVAELevelConfig:
        return levels[self.index - 1].with_decoder(**self.changes)

    def __call__(self, run: Run) -> ProgressiveVAELevel:
        began = time.perf_counter()
        pairs, codes = run.examples(self.index + 1), run.grids("train", self.index)
        if isinstance(pairs, GridDataset):
            pairs = PairedDataset(pairs, codes)
        set_seed(run.settings.seed)
        old = run.level(self.index)
        level = old.with_decoder(self.from_scratch, **self.changes)
        identity = self.identity(run, level.config, _of_data(codes, run))
        if run.is_done(self.part, identity):
            return old
        if self._refits(run) and not self.on_top and not self.is_first:
            raise ValueError(
                f"expected {self.part} in {run.output_dir} as its first fit left it, got one that "
                f"was refitted since: run --phase {self.part} first"
            )

        def to_inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            finer, known = as_finer(batch["grid"], level), batch.get("codes")
            shown = level.encode(finer) if known is None else known  # not in all forms, or streams
            return {"finer": finer, "codes": shown, **_class_labels(batch, level)}

        validate = _level_validation(run, self, level)
        self._fit(run, level, pairs, to_inputs, validate, identity, began)
        return level


@dataclass(kw_only=True)
class PriorPhase(Phase):
    """`P_Φ(z_1)`, by maximum likelihood on the cached z_1."""

    config: ProgressiveVAEPriorConfig

    def __post_init__(self):
        self.name = self.part = "prior"
        self.source = 1

    def model_config(self, levels: list[ProgressiveVAELevelConfig]) -> ProgressiveVAEPriorConfig:
        return self.config

    def __call__(self, run: Run) -> ProgressiveVAEPrior:
        began = time.perf_counter()
        train, held_out = run.grids("train", 1), run.grids("test", 1)
        config = copy.deepcopy(self.config)
        config.finer_fingerprint = run.fingerprint(1)
        identity = self.identity(run, config, _of_data(train, run))
        if run.is_done(self.part, identity):
            return ProgressiveVAEPrior.from_pretrained(run.output_dir / self.part)
        set_seed(run.settings.seed)
        prior = ProgressiveVAEPrior(config)
        view = _view(run, prior, [run.level(i) for i in range(1, run.num_levels + 1)])

        def to_inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"codes": batch["grid"], **_class_labels(batch, prior)}

        def validate(progress: Progress) -> dict[str, float]:
            grids = held_out.batch(slice(0, 1000))[0].to(prior.device)
            with torch.no_grad():
                bits = -prior.log_prob(grids).mean().item() / math.log(2)
            figures = {"validation_bits_per_dim": bits / math.prod(run.image_shape)}
            picture = sample_grid(view, columns=run.settings.num_validation_images)
            run.show(self.name, progress.step, picture, figures)
            return figures

        self._fit(run, prior, train, to_inputs, validate, identity, began)
        return prior


def part_alone(name: str) -> str | None:
    """The part that a phase writes, if nothing else stands on what it changes: then others may run
    beside it. Decoders and the prior share but cached codes."""
    parts = {"prior": "prior"}
    for i in range(1, MAX_LEVELS + 1):
        parts |= {f"decoder_{i}": f"level_{i}", f"refit_level_{i}": f"level_{i}"}
    return parts.get(name)


def initialize_codebook(
    level: ProgressiveVAELevel,
    train: GridDataset | PixelStream,
    seed: int,
    num_images: int | None = None,
):
    """The quantizer begins with latents of up to 2,000 images, drawn with the seed: alike on all
    processes.

    The statistics that k-means leaves weigh as much as all those images, so that the codebook moves
    slowly during the first hundreds of steps, while the encoder changes most; or as `num_images`.
    """
    generator = torch.Generator().manual_seed(seed)
    grids = train.sample(2000, seed)
    with torch.no_grad():
        latents = [level.encoder(as_finer(part, level)) for part in grids.split(250)]
    vectors = torch.cat(latents).movedim(1, -1).flatten(0, -2)
    if len(vectors) > MAX_KMEANS_VECTORS:
        rows = torch.randperm(len(vectors), generator=generator)[:MAX_KMEANS_VECTORS]
        vectors = vectors[rows]
    weight = num_images and num_images * latents[0][0, 0].numel()
    level.quantizer.initialize(vectors, generator, weight)


def _painter(run: Run, finer_levels: list[ProgressiveVAELevel]) -> PreviewDecoder:
    """By what a level of symbols learns how they look."""
    for level in finer_levels:
        level.to(run.accelerator.device)
    sizes = grid_sizes([level.config for level in finer_levels], run.image_shape[1:])[1:]
    return PreviewDecoder(finer_levels, sizes)


def _level_validation(
    run: Run, phase: LevelPhase | RefitPhase, level: ProgressiveVAELevel
) -> Validate:
    """Bits of held-out images under the level, and what it says of some, through the finer levels,
    which are trained already."""
    held_out = run.grids("test", phase.index + 1)
    finer_levels = [run.level(i) for i in range(phase.index + 1, run.num_levels + 1)]
    view = _view(run, None, [level, *finer_levels])
    images = run.pixels["test"].batch(slice(0, run.settings.num_validation_images))[0]

    def validate(progress: Progress) -> dict[str, float]:
        grids, nats = held_out.batch(slice(0, 1000))[0], 0.0
        with torch.no_grad(), run.accelerator.autocast():
            for chunk in grids.split(250):
                finer = as_finer(chunk, level).to(level.device)
                nats -= level.log_prob(finer, level.encode(finer)).sum().item()
        bits = nats / (len(grids) * math.log(2))
        figures = {"validation_bits_per_dim": bits / math.prod(run.image_shape)}
        picture = reconstruction_grid(view, images.to(torch.uint8))
        run.show(phase.name, progress.step, picture, figures)
        return figures

    return validate


def _view(
    run: Run, prior: ProgressiveVAEPrior | None, levels: list[ProgressiveVAELevel]
) -> ProgressiveVAEPipeline:
    view = ProgressiveVAEPipeline.from_levels(prior, levels, run.image_shape[1:])
    view.to(run.accelerator.device).set_progress_bar_config(disable=True)
    return view


def _of_data(train: GridDataset | PixelStream, run: Run) -> dict[str, Any]:
    found = {**asdict(train.manifest), "num_examples": train.num_examples}
    if isinstance(train, PixelStream):  # workers share it out, each with a window of its own
        found["dataloader_num_workers"] = run.settings.dataloader_num_workers
    return found


def _class_labels(batch: dict[str, Tensor], model: Model) -> dict[str, Tensor]:
    """The class ids, with the null class for images without a label."""
    if not model.config.num_classes:
        return {}
    labels = batch["label"]
    return {"class_labels": labels.where(labels != NO_LABEL, model.config.num_classes)}
