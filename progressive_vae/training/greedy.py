"""The greedy order, from the data up: `train()`.

for i in N … 1:  learn P_Ψ(z_i | z_{i+1}) and P_Θ(z_{i+1} | z_i) under a uniform P(z_i); freeze;
                 encode the data set to z_i
learn P_Φ(z_1)
where asked:     learn P_Θ(z_{i+1} | z_i) again, on codes that stay as they are
"""

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from accelerate import Accelerator
from transformers.utils import logging as transformers_logging

from ..chain import check_image_size
from ..configuration import DECODER_FIELDS, ProgressiveVAELevelConfig
from ..fingerprint import fingerprint
from ..hub import INDEX, figures, open_repository, push_or_warn
from ..level import ProgressiveVAELevel
from ..pipeline import ProgressiveVAEPipeline
from ..prior import ProgressiveVAEPrior
from .checkpoints import Checkpoints
from .codes import Manifest
from .data import Images
from .lock import LOCK, OWNER, locked
from .phases import LevelPhase, Model, Phase, PriorPhase, RefitPhase
from .recipe import Recipe, levels_in, read_recipe
from .report import (
    RECIPE,
    after_phase,
    assemble,
    evaluate_and_save,
    saved_sections,
    write_sections,
)
from .run import PHASES, Run, make_accelerator
from .sources import open_source

MIN_FOR_DISTANCE = 2  # images whose features have a covariance
BESIDE_THE_PIPELINE = ("cache/", "logs/", "validation/", "checkpoint-*/", "*.incomplete",
                       "*.replaced/", "history.json", PHASES, RECIPE, LOCK, OWNER)  # fmt: skip


def train(
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
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
    accelerator: Accelerator | None = None,
) -> ProgressiveVAEPipeline | None:
    """Train a progressive VAE greedily, measure it, and write its pipeline.

    The same call goes on where an earlier one was interrupted, and leaves alone what is done.

    Args:
        recipe: a dict of sections, or the path of a YAML file (see `recipe.py`).
        dataset: a `datasets.Dataset` or `DatasetDict`, a folder of images, the name of a data set
            on the Hub, or a list of PIL images; where not given, that of the recipe.
        output_dir: the pipeline's folder; where not given, that of the recipe.
        max_train_minutes: the time that the fits share; where not given, that of the recipe.
        phase: all of them, or one alone: level_N … level_1, prior, refit_level_i or evaluate.
        resume_from_checkpoint: `latest`: leave out phases that are done and go on with the others;
            the path of a checkpoint; or null, to begin with phases anew.
        overwrite_output_dir: replace what is in output_dir; with resume_from_checkpoint only what
            other settings made.
        overwrite_cache: read the images again.
        push_to_hub: push the pipeline once it is whole, and when it changes.
        hub_model_id: the repository; the name of output_dir where not given.
        hub_private_repo: visibility of a new repository; else as your account has it by default.
        accelerator: one that is set up already; by the section `run` where not given.

    Returns:
        The pipeline, after `phase="all"` or `"evaluate"`; else `None`.

    Raises:
        ValueError: a recipe, images or files that are not what was expected; found out before the
            first step wherever that is possible.
    """
    recipe, images = _with_arguments(recipe, dataset, output_dir, max_train_minutes)
    folder, given = Path(recipe.run.output_dir), given_levels(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    its_own, accelerator = accelerator is None, accelerator or make_accelerator(recipe.run)
    checkpoints = Checkpoints(
        folder,
        recipe.run.checkpointing_steps,
        recipe.run.checkpoints_total_limit,
        resume_from_checkpoint,
        overwrite_output_dir,
    )
    repo_id = (hub_model_id or folder.resolve().name) if push_to_hub else None
    transformers_logging.disable_progress_bar()  # a bar for each small file says nothing
    with locked(folder, accelerator), checkpoints.listening():
        # All configs are made, and all that is there is looked at, before any phase runs: a wrong
        # knob costs neither training nor what was trained before.
        source = open_source(recipe.data, images)
        pixels, names = source.manifests["train"], source.class_names
        given_configs = {i: ProgressiveVAELevelConfig.from_pretrained(p) for i, p in given.items()}
        configs = recipe.level_configs(pixels.shape[0], names, given_configs)
        size = pixels.shape[-2], pixels.shape[-1]
        order = greedy_order(recipe, configs, size, names, given)
        names_of_all = [each.name for each in order]
        if phase not in ("all", *names_of_all, "evaluate"):
            raise ValueError(f"expected phase among {['all', *names_of_all, 'evaluate']}, got "
                             f"{phase!r}; a refit needs its section")  # fmt: skip
        chosen = [each for each in order if phase in ("all", each.name)]
        share_out(chosen, recipe.run.max_train_minutes)
        check_fit(chosen, configs, size)
        run = Run(recipe.run, accelerator, len(configs), {}, names, checkpoints=checkpoints)
        is_first = phase in ("all", names_of_all[0])
        given_parts = {
            # All are read before any is written: one may lie where another is to go.
            i: ProgressiveVAELevel.from_pretrained(path)
            for i, path in given.items()
            if is_first
        }
        check_work(run, recipe, phase, chosen, configs, pixels, given_parts)
        run.pixels = source.pixels(folder / "cache" / "pixels", accelerator, overwrite_cache)
        held_out = len(run.pixels["test"])
        if names and held_out < MIN_FOR_DISTANCE:
            warnings.warn(
                f"{held_out} held-out images are too few for a Fréchet distance, which will not be "
                f"measured: it takes {MIN_FOR_DISTANCE}",
                stacklevel=2,
            )
        accelerator.init_trackers("progressive_vae", _flat(recipe.sections))
        if accelerator.is_main_process:
            if repo_id is not None:
                open_repository(repo_id, hub_private_repo)
            if not (folder / ".gitignore").exists():
                # What is not of the pipeline, for those who upload the folder by other means.
                (folder / ".gitignore").write_text("\n".join(BESIDE_THE_PIPELINE) + "\n")
            if phase != "evaluate":
                keep_recipe(recipe, None if is_first else chosen[0])
        take_given(run, given_parts)
        for each in chosen:
            each(run)
            if accelerator.is_main_process:
                after_phase(run, repo_id, hub_private_repo)
        pipe = measured(run, phase == "evaluate") if phase in ("all", "evaluate") else None
        if accelerator.is_main_process:
            if pipe is None:
                after = order[names_of_all.index(phase) + 1 :]
                rest = [each.name for each in after if not isinstance(each, RefitPhase)]
                print(f"wrote {folder}; what stands on it: --phase "
                      f"{', then '.join([*rest, 'evaluate'])}")  # fmt: skip
            elif repo_id is not None:
                push_or_warn(folder, repo_id, hub_private_repo)
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
    learn their encoders first the decoders; the prior; the decoders that are fitted again."""
    indices = range(len(configs), 0, -1)
    order: list[Phase] = []
    for i in indices:
        level, config = recipe.levels[i - 1], configs[i - 1]
        if i in given:
            continue
        if level.encoder_fit is None:
            order.append(LevelPhase(index=i, config=config, settings=level.fit))
            continue
        plain = config.with_decoder(decoder_order="auxiliary", num_classes=0, id2label=None)
        order.append(LevelPhase(index=i, config=plain, is_encoder=True, settings=level.encoder_fit))
    for i in indices:
        level, config = recipe.levels[i - 1], configs[i - 1]
        if i not in given and level.encoder_fit is not None:
            changes = {name: getattr(config, name) for name in DECODER_FIELDS}
            order.append(RefitPhase(index=i, changes=changes, is_first=True, settings=level.fit))
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


def share_out(phases: list[Phase], minutes: float | None):
    """Give each phase its part of the time, as the shares say."""
    whole = sum(phase.settings.time_share for phase in phases)
    for phase in phases:
        if minutes is not None:
            phase.seconds = round(60 * minutes * phase.settings.time_share / whole, 3)


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


def check_work(
    run: Run,
    recipe: Recipe,
    name: str,
    phases: list[Phase],
    configs: list[ProgressiveVAELevelConfig],
    pixels: Manifest,
    given: Mapping[int, ProgressiveVAELevel],
):
    """Raise a `ValueError` if the phases would replace, or go on with, what other settings made."""
    checkpoints = run.checkpoints
    assert checkpoints is not None
    for index, level in given.items():
        if not checkpoints.overwrite:
            run.check_history(f"level_{index}", given_identity(index, level))
    if name != "all" or checkpoints.resume is not None:
        saved = saved_sections(run.output_dir) or {"run": vars(recipe.run)}
        for flag in ("finest_level", "extend"):
            expected, got = saved["run"].get(flag), getattr(recipe.run, flag)
            if expected != got and not checkpoints.overwrite:
                raise ValueError(
                    f"expected {flag}={expected!r}, with which {run.output_dir} was begun, got "
                    f"{got!r}: pass --{flag} {expected}"
                )
    # A refit alone is of the level that is there, whatever the recipe says of it.
    is_known = [name == "all" or not isinstance(phase, RefitPhase) for phase in phases]
    planned = [
        (phase.part, phase.planned(run, configs, pixels))
        for phase, known in zip(phases, is_known, strict=True)
        if known
    ]
    run.check_settings(planned, name == "all")


def given_levels(recipe: Recipe) -> dict[int, Path]:
    """The folders of levels that are trained already, by their numbers here."""
    settings, count = recipe.run, len(recipe.levels)
    given = {} if settings.finest_level is None else {count: Path(settings.finest_level)}
    if settings.extend is not None:
        if not (Path(settings.extend) / INDEX).is_file() or given:
            raise ValueError(
                f"expected extend to be the folder of a saved pipeline, and no finest_level, got "
                f"{settings.extend} and {settings.finest_level}"
            )
        given = dict(enumerate(levels_in(settings.extend), 2))
    for path in given.values():
        if not (path / "config.json").is_file():
            raise ValueError(f"expected a saved level in {path}, got none")
        if path.resolve().parent == Path(settings.output_dir).resolve():
            raise ValueError(f"expected an output_dir other than that of {path}, got the same")
    return given


def given_identity(index: int, level: ProgressiveVAELevel) -> dict[str, str]:
    return {"phase": f"level_{index}", "given": fingerprint([level])}


def take_given(run: Run, levels: Mapping[int, ProgressiveVAELevel]):
    """Copy the levels that are there already to where those that are trained will lie."""
    for index, level in levels.items():
        identity = given_identity(index, level)
        if not run.is_done(f"level_{index}", identity):
            run.save(level, f"level_{index}", identity)


def keep_recipe(recipe: Recipe, phase: Phase | None):
    """Write down what runs, to be run again; one phase alone changes what was written by its own
    part of the recipe."""
    folder = Path(recipe.run.output_dir)
    saved = None if phase is None else saved_sections(folder)
    sections = recipe.sections
    if phase is not None and saved is not None:
        part = {**saved.get(phase.part, {}), **sections[phase.part]}
        if isinstance(phase, RefitPhase):
            part = {**saved.get(phase.part, {}), "refit": sections[phase.part]["refit"]}
        elif isinstance(phase, LevelPhase):  # with the decoder that it has from the start
            part["refit"] = None
        sections = {**saved, phase.part: part}
    write_sections(folder, sections)


def measured(run: Run, is_asked: bool) -> ProgressiveVAEPipeline:
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
    recipe: Recipe | Mapping[str, Any] | str | Path | None,
    dataset: Images | str | Path | None,
    output_dir: str | Path | None,
    max_train_minutes: float | None,
) -> tuple[Recipe, Images | None]:
    """The recipe that the arguments of `train` make, and images that are at hand."""
    run = {"output_dir": output_dir and str(output_dir), "max_train_minutes": max_train_minutes}
    overrides: dict[str, Any] = {"run": {k: v for k, v in run.items() if v is not None}}
    images = None if isinstance(dataset, (str, Path)) else dataset
    if isinstance(dataset, (str, Path)):
        kind = "train_data_dir" if Path(dataset).is_dir() else "dataset_name"
        overrides["data"] = {kind: str(dataset)}
    elif dataset is not None:
        is_stream = isinstance(dataset, (datasets.IterableDataset, datasets.IterableDatasetDict))
        overrides["data"] = {"dataset_name": None, **({"streaming": True} if is_stream else {})}
    if isinstance(recipe, Recipe):
        if not any(overrides.values()):
            return recipe, images
        recipe = recipe.sections
    return read_recipe(recipe, overrides), images


def _flat(sections: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """For trackers: dotted names and words."""
    flat: dict[str, str] = {}
    for name, value in sections.items():
        is_nested = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{name}.") if is_nested else {prefix + name: str(value)}
    return flat
