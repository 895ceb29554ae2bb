# /// script
# requires-python = ">=3.10"
# dependencies = ["progressive-vae[train]"]
#
# [tool.uv.sources]
# progressive-vae = { path = "..", editable = true }
# ///
"""Compare decoder orders, group counts and quantizers in equal training time; print one table.

    python examples/compare_decoders.py --dataset_name zalando-datasets/fashion_mnist
        all rows of compare_decoders.yaml, ten CPU-minutes each or as many times that as the row
        says: two hours and three quarters on two cores. A row that is done is not run again.

    python examples/compare_decoders.py --dataset_name … --trials '["vq, pixels", "fsq, pixels"]'
        these rows. Two processes with OMP_NUM_THREADS=1 and a part of the rows each use two cores
        better than one process with two threads (start the second once the first has cached the
        images); rows with `refit`, `level_1` and `prior` need the vq rows done.

Nothing here sees test images: the rows are trained on eleven twelfths of the training split and
measured on the rest. A row lasts as long as it is told to, by the clock; images/s are per second of
CPU time.
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
from progressive_vae.training.recipe import read_yaml
from progressive_vae.training.run import Run, as_finer, make_accelerator


@dataclasses.dataclass
class Arguments:
    """
    Args:
        dataset_name: id on the Hub or a local path.
        output_dir: for the models and the results.
        config: the rows.
        trials: rows to run; all if not given.
        distances: measure what drawn codes cost in place of true ones.
        cpu_minutes: of each row, or as many times that as it says.
        mixed_precision: of the training.
        seed: of everything.
    """

    dataset_name: str
    output_dir: str = "runs/comparison"
    config: str = str(Path(__file__).with_suffix(".yaml"))
    trials: list[str] | None = None
    distances: bool = False
    cpu_minutes: float = 10.0
    mixed_precision: str = "bf16"
    seed: int = 0

    def __post_init__(self):
        self.output_dir = expand_home(self.output_dir, "output_dir")
        self.config = expand_home(self.config, "config")


def cache_pixels(arguments: Arguments) -> dict[str, GridDataset]:
    """Eleven twelfths of the training split, and the rest under the name "test"."""
    settings = DataSettings(
        dataset_name=arguments.dataset_name, eval_split="train", eval_fraction=1 / 12
    )
    source, caches = open_dataset(settings), {}
    for split, table in source.splits.items():
        manifest = source.manifests[split]
        images = read_images(table, shape=manifest.shape, **source.read_options(split))
        folder = Path(arguments.output_dir) / "pixels" / split
        caches[split] = cached(folder, manifest, pixel_batches(images))
    return caches


@torch.no_grad()
def measure(run: Run, index: int, num_images: int = 250) -> dict:
    """Bits per dimension of the level's factor on the held-out images, use of its codes, and
    passes and images per second of drawing the finer grid from held-out codes."""
    level, held_out = run.level(index), run.grids("test", index + 1)
    dimensions = math.prod(run.image_shape)
    nats, counts, first = 0.0, torch.zeros(level.config.codebook_size), None
    for grids, _ in held_out.batches(num_images):
        finer = as_finer(grids, level)
        codes = level.encode(finer)
        first = codes if first is None else first
        counts += torch.bincount(codes.flatten(), minlength=len(counts))
        nats -= level.log_prob(finer, codes).double().sum().item()
    use = code_use(counts)
    draw, passes, start = Sampler(len(first)), [], time.process_time()

    def choose(distribution, place):
        passes.append(place)
        return draw.choose(distribution, place)

    level.walk(first, choose, finer_size=grids.shape[-2:])
    seconds = time.process_time() - start
    return {
        "bits_per_dim": nats / (math.log(2) * dimensions * len(held_out)),
        # What independent codes would cost: a bound on what the coarser factors have to pay.
        "codes_bits_per_dim": math.log2(use["codebook_perplexity"]) * codes[0].numel() / dimensions,
        **use,
        "passes": len(passes),
        "images_per_cpu_second": len(first) / seconds,
        "parameters": sum(p.numel() for p in level.decoder.parameters()),
    }


@torch.no_grad()
def measure_prior(run: Run) -> dict:
    """Bits per dimension of the prior's factor on the held-out images."""
    prior = ProgressiveVAEPrior.from_pretrained(run.output_dir / "prior").eval()
    codes, _ = run.grids("test", 1).batch(slice(None))
    nats = -sum(prior.log_prob(part).double().sum().item() for part in codes.split(500))
    bits = nats / (math.log(2) * math.prod(run.image_shape) * len(codes))
    return {"bits_per_dim": bits, "passes": prior.config.sequence_length}


def run_trial(name: str, trial: dict, recipe: dict, arguments: Arguments, pixels, accelerator):
    """Train one row in a folder of its own and write its figures to `results/`."""
    output_dir, changes = Path(arguments.output_dir), dict(trial)
    part, is_refit = changes.pop("part"), changes.pop("refit", False)
    index = int(part[-1]) if part != "prior" else 0
    fit = {
        "settings": FitSettings(**recipe["settings"][part] | changes.pop("settings", {})),
        "seconds": 60 * arguments.cpu_minutes * changes.pop("times", 1),
    }
    with tempfile.TemporaryDirectory(dir=output_dir) as folder:
        if is_refit or index < 2:  # the finer levels, and with `refit` this level, are there
            has_pixels_only = index == 2 or (index == 1 and not is_refit)
            base = changes.pop("base", "vq, pixels" if has_pixels_only else "vq, symbols")
            if not (output_dir / "trained" / base).is_dir():
                raise ValueError(f"expected the row {base!r} to be done before {name!r}")
            shutil.copytree(output_dir / "trained" / base, folder, dirs_exist_ok=True)
        run = Run(RunSettings(output_dir=folder, seed=arguments.seed), accelerator, 2, pixels)
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
        figures = {"cpu_seconds": time.process_time() - start}
        figures["steps"] = run.phases()[phase.name]["steps"]
        figures |= measure(run, index) if index else measure_prior(run)
        shutil.copytree(folder, output_dir / "trained" / name, dirs_exist_ok=True)
    results = output_dir / "results"
    results.mkdir(exist_ok=True)
    write_json(results / f"{name}.json", {"trial": trial, **figures})


def distances(arguments: Arguments, names: list[str], pixels: dict[str, GridDataset]) -> str:
    """What drawn codes cost: Fréchet distances to the held-out images, in a classifier's features,
    of images drawn from their own z_2, from their z_1, and from nothing, as Markdown.

    The rows are pixel levels under one level_1 and prior, told to expect no wrong codes or as many
    as they were trained with.
    """
    trained, size = Path(arguments.output_dir) / "trained", pixels["test"].manifest.shape
    classes = 1 + int(pixels["train"].batch(slice(None))[1].max())
    extractor = ClassifierFeatures(train_classifier(pixels["train"], classes, seed=arguments.seed))
    prior = ProgressiveVAEPrior.from_pretrained(trained / "prior" / "prior")
    coarsest = ProgressiveVAELevel.from_pretrained(trained / "prior" / "level_1")
    images = pixels["test"].batch(slice(None))[0].to(torch.uint8)
    real = features_of(extractor, uint8_to_unit(images).split(500))
    lines = [
        "| row | told to expect | from z_2 | from z_1 | from nothing | loss |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        finest = ProgressiveVAELevel.from_pretrained(trained / name / "level_2").eval()
        pipe = ProgressiveVAEPipeline.from_levels(prior.eval(), [coarsest.eval(), finest], size[1:])
        pipe.set_progress_bar_config(disable=True)
        codes = pipe.encode(images)
        for strength in sorted({0.0, finest.config.code_noise / 2, finest.config.code_noise}):
            generator = torch.Generator().manual_seed(arguments.seed)
            controls = {"output_type": "pt", "code_noise": strength, "generator": generator}
            drawn = [
                pipe(codes=codes, **controls).images,
                pipe(codes=codes[:1], **controls).images,
                pipe(num_images_per_prompt=len(images), **controls).images,
            ]
            found = [
                frechet_distance(real, features_of(extractor, batch.split(500))) for batch in drawn
            ]
            cells = [name, strength, *(f"{x:.4f}" for x in [*found, found[-1] - found[0]])]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
            print(lines[-1], flush=True)
    return "\n".join(lines)


def table(arguments: Arguments, names: list[str]) -> str:
    """The rows that are done, in the order of the YAML file, as Markdown."""
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
    parser = ArgumentParser(exit_on_error=False, description="Rows trained in equal time.")
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
    pixels = cache_pixels(arguments)
    for name in arguments.trials or names:
        if not (Path(arguments.output_dir) / "results" / f"{name}.json").is_file():
            run_trial(name, recipe["trials"][name], recipe, arguments, pixels, accelerator)
        print(table(arguments, names), flush=True)
    if arguments.distances:
        print(distances(arguments, recipe["distances"], pixels))


if __name__ == "__main__":
    run_script(main)
