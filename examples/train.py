# /// script
# requires-python = ">=3.10"
# dependencies = ["progressive-vae[train]"]
#
# [tool.uv.sources]
# progressive-vae = { path = "..", editable = true }
# ///
"""Train a progressive VAE level by level, and its prior; evaluate it; write the pipeline.

    accelerate launch examples/train.py
        scikit-learn's digits (examples/configs/digits.yaml), N = 2: one minute on two CPU cores.

    accelerate launch examples/train.py --config examples/configs/fashion_mnist.yaml
        Fashion-MNIST, N = 2: 2.88 bits/dim in 105 minutes on one CPU core.

    accelerate launch examples/train.py --config examples/configs/color_64.yaml \
            --train_data_dir photos --resolution 64 --center_crop --max_train_minutes 60
        a folder of color images, N = 3, in an hour.

A recipe (`--config`) has a section for each level, the prior, the data and the run. Flags override
it: `--level_1.hidden_size 96`, `--level_2.fit.learning_rate 1e-3`, and `--levels.…` for all levels.
`--data.NAME` and `--run.NAME` may be written `--NAME`. `--phase` runs one phase again from the
saved artifacts.
"""

import argparse
import shlex
from dataclasses import fields
from pathlib import Path

from accelerate import PartialState
from jsonargparse import ArgumentParser

from progressive_vae.configuration.validation import MAX_LEVELS
from progressive_vae.data.args import TRAIN_ONLY_SETTINGS, DataSettings
from progressive_vae.scripts import run_script
from progressive_vae.training import train
from progressive_vae.training.args import RunSettings
from progressive_vae.training.cli import read_flags
from progressive_vae.training.recipe import Recipe, read_recipe
from progressive_vae.training.sections import SECTIONS, add_sections

DIGITS = Path(__file__).parent / "configs" / "digits.yaml"
# Arguments of `train` that the recipe sets.
RECIPE_ARGUMENTS = {"recipe", "dataset", "output_dir", "max_train_minutes", "accelerator"}
PREFIXES = {
    field.name: section
    for section, settings in (("data", DataSettings), ("run", RunSettings))
    for field in fields(settings)
}


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        exit_on_error=False,
        description="Train a progressive VAE and write its pipeline. Without a recipe and a "
        "dataset the recipe is examples/configs/digits.yaml. Every flag of --levels is also one of "
        "a single level, as --level_1.hidden_size; --data.NAME and --run.NAME may be written "
        "--NAME.",
    )
    parser.add_argument("--config", type=str, help="YAML file of a recipe; flags override it")
    parser.add_argument("--num_levels", type=int, help=f"number of levels N, 1 to {MAX_LEVELS}")
    parser.add_function_arguments(train, skip=RECIPE_ARGUMENTS)
    # Without this flag a command expects a new folder.
    parser.set_defaults(resume_from_checkpoint=None)
    add_sections(parser, [name for name in SECTIONS if name.startswith("level")])
    for action in parser._actions:
        if action.dest.startswith("level_"):
            action.help = argparse.SUPPRESS
    return parser


def parse(words: list[str]) -> tuple[Recipe, dict]:
    """Return the recipe of a command line, and the other arguments of `train`."""
    flags = read_flags(make_parser(), words, PREFIXES)
    overrides = {name: flags.pop(name) for name in [*SECTIONS, "num_levels"] if name in flags}
    path = flags.pop("config", None)
    data = overrides.get("data", {})
    if not (path or data.get("dataset_name") or data.get("train_data_dir")):
        path = DIGITS
    return read_recipe(path, overrides), {"resume_from_checkpoint": None, **flags}


def main(words: list[str]):
    recipe, arguments = parse(words)
    pipe = train(recipe, **arguments)
    if pipe is not None and PartialState().is_main_process:
        print("\nnext: " + "\n      ".join(next_commands(recipe)))


def next_commands(recipe: Recipe) -> list[str]:
    """Return commands that use the trained pipeline."""
    folder = shlex.quote(recipe.run.output_dir)
    data_flags: list[str] = []
    for field in fields(recipe.data):
        value = getattr(recipe.data, field.name)
        if field.name in TRAIN_ONLY_SETTINGS or value == field.default:
            continue
        data_flags.append(f"--{field.name}")
        if value is not True:
            data_flags.append(str(value))
    images = shlex.quote(recipe.data.train_data_dir or "IMAGES")
    return [
        f"python examples/sample.py --model {folder}",
        f"python examples/evaluate.py --model {folder} {shlex.join(data_flags)}",
        f"python examples/compress.py pack {images} images.pvae --model {folder}",
        f"hf upload NAME {folder} .",
    ]


if __name__ == "__main__":
    run_script(main)
