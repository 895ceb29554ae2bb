"""What a run tells of its pipeline: the index, the card, figures of held-out images, pictures."""

import json
import platform
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from ..evaluation.image_metrics import distance_of_samples, train_classifier
from ..evaluation.likelihood import evaluate, label_accuracy
from ..evaluation.throughput import sampling_speed
from ..hub.model_card import IMAGE_CAPTIONS, metrics_table
from ..hub.repository import INDEX, METRICS, metric_files, push_or_warn, weights_digest, write_card
from ..models.prior import ProgressiveVAEPrior
from ..paths import replacing
from ..pipeline import ProgressiveVAEPipeline
from ..serialization import __version__, write_json, write_text
from ..visualization import reconstruction_grid, sample_grid
from .recipe import read_yaml
from .run import Run

RECIPE = "recipe.yaml"


def assemble(run: Run) -> ProgressiveVAEPipeline:
    """The pipeline of the saved parts, its index and its card beside them."""
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
    """The recipe that made the parts in a folder; `None` where there is none."""
    path, advice = output_dir / RECIPE, "delete it and run the first phase again"
    if not path.is_file():
        return None
    sections = read_yaml(path, advice)
    if not isinstance(sections, dict) or not isinstance(sections.get("run"), dict):
        raise ValueError(f"expected the sections of a recipe in {path}, got {sections}: {advice}")
    return sections


def write_sections(output_dir: Path, sections: dict[str, Any]):
    text = yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)
    write_text(output_dir / RECIPE, text)


def evaluate_and_save(run: Run) -> ProgressiveVAEPipeline:
    """All held-out figures and pictures. What cannot be measured is named in their place: nothing
    that was trained or measured is lost for it."""
    pipe, output_dir, test = assemble(run), run.output_dir, run.pixels["test"]
    pipe.to(run.accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    name = test.manifest.dataset.split(" (")[0]
    metrics: dict[str, Any] = {
        "dataset": Path(name).name if Path(name).exists() else name,
        "split": test.manifest.split,
        "num_images": len(test),
        **evaluate(pipe, test),
    }
    seed, failed = run.settings.seed, {}

    def attempt(name: str, measure: Callable[[], Any]) -> Any:
        try:
            return measure()
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
            warnings.warn(f"{name} is not measured: {error!r}", stacklevel=2)

    train, classes, count = run.pixels["train"], len(run.class_names), min(len(test), 5000)
    measures: dict[str, Callable[[], Any]] = {}
    device = run.accelerator.device
    if classes and (
        classifier := attempt(
            "classifier", lambda: train_classifier(train, classes, seed=seed, device=device)
        )
    ):
        if test.has_labels:
            measures["label_accuracy"] = lambda: label_accuracy(pipe, classifier, test, seed)
        measures["frechet_distance"] = lambda: distance_of_samples(
            pipe, classifier, test, count, seed
        )
    measures["sampled_images_per_second"] = lambda: round(sampling_speed(pipe), 1)
    for name, measure in measures.items():
        if (figure := attempt(name, measure)) is not None:
            metrics[name] = figure
    if "frechet_distance" in metrics:
        metrics["num_drawn"] = count
    images = test.batch(slice(0, 10))[0].to(torch.uint8)
    pictures = {
        "samples.png": lambda: sample_grid(pipe, seed),
        "reconstructions.png": lambda: reconstruction_grid(pipe, images, seed),
    }
    for name, draw in pictures.items():
        if (picture := attempt(name, draw)) is not None:
            with replacing(output_dir / name) as temporary:
                picture.save(temporary, "PNG")
    metrics |= {
        **({"not_measured": failed} if failed else {}),
        "phases": run.phases(),
        "parameters": {name: getattr(pipe, name).num_parameters() for name in pipe.factor_names},
        "seed": seed,
        "machine": f"{run.accelerator.num_processes} × {device_name(run.accelerator.device)}, "
        f"torch {torch.__version__}, progressive_vae {__version__}",
        "license": run.settings.hub_license,
        "weights": weights_digest(output_dir),
        "recipe": json.loads(without_paths(json.dumps(saved_sections(output_dir)))),
    }
    write_json(output_dir / METRICS, metrics)
    write_card(output_dir)
    print(f"\n{metrics_table(metrics)}\n\nwrote {output_dir}")
    return pipe


def after_phase(run: Run, repo_id: str | None, **how_to_push):
    """Figures and pictures of other weights are deleted; what makes a pipeline may be pushed."""
    if metric_files(run.output_dir):  # of these very weights: the phase was done before
        return
    for name in (METRICS, *IMAGE_CAPTIONS):
        (run.output_dir / name).unlink(missing_ok=True)
    if (run.output_dir / INDEX).is_file():
        write_card(run.output_dir)
    if repo_id is not None:
        try:
            assemble(run)
        except ValueError:  # not all parts are there, or not for one another
            return
        push_or_warn(run.output_dir, repo_id, **how_to_push)


def without_paths(text: str) -> str:
    """What is to be seen by others: of absolute paths only the last name."""
    return re.sub(r"""(?<![\w.:/])/(?:[^\s'"/]+/)+([^\s'"/]+)""", r"\1", text)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} ({torch.get_num_threads()} threads)"
