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

    accelerate launch examples/train.py --config examples/configs/colour_64.yaml \
            --train_data_dir pictures --resolution 64 --center_crop --max_train_minutes 60
        a folder of color pictures, N = 3, in an hour.

A recipe (`--config`) has a section for each level, the prior, the data and the run; dotted flags
win over it: `--level_1.hidden_size 96`, `--level_2.fit.learning_rate 1e-3`, and `--levels.…` for
all levels. Of `--data.…` and `--run.…` the first word may be left out. `--phase` runs one phase
again from the saved artefacts.
"""

import argparse
import shlex
from dataclasses import fields
from pathlib import Path

from accelerate import PartialState
from jsonargparse import ArgumentParser

from progressive_vae.configuration.validation import MAX_LEVELS
from progressive_vae.data.args import OF_TRAINING_IMAGES, DataSettings
from progressive_vae.scripts import run_script
from progressive_vae.training import train
from progressive_vae.training.args import RunSettings
from progressive_vae.training.cli import read_flags
from progressive_vae.training.recipe import SECTIONS, Recipe, add_sections, read_recipe

DIGITS = Path(__file__).parent / "configs" / "digits.yaml"
OF_RECIPES = {"recipe", "dataset", "output_dir", "max_train_minutes", "accelerator"}
PREFIXES = {f.name: section
            for section, kind in (("data", DataSettings), ("run", RunSettings))
            for f in fields(kind)}  # fmt: skip


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        exit_on_error=False,
        description="Train a progressive VAE and write its pipeline. Without a recipe and a data "
        "set the recipe is examples/configs/digits.yaml. What is said of --levels may be said of "
        "one level, as --level_1.hidden_size; --data.NAME and --run.NAME may be called --NAME.",
    )
    parser.add_argument("--config", type=str, help="YAML file of a recipe, over which flags win")
    parser.add_argument("--num_levels", type=int, help=f"N, 1 to {MAX_LEVELS}")
    parser.add_function_arguments(train, skip=OF_RECIPES)
    # A command says that it goes on; a plain one is for a new folder.
    parser.set_defaults(resume_from_checkpoint=None)
    add_sections(parser, [name for name in SECTIONS if name.startswith("level")])
    for action in parser._actions:
        if action.dest.startswith("level_"):
            action.help = argparse.SUPPRESS
    return parser


def parse(words: list[str]) -> tuple[Recipe, dict]:
    """The recipe that the words of a command make, and the other arguments of `train`."""
    given = read_flags(make_parser(), words, PREFIXES)
    overrides = {name: given.pop(name) for name in [*SECTIONS, "num_levels"] if name in given}
    path, data = given.pop("config", None), overrides.get("data", {})
    if not (path or data.get("dataset_name") or data.get("train_data_dir")):
        path = DIGITS
    return read_recipe(path, overrides), {"resume_from_checkpoint": None, **given}


def main(words: list[str]):
    recipe, arguments = parse(words)
    pipe = train(recipe.sections, **arguments)
    if pipe is not None and PartialState().is_main_process:
        print("\nnext: " + "\n      ".join(next_commands(recipe)))


def next_commands(recipe: Recipe) -> list[str]:
    """What one does with a trained pipeline, as commands."""
    folder, data = shlex.quote(recipe.run.output_dir), recipe.data
    told = (f for f in fields(data) if f.name not in OF_TRAINING_IMAGES)
    given = {f.name: getattr(data, f.name) for f in told if getattr(data, f.name) != f.default}
    words = [[f"--{name}"] if value is True else [f"--{name}", str(value)]
             for name, value in given.items()]  # fmt: skip
    pictures = shlex.quote(data.train_data_dir or "PICTURES")
    return [
        f"python examples/sample.py --model {folder}",
        f"python examples/evaluate.py --model {folder} {shlex.join(sum(words, []))}",
        f"python examples/compress.py pack {pictures} pictures.parquet --model {folder}",
        f"hf upload NAME {folder} .",
    ]


if __name__ == "__main__":
    run_script(main)
