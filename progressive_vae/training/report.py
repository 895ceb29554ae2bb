"""Files of the pipeline that summarize a run: index, model card, metrics, images, recipe."""

import json
import platform
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from ..data.code_cache import GridDataset
from ..evaluation.likelihood import evaluate
from ..evaluation.throughput import sampling_speed
from ..hub.model_card import IMAGES, metrics_table, training_table
from ..hub.repository import INDEX, METRICS, metric_files, push_or_warn, weights_digest, write_card
from ..models.prior import ProgressiveVAEPrior
from ..paths import replacing
from ..pipeline import ProgressiveVAEPipeline
from ..serialization import __version__, read_json, write_json, write_text
from ..visualization import reconstruction_grid, sample_grid, sample_grid_size
from .run import Run
from .yaml_files import read_yaml

RECIPE = "recipe.yaml"
MAX_IMAGES = 2000  # held-out images that a run measures; examples/evaluate.py measures all
NUM_RECONSTRUCTIONS = 10
SAMPLES_SHARE = 0.2  # of the time of a report, for the speed of sampling and for samples each


def assemble(run: Run) -> ProgressiveVAEPipeline:
    """Return the pipeline of the saved parts, and write its index and model card.

    Raises:
        ValueError: a part is missing, or was trained on codes of other weights.
    """
    folder = run.output_dir / "prior"
    if not (folder / "config.json").is_file():
        raise ValueError(f"expected a trained prior in {folder}, got none: run its phase first")
    levels = [run.level(i) for i in range(1, run.num_levels + 1)]
    prior = ProgressiveVAEPrior.from_pretrained(folder).eval()
    # Sampling settings were chosen for weights, as metrics were measured.
    has_metrics = METRICS in metric_files(run.output_dir)
    index = run.output_dir / INDEX
    sampling = read_json(index, "delete it").get("sampling") if has_metrics else None
    pipe = ProgressiveVAEPipeline.from_levels(
        prior, levels, run.image_shape[1:], sampling, **_text_parts(run)
    )
    write_json(run.output_dir / INDEX, json.loads(pipe.to_json_string()))
    write_card(run.output_dir)
    return pipe


def _text_parts(run: Run) -> dict[str, Any]:
    """Return the pipeline's text encoder and tokenizer, or their name."""
    texts = run.texts
    if texts is None:
        return {}
    if run.settings.save_text_encoder:
        return {"text_encoder": texts.text_encoder, "tokenizer": texts.tokenizer}
    return {"text_encoder_id": texts.name}


def save_text_encoder(run: Run, overwrite: bool):
    """Save the parts of the pipeline that encode texts, unless it names them."""
    for name, part in _text_parts(run).items():
        folder = run.output_dir / name
        is_due = name != "text_encoder_id" and (overwrite or not folder.exists())
        if is_due and run.accelerator.is_main_process:
            part.save_pretrained(folder)
    run.accelerator.wait_for_everyone()


def saved_sections(output_dir: Path) -> dict[str, Any] | None:
    """Return the recipe of the parts in a folder; `None` if the file is missing."""
    path = output_dir / RECIPE
    advice = "delete it and run the first phase again"
    if not path.is_file():
        return None
    sections = read_yaml(path, advice)
    if not isinstance(sections, dict) or not isinstance(sections.get("run"), dict):
        raise ValueError(f"expected the sections of a recipe in {path}, got {sections}: {advice}")
    return sections


def write_sections(output_dir: Path, sections: dict[str, Any]):
    text = yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)
    write_text(output_dir / RECIPE, text)


@dataclass
class _Measurements:
    """Results by name. If a measurement fails, its error takes the place of the result: no other
    result, and nothing that was trained, is lost."""

    errors: dict[str, str] = field(default_factory=dict)

    def attempt(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return the result of `measure()`, or `None` with a warning."""
        try:
            return measure()
        except Exception as error:
            self.errors[name] = f"{type(error).__name__}: {error}"
            warnings.warn(f"{name} is not measured: {error!r}", stacklevel=2)
            return None


def evaluate_and_save(run: Run) -> ProgressiveVAEPipeline:
    """Measure the pipeline on test images and save metrics, images and the model card.

    These are quick metrics, on at most `MAX_IMAGES` images and as many as the run has time for.
    """
    seconds = run.budget.seconds_for_report()
    deadline = None if seconds is None else time.perf_counter() + seconds
    pipe = assemble(run)
    pipe.to(run.accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    test = run.pixels["test"]
    assert isinstance(test, GridDataset)
    measurements = _Measurements()
    speed = _measure_speed(pipe, measurements, seconds)
    max_samples = None if seconds is None else SAMPLES_SHARE * seconds * (speed or 0)
    _save_images(run, pipe, test, measurements, max_samples)
    name = test.manifest.dataset.split(" (")[0]
    metrics: dict[str, Any] = {
        "dataset": Path(name).name if Path(name).exists() else name,
        "split": test.manifest.split,
        "num_held_out": len(test),
        **evaluate(pipe, test, max_images=MAX_IMAGES, seed=run.settings.seed, deadline=deadline),
    }
    if speed is not None:
        metrics["sampled_images_per_second"] = round(speed, 1)
    if measurements.errors:
        metrics["not_measured"] = measurements.errors
    recipe = json.dumps(saved_sections(run.output_dir))
    metrics |= {
        "phases": run.phases(),
        "parameters": {name: getattr(pipe, name).num_parameters() for name in pipe.factor_names},
        "seed": run.settings.seed,
        "machine": f"{run.accelerator.num_processes} × {device_name(run.accelerator.device)}, "
        f"torch {torch.__version__}, progressive_vae {__version__}",
        "license": run.settings.hub_license,
        "weights": weights_digest(run.output_dir),
        "recipe": json.loads(without_paths(recipe)),
    }
    write_json(run.output_dir / METRICS, metrics)
    write_card(run.output_dir)
    print(f"\n{metrics_table(metrics)}\n\n{training_table(metrics)}\n\nwrote {run.output_dir}")
    return pipe


def _measure_speed(
    pipe: ProgressiveVAEPipeline, measurements: _Measurements, seconds: float | None
) -> float | None:
    """Return samples per second: in one batch of 250 if there is time, else in a small one."""
    name = "sampled_images_per_second"
    speed = measurements.attempt(name, lambda: sampling_speed(pipe, 8))
    if speed is not None and (seconds is None or 250 / speed < SAMPLES_SHARE * seconds):
        speed = measurements.attempt(name, lambda: sampling_speed(pipe, 250))
    return speed


def _save_images(
    run: Run,
    pipe: ProgressiveVAEPipeline,
    test: GridDataset,
    measurements: _Measurements,
    max_samples: float | None,
):
    """Save the images of the model card: samples and reconstructions.

    Args:
        max_samples: that there is time for; `None`: no limit.
    """
    seed = run.settings.seed
    rows, columns = sample_grid_size(pipe)
    if max_samples is not None:
        columns = max(1, min(columns, int(max_samples / rows)))
    images = test.batch(slice(0, NUM_RECONSTRUCTIONS))[0].to(torch.uint8)
    grids = {
        "samples.png": partial(sample_grid, pipe, seed, columns),
        "reconstructions.png": partial(reconstruction_grid, pipe, images, seed),
    }
    for name, make_grid in grids.items():
        image = measurements.attempt(name, make_grid)
        if image is not None:
            with replacing(run.output_dir / name) as temporary:
                image.save(temporary, "PNG")


@dataclass
class Push:
    """The repository on the Hub that a run pushes its pipeline to.

    Args:
        private: visibility of a new repository; `None`: the default of the account.
        with_code: push the code beside the weights.
    """

    repo_id: str
    private: bool | None = None
    with_code: bool = False


def after_phase(run: Run, push: Push | None):
    """Delete metrics and images of previous weights, and push the pipeline if it is complete."""
    if metric_files(run.output_dir):  # they are of the current weights: the phase was done before
        return
    for name in (METRICS, *IMAGES):
        (run.output_dir / name).unlink(missing_ok=True)
    if (run.output_dir / INDEX).is_file():
        write_card(run.output_dir)
    if push is not None:
        try:
            assemble(run)
        except ValueError:  # parts are missing, or were trained on other codes
            return
        push_or_warn(run.output_dir, push.repo_id, private=push.private, with_code=push.with_code)


def without_paths(text: str) -> str:
    """Return the text with only the last name of absolute paths, as others will read it."""
    return re.sub(r"""(?<![\w.:/])/(?:[^\s'"/]+/)+([^\s'"/]+)""", r"\1", text)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} ({torch.get_num_threads()} threads)"
