"""Checks of an output folder before the first step; pretrained levels; the recipe in the folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..configuration.level import ProgressiveVAELevelConfig
from ..configuration.validation import MAX_LEVELS
from ..data.code_cache import Manifest
from ..hub.repository import INDEX
from ..models.fingerprint import fingerprint
from ..models.level import ProgressiveVAELevel
from .identity import check_identity, flatten
from .phases import Phase, RefitPhase
from .recipe import Recipe, levels_in
from .report import saved_sections, write_sections
from .run import Run


def check_folder(
    run: Run,
    recipe: Recipe,
    phase: str,
    is_first: bool,
    phases: list[Phase],
    configs: list[ProgressiveVAELevelConfig],
    pixels: Manifest,
    pretrained: Mapping[int, ProgressiveVAELevel],
):
    """Raise a `ValueError` if the phases would replace, or resume, work of other settings.

    Args:
        phase: "all", or the name of the only phase.
        is_first: the phases include the first of the recipe.
        pixels: of the training split.
    """
    checkpoints = run.checkpoints
    if checkpoints is None or checkpoints.overwrite:
        return
    for index, level in pretrained.items():
        run.check_part(f"level_{index}", pretrained_identity(index, level))
    if phase == "all" and checkpoints.resume is None:
        _check_no_work(run)
        return
    saved = saved_sections(run.output_dir)
    if saved is not None:
        _check_recipe(run.output_dir, saved, recipe.sections, is_started=not is_first)
    if checkpoints.resume is None:
        return  # a phase that is selected by its name may replace what it made before
    for item in phases:
        if isinstance(item, RefitPhase) and phase != "all":
            continue  # it starts from the level in the folder, which may differ from the recipe
        identity = item.planned_identity(run, configs, pixels)
        run.check_part(item.part, identity)
        path = checkpoints.find(item.name)
        if path is not None:
            check_identity(identity, checkpoints.identity(path), str(path), settings_only=True)
    names = [item.name for item in phases]
    path = checkpoints.explicit_path
    if names and path is not None and not any(checkpoints.find(name) for name in names):
        raise ValueError(
            f"expected resume_from_checkpoint of a phase among {names}, got {checkpoints.resume}"
        )


def _check_no_work(run: Run):
    """Raise a `ValueError` if the folder holds trained parts or checkpoints."""
    assert run.checkpoints is not None
    parts = [f"level_{i}" for i in range(1, MAX_LEVELS + 1)] + ["prior"]
    work = [name for name in parts if (run.output_dir / name).is_dir()]
    work += [path.name for path in run.checkpoints.all()]
    if work:
        raise ValueError(
            f"expected an output_dir without the work of another run, got {run.output_dir} with "
            f"{', '.join(work)}: resume with --resume_from_checkpoint latest, choose another "
            "--output_dir, or replace it with --overwrite_output_dir"
        )


def _check_recipe(
    folder: Path, saved: Mapping[str, Any], sections: Mapping[str, Any], is_started: bool
):
    """Raise a `ValueError` if pretrained levels differ from those of the recipe in the folder.

    Args:
        is_started: the run has finished phases already: data and seed have to be the same, too.
    """
    names = ["run.finest_level", "run.extend"]
    if is_started:
        names += ["run.seed"] + [f"data.{name}" for name in sections["data"]]
    new_values = flatten(sections)
    old_values = flatten(saved)
    for name in names:
        expected = old_values.get(name)
        got = new_values.get(name)
        if _resolve_path(expected) != _resolve_path(got):
            flag = name.partition(".")[2]
            advice = f"pass --{flag} {expected}" if expected is not None else f"leave {flag} out"
            raise ValueError(
                f"expected {flag}={expected!r}, with which {folder} was started, got {got!r}: "
                f"{advice}"
            )


def _resolve_path(value: Any) -> Any:
    return str(Path(value).resolve()) if isinstance(value, str) and Path(value).exists() else value


def pretrained_levels(recipe: Recipe) -> dict[int, Path]:
    """Return the folders of pretrained levels by their indices in the new hierarchy.

    Raises:
        ValueError: a folder does not hold a level, or is the output folder.
    """
    settings = recipe.run
    levels: dict[int, Path] = {}
    if settings.finest_level is not None:
        levels[len(recipe.levels)] = Path(settings.finest_level)
    if settings.extend is not None:
        if not (Path(settings.extend) / INDEX).is_file() or levels:
            raise ValueError(
                f"expected extend to be the folder of a saved pipeline, and no finest_level, got "
                f"{settings.extend} and {settings.finest_level}"
            )
        levels = dict(enumerate(levels_in(settings.extend), 2))  # level_1 is the new one
    for path in levels.values():
        if not (path / "config.json").is_file():
            raise ValueError(f"expected a saved level in {path}, got none")
        if path.resolve().parent == Path(settings.output_dir).resolve():
            raise ValueError(f"expected an output_dir other than that of {path}, got the same")
    return levels


def pretrained_identity(index: int, level: ProgressiveVAELevel) -> dict[str, str]:
    return {"phase": f"level_{index}", "given": fingerprint([level])}


def copy_pretrained_levels(run: Run, levels: Mapping[int, ProgressiveVAELevel]):
    """Copy pretrained levels into the output folder, unless they are there."""
    for index, level in levels.items():
        identity = pretrained_identity(index, level)
        if not run.is_done(f"level_{index}", identity):
            run.save(level, f"level_{index}", [identity])


def write_recipe(
    run: Run, recipe: Recipe, pretrained: Mapping[int, Path], phase: Phase | None, is_first: bool
):
    """Write the recipe that reproduces the parts in the folder, after this run.

    Args:
        pretrained: levels whose configs are their own, not the recipe's.
        phase: the only phase of the run, if it is one: it changes only its section of the file.
        is_first: the phase is the first of the recipe.
    """
    sections = dict(recipe.sections)
    sections["run"] = {
        **sections["run"],
        # As Accelerate was configured, which may be by its own config file.
        "mixed_precision": run.accelerator.mixed_precision,
        "gradient_accumulation_steps": run.accelerator.gradient_accumulation_steps,
    }
    for i in pretrained:
        sections[f"level_{i}"] = {name: sections[f"level_{i}"][name] for name in ("fit", "refit")}
    if phase is None:
        sections = _with_extra_refits(run, sections)
    else:
        saved = saved_sections(run.output_dir) or {}
        sections = _with_section_of(phase, sections, saved, is_first)
    write_sections(run.output_dir, sections)


def _with_extra_refits(run: Run, sections: dict[str, Any]) -> dict[str, Any]:
    """Add the refits that were run on top of the recipe: a resumed run keeps their decoders."""
    resumes = run.checkpoints is not None and run.checkpoints.resume is not None
    saved = (saved_sections(run.output_dir) or {}) if resumes else {}
    costs = run.phases()
    sections = dict(sections)
    for i in range(1, run.num_levels + 1):
        name = f"level_{i}"
        if sections[name]["refit"] is None and f"refit_{name}" in costs:
            refit = saved.get(name, {}).get("refit")
            sections[name] = {**sections[name], "refit": refit}
    return sections


def _with_section_of(
    phase: Phase, sections: dict[str, Any], saved: dict[str, Any], is_first: bool
) -> dict[str, Any]:
    """Return the saved sections, with the section of the phase's part replaced."""
    without_refits = {
        name: {**section, "refit": None} if "refit" in section else section
        for name, section in sections.items()
    }
    base = {**without_refits, **saved}
    section = without_refits[phase.part]  # a level that is trained again has not been refitted
    if isinstance(phase, RefitPhase) and not phase.is_first:
        section = {**base[phase.part], "refit": sections[phase.part]["refit"]}
    start = {"data": sections["data"], "run": sections["run"]} if is_first else {}
    return {**base, **start, phase.part: section}
