"""Files of the pipeline that summarize a run: index, model card, metrics, images, recipe."""

import json
import platform
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from ..data.code_cache import GridDataset
from ..evaluation.image_metrics import distance_of_samples, train_classifier
from ..evaluation.likelihood import evaluate, label_accuracy
from ..evaluation.throughput import sampling_speed
from ..hub.model_card import IMAGES, metrics_table, training_table
from ..hub.repository import INDEX, METRICS, metric_files, push_or_warn, weights_digest, write_card
from ..models.prior import ProgressiveVAEPrior
from ..paths import replacing
from ..pipeline import ProgressiveVAEPipeline
from ..serialization import __version__, write_json, write_text
from ..visualization import reconstruction_grid, sample_grid
from .run import Run
from .yaml_files import read_yaml

RECIPE = "recipe.yaml"
MAX_SAMPLES = 5000  # for the Fréchet distance
NUM_RECONSTRUCTIONS = 10


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
    pipe = ProgressiveVAEPipeline.from_levels(prior, levels, run.image_shape[1:])
    write_json(run.output_dir / INDEX, json.loads(pipe.to_json_string()))
    write_card(run.output_dir)
    return pipe


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
    """Measure the pipeline on the test images and save metrics, images and the model card."""
    pipe = assemble(run)
    pipe.to(run.accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    test = run.pixels["test"]
    assert isinstance(test, GridDataset)
    measurements = _Measurements()
    name = test.manifest.dataset.split(" (")[0]
    metrics: dict[str, Any] = {
        "dataset": Path(name).name if Path(name).exists() else name,
        "split": test.manifest.split,
        "num_images": len(test),
        **evaluate(pipe, test),
        **_sample_metrics(run, pipe, test, measurements),
    }
    _save_images(run, pipe, test, measurements)
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


def _sample_metrics(
    run: Run, pipe: ProgressiveVAEPipeline, test: GridDataset, measurements: _Measurements
) -> dict[str, Any]:
    """Return the metrics of samples; those of a classifier need a data set with classes."""
    seed = run.settings.seed
    num_classes = len(run.class_names)
    num_samples = min(len(test), MAX_SAMPLES)
    measures: dict[str, Callable[[], Any]] = {}
    if num_classes:
        device = run.accelerator.device
        classifier = measurements.attempt(
            "classifier",
            lambda: train_classifier(run.pixels["train"], num_classes, seed=seed, device=device),
        )
        if classifier is not None:
            if test.has_labels:
                measures["label_accuracy"] = partial(label_accuracy, pipe, classifier, test, seed)
            measures["frechet_distance"] = partial(
                distance_of_samples, pipe, classifier, test, num_samples, seed
            )
    measures["sampled_images_per_second"] = lambda: round(sampling_speed(pipe), 1)
    results = {name: measurements.attempt(name, measure) for name, measure in measures.items()}
    metrics = {name: value for name, value in results.items() if value is not None}
    if "frechet_distance" in metrics:
        metrics["num_drawn"] = num_samples
    return metrics


def _save_images(
    run: Run, pipe: ProgressiveVAEPipeline, test: GridDataset, measurements: _Measurements
):
    """Save the images of the model card: samples and reconstructions."""
    seed = run.settings.seed
    images = test.batch(slice(0, NUM_RECONSTRUCTIONS))[0].to(torch.uint8)
    grids = {
        "samples.png": partial(sample_grid, pipe, seed),
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
