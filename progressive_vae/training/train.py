"""`train()`: the public function that plans a run, runs its phases and measures the pipeline."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from accelerate import Accelerator
from transformers.utils import logging as transformers_logging

from ..configuration.level import ProgressiveVAELevelConfig
from ..data.dataset import Images
from ..data.source import Source, open_dataset
from ..hub.repository import ensure_writable_repository, metric_files, push_or_warn
from ..models.level import ProgressiveVAELevel
from ..paths import expand_home, make_folder
from ..pipeline import ProgressiveVAEPipeline
from ..serialization import write_text
from .args import RunSettings
from .budget import TimeBudget
from .checkpoints import Checkpoints
from .greedy import (
    allocate_time,
    check_early_stopping,
    check_phases,
    greedy_order,
    select_phases,
)
from .identity import flatten
from .lock import LOCK, MOMENT, locked
from .phases import Phase, RefitPhase, independent_part
from .recipe import Recipe, read_recipe
from .report import RECIPE, Push, after_phase, assemble, evaluate_and_save, save_text_encoder
from .resume import check_folder, copy_pretrained_levels, pretrained_levels, write_recipe
from .run import PHASES, Run, Texts, make_accelerator

NOT_OF_THE_PIPELINE = [
    "cache/",
    "logs/",
    "validation/",
    "checkpoint-*/",
    "*.incomplete",
    "*.replaced/",
    "history.json",
    PHASES,
    RECIPE,
    f"{LOCK}*",
    MOMENT,
]


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
    hub_with_code: bool = False,
    accelerator: Accelerator | None = None,
) -> ProgressiveVAEPipeline | None:
    """Train a progressive VAE greedily, measure it, and save its pipeline.

    The same call resumes an interrupted run and skips the phases that are finished.

    Args:
        recipe: sections as a dict, the path of a YAML file, or what `read_recipe` made of them (see
            `recipe.py`); has defaults.
        dataset: a `datasets` data set, a folder, an id on the Hub, or a list of PIL images.
        output_dir: folder of the pipeline; by default the recipe's, as for `dataset`.
        max_train_minutes: time of the run, metrics and images included; by default the recipe's.
        phase: "all", level_i, encoder_i, decoder_i, prior, refit_level_i or evaluate.
        resume_from_checkpoint: "latest", the path of a checkpoint, or null for step 0.
        overwrite_output_dir: replace the work of other settings; without resuming, all work.
        overwrite_cache: read the images again.
        push_to_hub: push the pipeline when it is complete, and when it changes.
        hub_model_id: the repository; by default the name of output_dir.
        hub_private_repo: visibility of a new repository; by default that of the account.
        hub_with_code: push the code, for users who load with `trust_remote_code=True`.
        accelerator: by default one with the settings of the section `run`.

    Returns:
        The pipeline, for the phases "all" and "evaluate", else `None`.

    Raises:
        ValueError: a wrong recipe, image or file; where possible before the first step.
        FloatingPointError: the loss or the weights became infinite or NaN.
        SystemExit: with code 0, after SIGTERM or Ctrl-C and a checkpoint.
    """
    read, images = _read_arguments(recipe, dataset, output_dir, max_train_minutes)
    budget = TimeBudget(read.run.max_train_minutes)
    pretrained = pretrained_levels(read)
    checkpoints = _make_checkpoints(read.run, resume_from_checkpoint, overwrite_output_dir)
    is_own = accelerator is None
    accelerator = accelerator or make_accelerator(read.run)
    repo_id = hub_model_id or checkpoints.folder.resolve().name
    push = Push(repo_id, hub_private_repo, hub_with_code) if push_to_hub else None
    lock = locked(checkpoints.folder, accelerator, independent_part(phase))
    with lock, checkpoints.handle_signals(), _no_progress_bars_of_files():
        plan = _plan(read, images, pretrained, phase, accelerator, checkpoints, budget)
        _prepare_folder(plan, push, overwrite_cache)
        pipe = _run_phases(plan, push)
    if is_own:
        accelerator.end_training()
    return pipe


def _read_arguments(
    recipe: Recipe | Mapping[str, Any] | str | Path | None,
    dataset: Images | str | Path | None,
    output_dir: str | Path | None,
    max_train_minutes: float | None,
) -> tuple[Recipe, Images | None]:
    """Return the recipe with the arguments of `train` in it, and images that are in memory."""
    if isinstance(recipe, Recipe):
        if dataset is None and output_dir is None and max_train_minutes is None:
            return recipe, None
        recipe = recipe.sections
    run: dict[str, Any] = {}
    if output_dir:
        run["output_dir"] = os.fspath(output_dir)
    if max_train_minutes is not None:
        run["max_train_minutes"] = max_train_minutes
    overrides: dict[str, Any] = {"run": run}
    if isinstance(dataset, (str, os.PathLike)):
        path = expand_home(dataset, "dataset")
        name = "train_data_dir" if Path(path).is_dir() else "dataset_name"
        overrides["data"] = {name: path}
        return read_recipe(recipe, overrides), None
    if dataset is not None:
        overrides["data"] = {"dataset_name": None}
        if isinstance(dataset, (datasets.IterableDataset, datasets.IterableDatasetDict)):
            overrides["data"]["streaming"] = True
    return read_recipe(recipe, overrides), dataset


def _make_checkpoints(settings: RunSettings, resume: str | None, overwrite: bool) -> Checkpoints:
    return Checkpoints(
        make_folder(settings.output_dir, "output_dir"),
        settings.checkpointing_steps,
        settings.checkpoints_total_limit,
        resume,
        overwrite,
    )


@dataclass
class Plan:
    """All that is decided and checked before the first phase runs.

    Args:
        phase: "all", "evaluate", or the name of the only phase.
        phases: to run, in their order.
        later_phases: names of those that depend on the only phase.
        pretrained: the pretrained levels that this run copies into its folder.
        pretrained_paths: the folders of all pretrained levels.
    """

    recipe: Recipe
    run: Run
    source: Source
    phase: str
    phases: list[Phase]
    later_phases: list[str]
    is_first: bool
    pretrained: dict[int, ProgressiveVAELevel]
    pretrained_paths: Mapping[int, Path]


def _plan(
    recipe: Recipe,
    images: Images | None,
    pretrained_paths: Mapping[int, Path],
    phase: str,
    accelerator: Accelerator,
    checkpoints: Checkpoints,
    budget: TimeBudget,
) -> Plan:
    """Make all configs and check the output folder, so that errors come before any training."""
    source = open_dataset(recipe.data, images)
    accelerator.print("\n".join(source.notes))
    pixels = source.manifests["train"]
    class_names = source.class_names
    image_size = pixels.shape[-2], pixels.shape[-1]
    pretrained_configs = {
        i: ProgressiveVAELevelConfig.from_pretrained(path) for i, path in pretrained_paths.items()
    }
    texts = Texts.load(source.captions, recipe.data.text_encoder)
    condition_dim = None if texts is None else texts.condition_dim
    configs = recipe.level_configs(pixels.shape[0], class_names, pretrained_configs, condition_dim)

    # Phases get their durations among all, and their places among those that run.
    order = greedy_order(recipe, configs, image_size, class_names, pretrained_paths, condition_dim)
    order = allocate_time(order, recipe.run.max_train_minutes)
    phases = select_phases(order, phase)
    check_phases(phases, configs, image_size, condition_dim)
    check_early_stopping(phases, source.splits)
    names = [planned.name for planned in order]
    is_first = phase in ("all", names[0])
    later = order[names.index(phase) + 1 :] if phase in names else []

    run = Run(
        recipe.run,
        accelerator,
        len(configs),
        class_names=class_names,
        texts=texts,
        augmentation=source.augmentation,
        checkpoints=checkpoints,
        budget=budget,
    )
    # All levels are read before any is written: the folder of one may be the target of another.
    pretrained = {
        i: ProgressiveVAELevel.from_pretrained(path)
        for i, path in pretrained_paths.items()
        if is_first
    }
    check_folder(run, recipe, phase, is_first, phases, configs, pixels, pretrained)
    later_names = [planned.name for planned in later if not isinstance(planned, RefitPhase)]
    return Plan(
        recipe, run, source, phase, phases, later_names, is_first, pretrained, pretrained_paths
    )


def _prepare_folder(plan: Plan, push: Push | None, overwrite_cache: bool):
    """Cache the pixels and write what does not come from a phase: recipe and pretrained levels."""
    run = plan.run
    folder = run.output_dir
    assert run.checkpoints is not None
    run.pixels = plan.source.pixels(
        folder / "cache" / "pixels", run.accelerator, overwrite_cache, run.checkpoints.overwrite
    )
    values = flatten(plan.recipe.sections)
    run.accelerator.init_trackers(
        "progressive_vae", {name: str(value) for name, value in values.items()}
    )
    if run.accelerator.is_main_process:
        if push is not None:
            ensure_writable_repository(push.repo_id, push.private)
        if not (folder / ".gitignore").exists():
            # For users who upload the folder with git or the Hub's own command.
            lines = [*NOT_OF_THE_PIPELINE, f"{plan.recipe.run.logging_dir}/"]
            write_text(folder / ".gitignore", "\n".join(dict.fromkeys(lines)) + "\n")
    if plan.phase != "evaluate":
        with run.exclusive():
            if run.accelerator.is_main_process:
                phase = None if plan.phase == "all" else plan.phases[0]
                write_recipe(run, plan.recipe, plan.pretrained_paths, phase, plan.is_first)
    copy_pretrained_levels(run, plan.pretrained)
    save_text_encoder(run, overwrite=plan.is_first)
    if run.texts is not None and plan.phases:
        run.captions()


def _run_phases(plan: Plan, push: Push | None) -> ProgressiveVAEPipeline | None:
    """Run the phases one after the other, then measure and push the pipeline."""
    run = plan.run
    is_main = run.accelerator.is_main_process
    for phase in plan.phases:
        phase(run)
        if is_main:
            after_phase(run, push)
            folder = run.output_dir / "validation" / phase.name
            images = f"; validation images: {folder}" if folder.is_dir() else ""
            print(f"{phase.name} ({phase.place}) is done{images}")
    if plan.phase not in ("all", "evaluate"):
        if is_main:
            names = ", then ".join([*plan.later_phases, "evaluate"])
            print(f"wrote {run.output_dir}; phases that depend on it: --phase {names}")
        return None
    pipe = evaluate_or_load(run, plan.phase == "evaluate")
    if is_main and push is not None:
        push_or_warn(run.output_dir, push.repo_id, private=push.private, with_code=push.with_code)
    return pipe


def evaluate_or_load(run: Run, is_requested: bool) -> ProgressiveVAEPipeline:
    """Return the pipeline; the main process measures it if metrics are missing or requested."""
    run.grids("test", 1)  # raises if a level has changed since the coarser ones were trained
    if run.accelerator.is_main_process:
        if is_requested or not metric_files(run.output_dir):
            evaluate_and_save(run)
        else:
            assemble(run)  # its index and model card may be of previous weights
    run.accelerator.wait_for_everyone()
    return ProgressiveVAEPipeline.from_pretrained(run.output_dir)


@contextmanager
def _no_progress_bars_of_files() -> Iterator[None]:
    """Hide the progress bars of transformers, one for each small file that is loaded."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()
