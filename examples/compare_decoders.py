# /// script
# requires-python = ">=3.10"
# dependencies = ["progressive-vae[train]"]
#
# [tool.uv.sources]
# progressive-vae = { path = "..", editable = true }
# ///
"""Compare generation orders, group counts and quantizers at equal training time; print one table.

    python examples/compare_decoders.py --dataset_name zalando-datasets/fashion_mnist
        all rows of compare_decoders.yaml, ten minutes each or a multiple (`times` of the row): 165
        minutes on two cores. Rows with results are skipped.

    python examples/compare_decoders.py --dataset_name … --trials '["vq, pixels", "fsq, pixels"]'
        these rows. Two processes with OMP_NUM_THREADS=1 and half of the rows each use two cores
        better than one process with two threads (start the second one when the first has cached
        the images); rows with `refit`, `level_1` and `prior` need the results of the vq rows.

Test images are not used: rows are trained on 11/12 of the training split and evaluated on the rest.
Training time is wall-clock time; images/s are per second of CPU time.
"""

import dataclasses
import json
import math
import shutil
import tempfile
import time
from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from transformers.utils import logging as transformers_logging

from progressive_vae import (
    ProgressiveVAELevel,
    ProgressiveVAELevelConfig,
    ProgressiveVAEPipeline,
    ProgressiveVAEPrior,
    ProgressiveVAEPriorConfig,
)
from progressive_vae.data.args import DataSettings
from progressive_vae.data.code_cache import GridDataset, cached
from progressive_vae.data.dataset import pixel_batches, read_images
from progressive_vae.data.source import open_dataset
from progressive_vae.evaluation.image_metrics import (
    ClassifierFeatures,
    features_of,
    frechet_distance,
    train_classifier,
)
from progressive_vae.evaluation.likelihood import code_use
from progressive_vae.models.sampling import Sampler
from progressive_vae.models.value_types import uint8_to_unit
from progressive_vae.paths import expand_home, make_folder
from progressive_vae.scripts import run_script
from progressive_vae.serialization import write_json
from progressive_vae.training.args import FitSettings, RunSettings
from progressive_vae.training.cli import read_flags
from progressive_vae.training.phases import LevelPhase, Phase, PriorPhase, RefitPhase
from progressive_vae.training.run import Run, as_finer, make_accelerator
from progressive_vae.training.yaml_files import read_yaml


@dataclasses.dataclass
class Arguments:
    """
    Args:
        dataset_name: id on the Hub or a local path.
        output_dir: for the models and the results.
        config: the rows.
        trials: rows to run; all by default.
        distances: measure the Fréchet distances of reconstructions and samples.
        cpu_minutes: training time of a row, which its `times` multiplies.
        batch_size: of the evaluation, for images/s.
        mixed_precision: of the training.
        seed: of training and sampling.
    """

    dataset_name: str
    output_dir: str = "runs/comparison"
    config: str = str(Path(__file__).with_suffix(".yaml"))
    trials: list[str] | None = None
    distances: bool = False
    cpu_minutes: float = 10.0
    batch_size: int = 250
    mixed_precision: str = "bf16"
    seed: int = 0

    def __post_init__(self):
        self.output_dir = expand_home(self.output_dir, "output_dir")
        self.config = expand_home(self.config, "config")


def cache_pixels(arguments: Arguments, options: dict) -> dict[str, GridDataset]:
    """Return 11/12 of the training split as "train", and the rest as "test".

    Args:
        options: other `DataSettings`.
    """
    settings = DataSettings(
        **{"eval_split": "train", "eval_fraction": 1 / 12, **options},
        dataset_name=arguments.dataset_name,
    )
    source = open_dataset(settings)
    caches = {}
    for split, table in source.splits.items():
        manifest = source.manifests[split]
        images = read_images(table, shape=manifest.shape, **source.read_options(split))
        folder = Path(arguments.output_dir) / "pixels" / split
        is_flipped = settings.random_flip and split == "train"
        caches[split] = cached(folder, manifest, pixel_batches(images, is_flipped))
    return caches


@torch.no_grad()
def measure(run: Run, index: int, batch_size: int) -> dict:
    """Return the metrics of a level on held-out images: bits/dim of its factor, codebook use, and
    passes and images/s of sampling the finer grid from codes."""
    level = run.level(index)
    held_out = run.grids("test", index + 1)
    num_dims = math.prod(run.image_shape)
    nats = nats_of_class = 0.0
    counts = torch.zeros(level.config.codebook_size)
    first = None  # codes of the first batch
    for grids, labels in held_out.batches(batch_size):
        finer = as_finer(grids, level)
        codes = level.encode(finer)
        first = codes if first is None else first
        counts += torch.bincount(codes.flatten(), minlength=len(counts))
        nats -= level.log_prob(finer, codes).double().sum().item()
        if level.config.num_classes:
            nats_of_class -= level.log_prob(finer, codes, labels).double().sum().item()
    use = code_use(counts)
    sampler = Sampler(len(first))
    passes = []
    start = time.process_time()

    def step_fn(distribution, step):
        passes.append(step)
        return sampler.step(distribution, step)

    level.walk(first, step_fn, finer_size=grids.shape[-2:])
    seconds = time.process_time() - start
    num_bits = math.log(2) * num_dims * len(held_out)
    return {
        "bits_per_dim": nats / num_bits,
        "bits_per_dim_of_class": nats_of_class / num_bits,
        # Entropy of independent codes: an upper bound of what the coarser factors need for them.
        "codes_bits_per_dim": math.log2(use["codebook_perplexity"]) * codes[0].numel() / num_dims,
        **use,
        "passes": len(passes),
        "images_per_cpu_second": len(first) / seconds,
        "parameters": sum(p.numel() for p in level.decoder.parameters()),
    }


@torch.no_grad()
def measure_prior(run: Run) -> dict:
    """Return bits/dim of the prior's factor on held-out images, and its passes of sampling."""
    prior = ProgressiveVAEPrior.from_pretrained(run.output_dir / "prior").eval()
    codes, _ = run.grids("test", 1).batch(slice(None))
    nats = -sum(prior.log_prob(part).double().sum().item() for part in codes.split(500))
    bits = nats / (math.log(2) * math.prod(run.image_shape) * len(codes))
    return {"bits_per_dim": bits, "passes": prior.config.sequence_length}


def run_trial(name: str, trial: dict, recipe: dict, arguments: Arguments, pixels, accelerator):
    """Train one row in a temporary folder, and write its metrics to `results/`."""
    output_dir = Path(arguments.output_dir)
    changes = dict(trial)
    part = changes.pop("part")
    is_refit = changes.pop("refit", False)
    index = int(part[-1]) if part != "prior" else 0
    fit = {
        "settings": FitSettings(**recipe["settings"][part] | changes.pop("settings", {})),
        "seconds": 60 * arguments.cpu_minutes * changes.pop("times", 1),
    }
    with tempfile.TemporaryDirectory(dir=output_dir) as folder:
        # A row trains one part: copy the finer levels, and for `refit` this level, of another row.
        if is_refit or index < 2:
            has_pixels_only = index == 2 or (index == 1 and not is_refit)
            base = changes.pop("base", "vq, pixels" if has_pixels_only else "vq, codes")
            folders = [output_dir / "trained" / base, Path(arguments.config).parent / base]
            if not any(path.is_dir() for path in folders):
                raise ValueError(f"expected results of the row {base!r} before {name!r}, got none")
            shutil.copytree(next(filter(Path.is_dir, folders)), folder, dirs_exist_ok=True)
        settings = RunSettings(output_dir=folder, seed=arguments.seed, **recipe.get("run", {}))
        run = Run(settings, accelerator, 2, {**pixels, "validation": pixels["test"]})
        phase: Phase
        if part == "prior":
            size = list(run.grids("train", 1).manifest.shape)
            config = ProgressiveVAEPriorConfig(grid_size=size, **recipe["parts"][part])
            phase = PriorPhase(config=config, **fit)
        elif is_refit:
            from_scratch = changes.pop("from_scratch", False)
            phase = RefitPhase(index=index, changes=changes, from_scratch=from_scratch, **fit)
        else:
            config = ProgressiveVAELevelConfig(**{**recipe["parts"][part], **changes})
            phase = LevelPhase(index=index, config=config, **fit)
        start = time.process_time()
        phase(run)
        metrics = {"cpu_seconds": time.process_time() - start}
        cost = run.phases()[phase.name]
        metrics["steps"] = cost["steps"]
        if "best_step" in cost:
            metrics["best_step"] = cost["best_step"]
            metrics["best_cpu_seconds"] = metrics["cpu_seconds"] * cost["best_step"] / cost["steps"]
        metrics |= measure(run, index, arguments.batch_size) if index else measure_prior(run)
        shutil.copytree(folder, output_dir / "trained" / name, dirs_exist_ok=True)
    results = output_dir / "results"
    results.mkdir(exist_ok=True)
    write_json(results / f"{name}.json", {"trial": trial, **metrics})


def distances(arguments: Arguments, names: list[str], pixels: dict[str, GridDataset]) -> str:
    """Return a table of Fréchet distances to the held-out images, in the features of a classifier:
    of reconstructions from z_1, z_2 and from z_1, and of samples.

    The rows are finest levels under the same level_1 and prior, conditioned on several strengths of
    noise on codes, up to that of their training.
    """
    trained = Path(arguments.output_dir) / "trained"
    size = pixels["test"].manifest.shape
    classes = 1 + int(pixels["train"].batch(slice(None))[1].max())
    extractor = ClassifierFeatures(train_classifier(pixels["train"], classes, seed=arguments.seed))
    prior = ProgressiveVAEPrior.from_pretrained(trained / "prior" / "prior")
    coarsest = ProgressiveVAELevel.from_pretrained(trained / "prior" / "level_1")
    images = pixels["test"].batch(slice(None))[0].to(torch.uint8)
    real = features_of(extractor, uint8_to_unit(images).split(500))
    lines = [
        "| row | noise on codes | from z_2 | from z_1 | samples | difference |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        finest = ProgressiveVAELevel.from_pretrained(trained / name / "level_2").eval()
        pipe = ProgressiveVAEPipeline.from_levels(prior.eval(), [coarsest.eval(), finest], size[1:])
        pipe.set_progress_bar_config(disable=True)
        codes = pipe.encode(images)
        for strength in sorted({0.0, finest.config.code_noise / 2, finest.config.code_noise}):
            generator = torch.Generator().manual_seed(arguments.seed)
            kwargs = {"output_type": "pt", "code_noise": strength, "generator": generator}
            outputs = [
                pipe(codes=codes, **kwargs).images,
                pipe(codes=codes[:1], **kwargs).images,
                pipe(num_images_per_prompt=len(images), **kwargs).images,
            ]
            values = [
                frechet_distance(real, features_of(extractor, output.split(500)))
                for output in outputs
            ]
            values.append(values[-1] - values[0])
            cells = [name, strength, *(f"{value:.4f}" for value in values)]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
            print(lines[-1], flush=True)
    return "\n".join(lines)


def table(arguments: Arguments, names: list[str]) -> str:
    """Return the results of all finished rows, in the order of the YAML file, as Markdown."""
    lines = [
        "| row | bits/dim | codes: bits/dim at most | codes used | steps | passes | images/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        path = Path(arguments.output_dir) / "results" / f"{name}.json"
        if path.is_file():
            r = json.loads(path.read_text())
            cells = [name, f"{r['bits_per_dim']:.4f}", "", "", r["steps"], r["passes"], ""]
            if "codes_used" in r:
                cells[2] = f"{r['codes_bits_per_dim']:.4f}"
                cells[3] = f"{r['codes_used']} of {r['codebook_size']}"
                cells[6] = f"{r['images_per_cpu_second']:.0f}"
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(words: list[str]):
    parser = ArgumentParser(
        exit_on_error=False, description="Compare decoders at equal training time."
    )
    parser.add_class_arguments(Arguments)
    arguments = Arguments(**read_flags(parser, words))
    recipe = read_yaml(Path(arguments.config))
    if not isinstance(recipe, dict) or not isinstance(recipe.get("trials"), dict):
        raise ValueError(f"expected config with trials, got {arguments.config} without them")
    make_folder(arguments.output_dir, "output_dir")
    names = list(recipe["trials"])
    if unknown := sorted(set(arguments.trials or ()) - set(names)):
        raise ValueError(f"expected trials among {names}, got {unknown}")
    transformers_logging.disable_progress_bar()
    accelerator = make_accelerator(
        RunSettings(mixed_precision=arguments.mixed_precision, report_to="none")
    )
    pixels = cache_pixels(arguments, recipe.get("data", {}))
    for name in arguments.trials or names:
        if not (Path(arguments.output_dir) / "results" / f"{name}.json").is_file():
            run_trial(name, recipe["trials"][name], recipe, arguments, pixels, accelerator)
        print(table(arguments, names), flush=True)
    if arguments.distances:
        print(distances(arguments, recipe["distances"], pixels))


if __name__ == "__main__":
    run_script(main)
