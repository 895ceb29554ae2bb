"""Before a run takes a step: what lies in its folder, what it is given, what it writes down."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..configuration.level import ProgressiveVAELevelConfig
from ..data.code_cache import Manifest
from ..hub.repository import INDEX
from ..models.fingerprint import fingerprint
from ..models.level import ProgressiveVAELevel
from .checkpoints import flat
from .phases import Phase, RefitPhase
from .recipe import Recipe, levels_in
from .report import saved_sections, write_sections
from .run import Run


def check_resume(
    run: Run,
    recipe: Recipe,
    name: str,
    is_first: bool,
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
        saved = saved_sections(run.output_dir)
        if saved is not None and not checkpoints.overwrite:
            check_begun(run.output_dir, saved, recipe.sections, is_begun=not is_first)
    # A refit alone is of the level that is there, whatever the recipe says of it.
    is_known = [name == "all" or not isinstance(phase, RefitPhase) for phase in phases]
    planned = [
        (phase.part, phase.planned(run, configs, pixels))
        for phase, known in zip(phases, is_known, strict=True)
        if known
    ]
    run.check_settings(planned, name == "all")


def check_begun(
    folder: Path, saved: Mapping[str, Any], sections: Mapping[str, Any], is_begun: bool
):
    """Raise a `ValueError` unless a run is gone on with on the levels with which it was begun; and
    one phase of it alone, on the same images and with the same arithmetic."""
    names = [f"run.{name}" for name in ("finest_level", "extend")]
    if is_begun:
        names += ["run.seed"] + [f"data.{name}" for name in sections["data"]]
    ours, theirs = flat(sections), flat(saved)
    for name in names:
        expected, got = theirs.get(name), ours.get(name)
        if _resolved(expected) != _resolved(got):
            flag = name.partition(".")[2]
            advice = f"pass --{flag} {expected}" if expected is not None else f"leave {flag} out"
            raise ValueError(
                f"expected {flag}={expected!r}, with which {folder} was begun, got {got!r}: "
                f"{advice}"
            )


def _resolved(value: Any) -> Any:
    return str(Path(value).resolve()) if isinstance(value, str) and Path(value).exists() else value


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


def copy_pretrained_levels(run: Run, levels: Mapping[int, ProgressiveVAELevel]):
    """Copy the levels that are there already to where those that are trained will lie."""
    for index, level in levels.items():
        identity = given_identity(index, level)
        if not run.is_done(f"level_{index}", identity):
            run.save(level, f"level_{index}", [identity])


def write_recipe(
    run: Run, recipe: Recipe, given: Mapping[int, Path], phase: Phase | None, is_first: bool
):
    """Write down what runs, to be run again.

    Args:
        given: levels, which are not as the recipe says.
        phase: the only one, which changes what was written by its own part of the recipe.
        is_first: it begins the run.
    """
    ours, folder = dict(recipe.sections), run.output_dir
    ours["run"] = {
        **ours["run"],
        "mixed_precision": run.accelerator.mixed_precision,  # as Accelerate was configured
        "gradient_accumulation_steps": run.accelerator.gradient_accumulation_steps,
    }
    for i in given:
        ours[f"level_{i}"] = {name: ours[f"level_{i}"][name] for name in ("fit", "refit")}
    saved = None if phase is None and not _goes_on(run) else saved_sections(folder)
    if phase is None:
        for i in range(1, run.num_levels + 1):  # a refit on top of what the recipe says stays
            name, theirs = f"level_{i}", (saved or {}).get(f"level_{i}", {}).get("refit")
            if ours[name]["refit"] is None and f"refit_{name}" in run.phases():
                ours[name] = {**ours[name], "refit": theirs}
    else:
        refits = {name: {**section, "refit": None} if "refit" in section else section
                  for name, section in ours.items()}  # fmt: skip
        base = {**refits, **(saved or {})}
        part = refits[phase.part]  # a level has the decoder that it has from the start
        if isinstance(phase, RefitPhase) and not phase.is_first:
            part = {**base[phase.part], "refit": ours[phase.part]["refit"]}
        begun = {"data": ours["data"], "run": ours["run"]} if is_first else {}
        ours = {**base, **begun, phase.part: part}
    write_sections(folder, ours)


def _goes_on(run: Run) -> bool:
    return run.checkpoints is not None and run.checkpoints.resume is not None
