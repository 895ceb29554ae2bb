"""The phases of training: each is one fit, from files to a saved part of the pipeline.

`LevelPhase` trains an encoder and a decoder under the uniform prior on their codes, `PriorPhase`
trains `P_Φ(z_1)`, and `RefitPhase` trains another decoder of the same codes for a trained level.
They have only files in common, so each can run again on its own.
"""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

import torch
from accelerate.utils import set_seed
from torch import Tensor

from ..configuration.level import ProgressiveVAELevelConfig
from ..configuration.prior import ProgressiveVAEPriorConfig
from ..configuration.validation import MAX_LEVELS, grid_sizes
from ..data.augmentation import IDENTITY, AugmentedDataset
from ..data.classes import NO_LABEL
from ..data.code_cache import GridDataset, Manifest, PairedDataset
from ..data.streaming import PixelStream
from ..models.conditioning import Conditioning
from ..models.encoder import Encoder
from ..models.level import ProgressiveVAELevel
from ..models.preview_decoder import PreviewDecoder
from ..models.prior import ProgressiveVAEPrior
from ..pipeline import ProgressiveVAEPipeline
from ..visualization import reconstruction_grid, sample_grid
from .args import FitSettings
from .checkpoints import Progress, is_sharded
from .fit import Fit
from .run import Run, as_finer

# Fields of a saved config that say which versions wrote it.
VERSION_FIELDS = ("transformers_version", "progressive_vae", "format_version")
MAX_KMEANS_VECTORS = 100_000  # bounds the memory of their distances, for any image size
VALIDATION_IMAGES = 1000
VALIDATION_BATCH_SIZE = 250

Model: TypeAlias = ProgressiveVAELevel | ProgressiveVAEPrior
ModelConfig: TypeAlias = ProgressiveVAELevelConfig | ProgressiveVAEPriorConfig
Examples: TypeAlias = GridDataset | PairedDataset | AugmentedDataset | PixelStream
Validate: TypeAlias = Callable[[Progress], dict[str, float]]


@dataclass(kw_only=True, frozen=True)
class Phase:
    """One fit; calling a phase fits its model and saves it, unless a resumed run finds it done.

    Args:
        settings: of the fit.
        seconds: its share of the run's time, which replaces the steps of the settings. Report and
            delays take a part of it, see `TimeBudget`.
        place: its number and the number of phases, for messages.
        seconds_after: planned duration of the later phases, for the progress bar.
    """

    settings: FitSettings
    seconds: float | None = None
    place: str = ""
    seconds_after: float = 0.0

    @property
    def name(self) -> str:
        """The name in flags, files and metrics."""
        raise NotImplementedError

    @property
    def part(self) -> str:
        """The folder of the model: `level_i` or `prior`."""
        raise NotImplementedError

    @property
    def source(self) -> int:
        """The phase trains on z_source; z_{N + 1} are the pixels."""
        raise NotImplementedError

    def model_config(self, levels: list[ProgressiveVAELevelConfig]) -> ModelConfig:
        """Return the config of the model, for the configs of [level_1 … level_N]."""
        raise NotImplementedError

    def __call__(self, run: Run) -> Model:
        raise NotImplementedError

    def history(self, run: Run) -> list[dict[str, Any]]:
        """Return the identities of the part's earlier phases, whose weights this one uses."""
        return []

    def identity(self, run: Run, config: ModelConfig, data: dict[str, Any]) -> dict[str, Any]:
        """Return all that the weights of the phase depend on, as JSON values."""
        accelerator = run.accelerator
        settings = asdict(self.settings)
        del settings["time_share"]
        identity = {
            "phase": self.name,
            "config": {k: v for k, v in config.to_dict().items() if k not in VERSION_FIELDS},
            "data": data,
            "num_processes": accelerator.num_processes,
            "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
            "mixed_precision": accelerator.mixed_precision,
            "seed": run.settings.seed,
            "seconds": self.seconds,
            **settings,
        }
        if config.condition_dim is not None and run.texts is not None:
            identity["text_encoder"] = run.texts.manifest.text_encoder
        if self.part == f"level_{run.num_levels}" and run.augmentation != IDENTITY:
            identity["forms"] = asdict(run.augmentation)
        return json.loads(json.dumps(identity))

    def planned_identity(
        self, run: Run, levels: list[ProgressiveVAELevelConfig], pixels: Manifest
    ) -> dict[str, Any]:
        """Return the identity without the fields that earlier phases decide.

        Args:
            levels: the configs of [level_1 … level_N].
            pixels: of the training split.
        """
        data = pixels
        if self.source <= len(levels):
            size = grid_sizes(levels, (pixels.shape[-2], pixels.shape[-1]))[self.source - 1]
            num_values = levels[self.source - 1].codebook_size
            data = replace(pixels, shape=size, num_values=num_values)
        return self.identity(run, self.model_config(levels), asdict(data))

    def _fit(
        self,
        run: Run,
        model: Model,
        examples: Examples,
        to_inputs: Callable[[dict[str, Tensor]], dict[str, Any]],
        validate: Validate,
        identity: dict[str, Any],
        clock: tuple[float, float | None],
    ):
        """Fit the model, validate it, record the cost, and save it.

        Args:
            clock: start and duration of the phase, of the run's time budget.
        """
        start_time, seconds = clock
        start_time = run.budget.begin_fit(start_time, seconds)
        accelerator = run.accelerator
        fit = Fit(
            model,
            examples,
            to_inputs,
            accelerator,
            self.settings,
            identity,
            run=run.settings,
            checkpoints=run.checkpoints,
            logged_steps=run.logged_steps,
            seconds=seconds,
            start_time=start_time,
            title=f"{self.name} ({self.place})" if self.place else self.name,
            seconds_after=self.seconds_after,
        )
        progress = Progress()
        metrics: dict[str, float] = {}
        for progress in fit:
            # All processes of a sharded model have to take part in its forward pass.
            if accelerator.is_main_process or is_sharded(accelerator):
                metrics = validate(progress)
                progress.validation_loss = metrics["validation_bits_per_dim"]
        batches = accelerator.num_processes * accelerator.gradient_accumulation_steps
        num_images = progress.step * self.settings.train_batch_size * batches
        waiting = round(progress.waited / progress.seconds, 4)
        metrics = {"steps": progress.step, "waiting_share": waiting, **metrics}
        if fit.early_stopping is not None:
            metrics["best_step"] = fit.early_stopping.best_step
            metrics["validation_bits_per_dim"] = fit.early_stopping.lowest_loss
        run.record(self.name, num_images, progress.seconds, **metrics)
        run.logged_steps += progress.step
        run.save(model, self.part, [*self.history(run), identity])
        if run.checkpoints is not None:
            run.checkpoints.end_of_fit(accelerator)


@dataclass(kw_only=True, frozen=True)
class LevelPhase(Phase):
    """Train encoder, codebook and decoder of level `index`, under the uniform prior on its codes.

    The data are z_{index + 1}, as the saved finer levels encode the images.

    Args:
        is_encoder: the only decoder is the auxiliary one; a `RefitPhase` trains a stronger one.
    """

    index: int
    config: ProgressiveVAELevelConfig
    is_encoder: bool = False

    @property
    def part(self) -> str:
        return f"level_{self.index}"

    @property
    def name(self) -> str:
        return f"encoder_{self.index}" if self.is_encoder else self.part

    @property
    def source(self) -> int:
        return self.index + 1

    def model_config(self, levels: list[ProgressiveVAELevelConfig]) -> ProgressiveVAELevelConfig:
        return self.config

    def __call__(self, run: Run) -> ProgressiveVAELevel:
        clock = run.budget.begin_phase(self.seconds)
        examples = run.examples(self.source)
        config = copy.deepcopy(self.config)
        config.finer_fingerprint = run.fingerprint(self.index + 1)
        identity = self.identity(run, config, _data_identity(examples, run))
        if run.is_done(self.part, identity):
            return run.level(self.index)
        finer_levels = [run.level(i) for i in range(self.index + 1, run.num_levels + 1)]
        level = self._initial_level(run, config, finer_levels, examples)
        # Other decoders were of the previous level.
        for name in (f"refit_{self.part}", f"decoder_{self.index}"):
            run.drop_record(name)
        options: dict[str, Any] = {}
        if finer_levels and all(one.auxiliary is not None for one in [level, *finer_levels]):
            options["preview_decoder"] = _preview_decoder(run, finer_levels)

        def to_inputs(batch: dict[str, Tensor]) -> dict[str, Any]:
            finer = as_finer(batch["grid"], level)
            return {"finer": finer, **_condition(batch, level, run), **options}

        validate = _level_validation(run, self, level)
        self._fit(run, level, examples, to_inputs, validate, identity, clock)
        run.clear_cache(self.index)  # the codes are those of the previous level
        return level

    def _initial_level(
        self,
        run: Run,
        config: ProgressiveVAELevelConfig,
        finer_levels: list[ProgressiveVAELevel],
        examples: GridDataset | AugmentedDataset | PixelStream,
    ) -> ProgressiveVAELevel:
        """Return a new level, whose code embedding and codebook are initialized from data."""
        seed = run.settings.seed
        set_seed(seed)
        level = ProgressiveVAELevel(config)
        if finer_levels:
            assert isinstance(level.encoder, Encoder)  # a tokenizer is the finest level
            generator = torch.Generator().manual_seed(seed)
            level.encoder.embed_like(finer_levels[0].quantizer.codebook, generator)
        # The fit of an encoder has few steps: its codebook has to follow the encoder quickly.
        batch_size = self.settings.train_batch_size * run.accelerator.num_processes
        initialize_codebook(level, examples, seed, batch_size if self.is_encoder else None)
        return level


@dataclass(kw_only=True, frozen=True)
class RefitPhase(Phase):
    """Train another decoder of level `index`, on its cached codes.

    Encoder and codebook stay as they are, bit by bit: coarser levels remain valid.

    Args:
        changes: fields of the decoder's config.
        from_scratch: initialize its weights, as `ProgressiveVAELevel.with_decoder` does.
        is_first: it is the first decoder after the auxiliary one, and replaces any other.
        is_on_top: the level may have been refitted before: its current decoder is refitted.
    """

    index: int
    changes: dict[str, Any]
    from_scratch: bool = False
    is_first: bool = False
    is_on_top: bool = False

    @property
    def part(self) -> str:
        return f"level_{self.index}"

    @property
    def name(self) -> str:
        return f"decoder_{self.index}" if self.is_first else f"refit_{self.part}"

    @property
    def source(self) -> int:
        return self.index

    @property
    def has_new_weights(self) -> bool:
        return self.from_scratch or self.is_first

    def identity(self, run: Run, config: ModelConfig, data: dict[str, Any]) -> dict[str, Any]:
        counts_refits = self.is_on_top and not self.is_first
        return {
            **super().identity(run, config, data),
            "from_scratch": self.has_new_weights,
            "refits_before": self._num_refits(run) if counts_refits else 0,
        }

    def history(self, run: Run) -> list[dict[str, Any]]:
        history = run.history(self.part)
        return history[:1] if self.is_first else history  # the first entry is the encoder's

    def _num_refits(self, run: Run) -> int:
        """Return the number of times that this phase has refitted the level."""
        return sum(entry.get("phase") == self.name for entry in run.history(self.part))

    def model_config(self, levels: list[ProgressiveVAELevelConfig]) -> ProgressiveVAELevelConfig:
        return levels[self.index - 1].with_decoder(**self.changes)

    def __call__(self, run: Run) -> ProgressiveVAELevel:
        clock = run.budget.begin_phase(self.seconds)
        examples: Examples = run.examples(self.index + 1)
        codes = run.grids("train", self.index)
        if isinstance(examples, GridDataset) and isinstance(codes, GridDataset):
            examples = PairedDataset(examples, codes)
        set_seed(run.settings.seed)
        previous = run.level(self.index)
        level = previous.with_decoder(self.has_new_weights, **self.changes)
        identity = self.identity(run, level.config, _data_identity(codes, run))
        if run.is_done(self.part, identity):
            return previous
        if self._num_refits(run) and not self.is_on_top and not self.is_first:
            raise ValueError(
                f"expected {self.part} in {run.output_dir} as its first fit left it, got one that "
                f"was refitted since: run --phase {self.part} first"
            )

        def to_inputs(batch: dict[str, Tensor]) -> dict[str, Any]:
            finer = as_finer(batch["grid"], level)
            codes = batch.get("codes")
            if codes is None:  # of augmented and streamed images no codes are cached
                codes = level.encode(finer)
            return {"finer": finer, "codes": codes, **_condition(batch, level, run)}

        validate = _level_validation(run, self, level)
        self._fit(run, level, examples, to_inputs, validate, identity, clock)
        return level


@dataclass(kw_only=True, frozen=True)
class PriorPhase(Phase):
    """Train `P_Φ(z_1)` by maximum likelihood on the cached z_1."""

    config: ProgressiveVAEPriorConfig

    @property
    def name(self) -> str:
        return "prior"

    @property
    def part(self) -> str:
        return "prior"

    @property
    def source(self) -> int:
        return 1

    def model_config(self, levels: list[ProgressiveVAELevelConfig]) -> ProgressiveVAEPriorConfig:
        return self.config

    def __call__(self, run: Run) -> ProgressiveVAEPrior:
        clock = run.budget.begin_phase(self.seconds)
        examples = run.grids("train", 1)
        held_out = run.grids(run.validation_split, 1)
        assert isinstance(held_out, GridDataset)  # a stream's other splits are cached
        config = copy.deepcopy(self.config)
        config.finer_fingerprint = run.fingerprint(1)
        identity = self.identity(run, config, _data_identity(examples, run))
        if run.is_done(self.part, identity):
            return ProgressiveVAEPrior.from_pretrained(run.output_dir / self.part)
        set_seed(run.settings.seed)
        prior = ProgressiveVAEPrior(config)
        levels = [run.level(i) for i in range(1, run.num_levels + 1)]
        pipe = _validation_pipeline(run, prior, levels)

        def to_inputs(batch: dict[str, Tensor]) -> dict[str, Any]:
            return {"codes": batch["grid"], **_condition(batch, prior, run)}

        def validate(progress: Progress) -> dict[str, float]:
            codes = held_out.batch(slice(0, VALIDATION_IMAGES))[0].to(prior.device)
            with torch.no_grad():
                bits = -prior.log_prob(codes).mean().item() / math.log(2)
            metrics = {"validation_bits_per_dim": bits / math.prod(run.image_shape)}
            image = sample_grid(pipe, columns=run.settings.num_validation_images)
            run.log_validation(self.name, progress.step, image, metrics)
            return metrics

        self._fit(run, prior, examples, to_inputs, validate, identity, clock)
        return prior


def independent_part(name: str) -> str | None:
    """Return the part that a phase writes if no other phase depends on it, else `None`.

    Such phases, of decoders and the prior, may run at the same time: they only read cached codes.
    """
    parts = {"prior": "prior"}
    for i in range(1, MAX_LEVELS + 1):
        parts |= {f"decoder_{i}": f"level_{i}", f"refit_level_{i}": f"level_{i}"}
    return parts.get(name)


def initialize_codebook(
    level: ProgressiveVAELevel,
    examples: GridDataset | AugmentedDataset | PixelStream,
    seed: int,
    num_images: int | None = None,
):
    """Initialize the quantizer with latents of up to 2,000 images, sampled with the seed.

    All processes get the same codebook. By default the statistics of k-means weigh as much as all
    those images: the codebook moves slowly during the first hundreds of steps, in which the encoder
    changes most.

    Args:
        num_images: weight of the statistics, in images.
    """
    generator = torch.Generator().manual_seed(seed)
    grids = examples.sample(2000, seed)
    with torch.no_grad():
        latents = [level.encoder(as_finer(part, level)) for part in grids.split(250)]
    vectors = torch.cat(latents).movedim(1, -1).flatten(0, -2)
    if len(vectors) > MAX_KMEANS_VECTORS:
        rows = torch.randperm(len(vectors), generator=generator)[:MAX_KMEANS_VECTORS]
        vectors = vectors[rows]
    weight = num_images and num_images * latents[0][0, 0].numel()
    level.quantizer.initialize(vectors, generator, weight)


def _preview_decoder(run: Run, finer_levels: list[ProgressiveVAELevel]) -> PreviewDecoder:
    """Return the decoder from z_{index + 1} to images, for the reconstruction loss of a level."""
    for level in finer_levels:
        level.to(run.accelerator.device)
    sizes = grid_sizes([level.config for level in finer_levels], run.image_shape[1:])[1:]
    return PreviewDecoder(finer_levels, sizes)


def _level_validation(
    run: Run, phase: LevelPhase | RefitPhase, level: ProgressiveVAELevel
) -> Validate:
    """Return a function that measures a level on held-out images and logs reconstructions."""
    held_out = run.grids(run.validation_split, phase.index + 1)
    finer_levels = [run.level(i) for i in range(phase.index + 1, run.num_levels + 1)]
    pipe = _validation_pipeline(run, None, [level, *finer_levels])
    pixels = run.pixels[run.validation_split]
    assert isinstance(pixels, GridDataset) and isinstance(held_out, GridDataset)
    images = pixels.batch(slice(0, run.settings.num_validation_images))[0]

    def validate(progress: Progress) -> dict[str, float]:
        grids = held_out.batch(slice(0, VALIDATION_IMAGES))[0]
        nats = 0.0
        with torch.no_grad(), run.accelerator.autocast():
            for part in grids.split(VALIDATION_BATCH_SIZE):
                finer = as_finer(part, level).to(level.device)
                nats -= level.log_prob(finer, level.encode(finer)).sum().item()
        bits = nats / (len(grids) * math.log(2))
        metrics = {"validation_bits_per_dim": bits / math.prod(run.image_shape)}
        image = reconstruction_grid(pipe, images.to(torch.uint8))
        run.log_validation(phase.name, progress.step, image, metrics)
        return metrics

    return validate


def _validation_pipeline(
    run: Run, prior: ProgressiveVAEPrior | None, levels: list[ProgressiveVAELevel]
) -> ProgressiveVAEPipeline:
    pipe = ProgressiveVAEPipeline.from_levels(prior, levels, run.image_shape[1:])
    pipe.to(run.accelerator.device).set_progress_bar_config(disable=True)
    return pipe


def _data_identity(
    examples: GridDataset | AugmentedDataset | PixelStream, run: Run
) -> dict[str, Any]:
    identity = {**asdict(examples.manifest), "num_examples": examples.num_examples}
    if isinstance(examples, PixelStream):
        # Each worker shuffles its part of the stream, so their number decides the order.
        identity["dataloader_num_workers"] = run.settings.dataloader_num_workers
    return identity


def _condition(batch: dict[str, Any], model: Model, run: Run) -> dict[str, Conditioning]:
    """Return classes and embeddings of captions as keyword arguments; images without a label or a
    caption get the null condition."""
    config = model.config
    if not config.is_conditional:
        return {}
    num_classes = config.num_classes
    labels = batch["label"]
    has_class = labels != NO_LABEL if num_classes else labels != labels
    class_ids = labels.where(has_class, num_classes)
    conditioning = Conditioning(class_ids, num_classes, is_null=not num_classes)
    if config.condition_dim is not None:
        conditioning = conditioning.with_embeddings(*run.caption_embeddings(batch["index"]))
    return {"class_labels": conditioning}
