"""The greedy order, from the data up: `train()`.

for i in N … 1:  learn P_Ψ(z_i | z_{i+1}) and P_Θ(z_{i+1} | z_i) under a uniform P(z_i); freeze;
                 encode the data set to z_i
learn P_Φ(z_1)
where asked:     learn P_Θ(z_{i+1} | z_i) again, on codes that stay as they are
"""

import copy
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
from accelerate import Accelerator
from transformers.utils import logging as transformers_logging

from ..configuration.level import DECODER_FIELDS, ProgressiveVAELevelConfig
from ..configuration.validation import check_image_size
from ..data.dataset import Images
from ..data.source import open_dataset
from ..hub.repository import ensure_writable_repository, figures, push_or_warn
from ..models.level import ProgressiveVAELevel
from ..models.prior import ProgressiveVAEPrior
from ..paths import expand_home, make_folder
from ..pipeline import ProgressiveVAEPipeline
from ..serialization import write_text
from .checkpoints import Checkpoints, flat
from .lock import LOCK, MOMENT, locked
from .phases import LevelPhase, Model, Phase, PriorPhase, RefitPhase, part_alone
from .recipe import Recipe, read_recipe
from .report import (
    RECIPE,
    after_phase,
    assemble,
    evaluate_and_save,
)
from .resume import check_resume, copy_pretrained_levels, given_levels, write_recipe
from .run import PHASES, Run, make_accelerator

# How pixels lie around a given tokenizer's picture is soon learned.
STEPS_OF_SCALES, SHARE_OF_SCALES = 500, 0.05
MIN_FOR_DISTANCE = 2  # images whose features have a covariance
BESIDE_THE_PIPELINE = ("cache/", "logs/", "validation/", "checkpoint-*/", "*.incomplete",
                       "*.replaced/", "history.json", PHASES, RECIPE, f"{LOCK}*",
                       MOMENT)  # fmt: skip


def train(
    recipe: Mapping[str, Any] | str | Path | None = None,
    dataset: Images | str | Path | None = None,
    output_dir: str | Path | None = None,
    max_train_minutes: float | None = None,
    phase: str = "all",
    resume_from_checkpoint: str | None = "latest",
    overwrite_output_dir: bool = False,
    overwrite_cache: bool = False,
    push_to_hub: bool = False,
    hub_model_id: str | None = None,
    hub_private_repo: bool | None = None,
    hub_with_code: bool = False,
    accelerator: Accelerator | None = None,
) -> ProgressiveVAEPipeline | None:
    """Train a progressive VAE greedily, measure it, and write its pipeline.

    The same call goes on where an earlier one was interrupted, and leaves alone what is done.

    Args:
        recipe: a dict of sections, or the path of a YAML file (see `recipe.py`); where not given,
            one for pictures of any kind.
        dataset: a `datasets.Dataset` or `DatasetDict`, a folder of images, the name of a data set
            on the Hub, or a list of PIL images; where not given, that of the recipe.
        output_dir: the pipeline's folder; where not given, that of the recipe.
        max_train_minutes: the time that the fits share; where not given, that of the recipe.
        phase: all of them, or one alone: level_N … level_1, or encoder_N … encoder_1 and decoder_i
            of levels that learn their encoders first; prior, refit_level_i or evaluate.
        resume_from_checkpoint: `latest`: leave out phases that are done and go on with the others;
            the path of a checkpoint; or null, to begin with phases anew.
        overwrite_output_dir: replace what is in output_dir; with resume_from_checkpoint only what
            other settings made.
        overwrite_cache: read the images again.
        push_to_hub: push the pipeline once it is whole, and when it changes.
        hub_model_id: the repository; the name of output_dir where not given.
        hub_private_repo: visibility of a new repository; else as your account has it by default.
        hub_with_code: push the code, too, for those who have not installed the package: everybody
            loads the pipeline with `trust_remote_code=True` then.
        accelerator: one that is set up already; by the section `run` where not given.

    Returns:
        The pipeline, after `phase="all"` or `"evaluate"`; else `None`.

    Raises:
        ValueError: a recipe, images or files that are not what was expected; found out before the
            first step wherever that is possible.
        FloatingPointError: the loss or the weights became infinite or NaN.
        SystemExit: with code 0, after SIGTERM or Ctrl-C: a phase saves a checkpoint first.
    """
    read, images = _with_arguments(recipe, dataset, output_dir, max_train_minutes)
    given = given_levels(read)
    folder = make_folder(read.run.output_dir, "output_dir")
    its_own, accelerator = accelerator is None, accelerator or make_accelerator(read.run)
    checkpoints = Checkpoints(
        folder,
        read.run.checkpointing_steps,
        read.run.checkpoints_total_limit,
        resume_from_checkpoint,
        overwrite_output_dir,
    )
    repo_id = (hub_model_id or folder.resolve().name) if push_to_hub else None
    part = part_alone(phase)
    with locked(folder, accelerator, part), checkpoints.listening(), _without_bars_of_files():
        # All configs are made, and all that is there is looked at, before any phase runs: a wrong
        # knob costs neither training nor what was trained before.
        source = open_dataset(read.data, images)
        accelerator.print("\n".join(source.notes))
        pixels, names = source.manifests["train"], source.class_names
        given_configs = {i: ProgressiveVAELevelConfig.from_pretrained(p) for i, p in given.items()}
        configs = read.level_configs(pixels.shape[0], names, given_configs)
        size = pixels.shape[-2], pixels.shape[-1]
        order = greedy_order(read, configs, size, names, given)
        names_of_all = [each.name for each in order]
        if phase not in ("all", *names_of_all, "evaluate"):
            raise ValueError(f"expected phase among {['all', *names_of_all, 'evaluate']}, got "
                             f"{phase!r}; a refit needs its section")  # fmt: skip
        chosen = [each for each in order if phase in ("all", each.name)]
        allocate_time(order, read.run.max_train_minutes)
        number(chosen)
        for each in chosen:
            if isinstance(each, RefitPhase):
                each.on_top = phase != "all"
        check_fit(chosen, configs, size)
        run = Run(
            read.run, accelerator, len(configs), {}, names, source.forms, checkpoints=checkpoints
        )
        is_first = phase in ("all", names_of_all[0])
        given_parts = {
            # All are read before any is written: one may lie where another is to go.
            i: ProgressiveVAELevel.from_pretrained(path)
            for i, path in given.items()
            if is_first
        }
        check_resume(run, read, phase, is_first, chosen, configs, pixels, given_parts)
        run.pixels = source.pixels(
            folder / "cache" / "pixels", accelerator, overwrite_cache, overwrite_output_dir
        )
        held_out = len(run.pixels["test"])
        if names and held_out < MIN_FOR_DISTANCE:
            warnings.warn(
                f"{held_out} held-out images are too few for a Fréchet distance, which will not be "
                f"measured: it takes {MIN_FOR_DISTANCE}",
                stacklevel=2,
            )
        accelerator.init_trackers(
            "progressive_vae", {name: str(value) for name, value in flat(read.sections).items()}
        )
        if accelerator.is_main_process:
            if repo_id is not None:
                ensure_writable_repository(repo_id, hub_private_repo)
            if not (folder / ".gitignore").exists():
                # What is not of the pipeline, for those who upload the folder by other means.
                lines = [*BESIDE_THE_PIPELINE, f"{read.run.logging_dir}/"]
                write_text(folder / ".gitignore", "\n".join(dict.fromkeys(lines)) + "\n")
        if phase != "evaluate":
            with run.alone():
                only = None if phase == "all" else chosen[0]
                if accelerator.is_main_process:
                    write_recipe(run, read, given, only, is_first)
        copy_pretrained_levels(run, given_parts)
        for each in chosen:
            each(run)
            if accelerator.is_main_process:
                after_phase(run, repo_id, private=hub_private_repo, with_code=hub_with_code)
                pictures = folder / "validation" / each.name
                shown = f"; held-out pictures by it: {pictures}" if pictures.is_dir() else ""
                print(f"{each.name} ({each.place}) is done{shown}")
        pipe = evaluate_or_load(run, phase == "evaluate") if phase in ("all", "evaluate") else None
        if accelerator.is_main_process:
            if pipe is None:
                after = order[names_of_all.index(phase) + 1 :]
                rest = [each.name for each in after if not isinstance(each, RefitPhase)]
                print(f"wrote {folder}; what stands on it: --phase "
                      f"{', then '.join([*rest, 'evaluate'])}")  # fmt: skip
            elif repo_id is not None:
                push_or_warn(folder, repo_id, private=hub_private_repo, with_code=hub_with_code)
    if its_own:
        accelerator.end_training()
    return pipe


def greedy_order(
    recipe: Recipe,
    configs: list[ProgressiveVAELevelConfig],
    image_size: tuple[int, int],
    class_names: list[str],
    given: Mapping[int, Path],
) -> list[Phase]:
    """All phases of a recipe: the levels that are not given, the finest first, and of those that
    learn their encoders first the decoders; of a tokenizer that is given, unless it is to get a
    stronger decoder, the scales around its picture; the prior; the decoders that are fitted again.
    """
    indices = range(len(configs), 0, -1)
    order: list[Phase] = []
    for i in indices:
        level, config = recipe.levels[i - 1], configs[i - 1]
        if i in given:
            continue
        if level.encoder_fit is None:
            order.append(LevelPhase(index=i, config=config, settings=level.fit))
            continue
        plain = config.with_decoder(decoder_type="auxiliary", num_classes=0, id2label=None)
        order.append(LevelPhase(index=i, config=plain, is_encoder=True, settings=level.encoder_fit))
    for i in indices:
        level, config = recipe.levels[i - 1], configs[i - 1]
        if i not in given and level.encoder_fit is not None:
            changes = {name: getattr(config, name) for name in DECODER_FIELDS}
            order.append(RefitPhase(index=i, changes=changes, is_first=True, settings=level.fit))
        is_tokenizer = config.tokenizer_config is not None and config.decoder_type == "auxiliary"
        if i in given and is_tokenizer and level.refit is None:
            short = replace(
                level.fit,
                max_train_steps=min(level.fit.max_train_steps, STEPS_OF_SCALES),
                time_share=min(level.fit.time_share, SHARE_OF_SCALES),
            )
            order.append(RefitPhase(index=i, changes={}, is_first=True, settings=short))
    prior = recipe.prior_config(configs, image_size, class_names)
    order.append(PriorPhase(config=prior, settings=recipe.prior.fit))
    for i in indices:
        if (refit := recipe.levels[i - 1].refit) is not None:
            changes = recipe.decoder_changes(i, class_names)
            order.append(
                RefitPhase(
                    index=i,
                    changes=changes,
                    from_scratch=refit.from_scratch,
                    settings=refit.fit,
                )
            )
    return order


def allocate_time(phases: list[Phase], minutes: float | None):
    """Give each phase its part of the time, as the shares say."""
    whole = sum(phase.settings.time_share for phase in phases)
    for phase in phases:
        if minutes is not None:
            phase.seconds = round(60 * minutes * phase.settings.time_share / whole, 3)


def number(phases: list[Phase]):
    """Tell each phase that is to be run of its place among them."""
    for i, phase in enumerate(phases):
        phase.place = f"{i + 1} of {len(phases)}"
        phase.seconds_after = sum(each.seconds or 0.0 for each in phases[i + 1 :])


def check_fit(
    phases: list[Phase], configs: list[ProgressiveVAELevelConfig], image_size: tuple[int, int]
):
    """Raise a `ValueError` unless the levels, as they are and as they will be, fit the images, and
    backbones of transformers are causal."""
    refitted = list(configs)
    for phase in phases:
        if isinstance(phase, RefitPhase):
            refitted[phase.index - 1] = phase.model_config(configs)
        model: type[Model] = ProgressiveVAEPrior if phase.part == "prior" else ProgressiveVAELevel
        try:
            model(copy.deepcopy(phase.model_config(configs))).eval().check_causal()
        except ValueError as error:
            raise ValueError(f"{phase.part}: {error}") from error
    for chain in (configs, refitted):
        check_image_size(image_size, chain, None)


def evaluate_or_load(run: Run, is_asked: bool) -> ProgressiveVAEPipeline:
    """The pipeline, measured by one process, unless its figures are there and nobody asks."""
    run.grids("test", 1)  # an error if a level has changed since the coarser were trained
    if run.accelerator.is_main_process:
        if is_asked or not figures(run.output_dir):
            evaluate_and_save(run)
        else:
            assemble(run)  # its index and card may be those of before
    run.accelerator.wait_for_everyone()
    return ProgressiveVAEPipeline.from_pretrained(run.output_dir)


def _with_arguments(
    recipe: Mapping[str, Any] | str | Path | None,
    dataset: Images | str | Path | None,
    output_dir: str | Path | None,
    max_train_minutes: float | None,
) -> tuple[Recipe, Images | None]:
    """The recipe that the arguments of `train` make, and images that are at hand."""
    run = {
        "output_dir": output_dir and os.fspath(output_dir),
        "max_train_minutes": max_train_minutes,
    }
    overrides: dict[str, Any] = {"run": {k: v for k, v in run.items() if v is not None}}
    images = None if isinstance(dataset, (str, os.PathLike)) else dataset
    if isinstance(dataset, (str, os.PathLike)):
        path = expand_home(dataset, "dataset")
        name = "train_data_dir" if Path(path).is_dir() else "dataset_name"
        overrides["data"] = {name: path}
    elif dataset is not None:
        is_stream = isinstance(dataset, (datasets.IterableDataset, datasets.IterableDatasetDict))
        overrides["data"] = {"dataset_name": None, **({"streaming": True} if is_stream else {})}
    return read_recipe(recipe, overrides), images


@contextmanager
def _without_bars_of_files() -> Iterator[None]:
    """A bar for each small file that is loaded says nothing."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()
