"""Quality and speed for the same training time, beside what one writes in an afternoon.

    python examples/benchmark.py --train_minutes 30

trains two models for so many minutes each, on the CPU, and measures both: a progressive VAE of a
recipe of examples/train.py, and one grid of codes under a decoder with squared error and a causal
transformer as its prior. It prints Fréchet distances of drawn images (in the features of a
classifier of the data set's labels, which must be there), images/s drawn (at batch 1 and 250, whole
and by factor), encoded and trained on, and the floating-point operations of an image as a share of
what products of large matrices reach on this machine. Results are written to `--output_dir`; what
is there is not trained again. `--model` adds the figures of a saved pipeline.
"""

import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from jsonargparse import ArgumentParser
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from progressive_vae import ProgressiveVAEPipeline
from progressive_vae.causal import cached_step
from progressive_vae.entries import as_pixel_values, as_unit, of_unit
from progressive_vae.quantizer import VectorQuantizer
from progressive_vae.saved import read_json, write_json
from progressive_vae.training import train
from progressive_vae.training.codes import GridDataset
from progressive_vae.training.command import read_flags
from progressive_vae.training.lock import locked
from progressive_vae.training.recipe import read_recipe
from progressive_vae.training.run import Run
from progressive_vae.training.sources import open_source
from progressive_vae.training.speed import (
    matrix_rate,
    operations,
    rate,
    speeds_of,
    training_operations,
)
from progressive_vae.training.yardsticks import (
    ClassifierFeatures,
    cached_classifier,
    draw_labelled,
    features_of,
    frechet_distance,
)

_ANEW = "delete the folder and begin anew"
MATRIX_RATE = "matrix_rate.json"  # of bf16 products, by the threads of the training
RECIPE = Path(__file__).parent / "configs" / "fashion_mnist.yaml"


@dataclass
class Arguments:
    """
    Args:
        config: the recipe, whose shares of the time count, not its steps.
        dataset_name: in place of the recipe's.
        train_data_dir: likewise.
        train_minutes: of each of the two models.
        num_drawn: images for each distance.
        model: one more pipeline to measure.
        output_dir: for models and results.
        seed: of both.
    """

    config: str = str(RECIPE)
    dataset_name: str | None = None
    train_data_dir: str | None = None
    train_minutes: float = 30
    num_drawn: int = 10_000
    model: str | None = None
    output_dir: str = "runs/benchmark"
    seed: int = 0


# ---- what one writes in an afternoon -------------------------------------------------------------


class FlatVAE(nn.Module):
    """One grid of codes, a quarter of the image's side; the decoder minimises squared error."""

    def __init__(self, num_channels: int, codebook_size: int = 128, width: int = 128):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(num_channels, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 64, 1),
        )
        self.quantizer = VectorQuantizer(
            codebook_size, 64, 0.25, decay=0.99, restart_threshold=0.03
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(64, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(width, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(width, num_channels, 4, stride=2, padding=1),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images in [−1, 1] -> loss, codes, latents."""
        latents = self.encoder(images)
        codes, quantized, _, commitment_loss = self.quantizer(latents)
        loss = F.mse_loss(self.decoder(quantized), images) + commitment_loss
        return loss, codes, latents

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) -> images in [0, 1]."""
        return (self.decoder(self.quantizer.lookup(codes)) / 2 + 0.5).clamp(0, 1)


def train_for(seconds: float, model: nn.Module, step: Callable[[], Tensor], lr: float) -> int:
    """AdamW with a cosine over the clock; the number of steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99))
    start, steps = time.perf_counter(), 0
    while (share := (time.perf_counter() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (steps + 1) / 100) * (1 + math.cos(math.pi * share)) / 2
        with torch.autocast("cpu", torch.bfloat16):
            loss = step()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
    return steps


class Afternoon:
    """A `FlatVAE` and a causal transformer over its codes, with the class as first token."""

    def __init__(self, num_channels: int, num_classes: int, size: tuple[int, int], seed: int):
        torch.manual_seed(seed)
        self.vae, self.size = FlatVAE(num_channels), size
        self.codebook_size = len(self.vae.quantizer.codebook)
        self.num_classes = num_classes
        self.prior = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=self.codebook_size + self.num_classes,
                hidden_size=128,
                intermediate_size=352,
                num_hidden_layers=4,
                num_attention_heads=4,
                max_position_embeddings=1 + math.prod(size),
                bos_token_id=None,
                eos_token_id=None,
                pad_token_id=None,
            )
        )

    def fit(self, train: GridDataset, seconds: float) -> dict[str, float]:
        """Half of the time for the autoencoder, half for its prior."""
        batches = train.random_batches(64)
        first = as_pixel_values(torch.cat([next(batches)[0] for _ in range(30)]))
        with torch.no_grad():
            latents = self.vae.encoder(first).movedim(1, -1).flatten(0, -2)
        self.vae.quantizer.initialize(latents, torch.Generator().manual_seed(0))

        def vae_step() -> Tensor:
            loss, codes, latents = self.vae(as_pixel_values(next(batches)[0]))
            self.vae.quantizer.after_step(latents, codes, lambda tensor: tensor)
            return loss

        steps = train_for(seconds / 2, self.vae, vae_step, lr=1e-3)
        with torch.no_grad():
            encoded = [
                (self.vae(as_pixel_values(images))[1], labels)
                for images, labels in train.batches(500)
            ]
        codes, labels = (torch.cat(parts) for parts in zip(*encoded, strict=True))
        tokens = torch.cat([self.prompt(labels), codes.flatten(1)], 1)

        def prior_step() -> Tensor:
            rows = tokens[torch.randint(len(tokens), (128,))]
            return self.prior(rows, labels=rows, use_cache=False).loss

        prior_steps = train_for(seconds / 2, self.prior, prior_step, lr=1e-3)
        half = seconds / 2
        return {"vae": 64 * steps / half, "prior": 128 * prior_steps / half}

    def prompt(self, labels: Tensor) -> Tensor:
        return (labels + self.codebook_size)[:, None]

    @torch.no_grad()
    def draw(self, labels: Tensor, use_cache: bool) -> Tensor:
        """Images in [0, 1] of classes (B,)."""
        tokens = self.prompt(labels)
        cache, inputs = None, tokens
        for _ in range(math.prod(self.size)):
            if use_cache:
                output, cache = cached_step(self.prior, cache, input_ids=inputs)
            else:
                output = self.prior(inputs, use_cache=False)
            logits = output.logits[:, -1, : self.codebook_size].float()
            drawn = torch.multinomial(logits.softmax(-1), 1)
            tokens = torch.cat([tokens, drawn], 1)
            inputs = drawn if use_cache else tokens
        return self.vae.decode(tokens[:, 1:].unflatten(1, self.size))

    def parts(self) -> dict[str, nn.Module]:
        return {"vae": self.vae, "prior": self.prior}


# ---- figures -------------------------------------------------------------------------------------


def afternoon(
    folder: Path, run: Run, minutes: float, seed: int
) -> tuple[Afternoon, dict[str, float]]:
    """Trained, or as it was saved in `folder`; and images a second of its training."""
    channels, height, width = run.image_shape
    model = Afternoon(channels, len(run.class_names), (height // 4, width // 4), seed)
    if (folder / "costs.json").is_file():
        for name, part in model.parts().items():
            part.load_state_dict(load_file(folder / f"{name}.safetensors"))
        return model, read_json(folder / "costs.json", _ANEW)
    costs = model.fit(run.pixels["train"], 60 * minutes)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in model.parts().items():
        state = {key: value.contiguous().clone() for key, value in part.state_dict().items()}
        save_file(state, folder / f"{name}.safetensors")
    write_json(folder / "costs.json", costs)
    return model, costs


@dataclass
class Yardstick:
    """Distances to the held-out images, in the features of a classifier."""

    extractor: nn.Module
    test: GridDataset
    num_drawn: int
    seed: int

    def __post_init__(self):
        self.num_drawn = min(self.num_drawn, len(self.test))
        self.real = self.features(as_unit(images) for images, _ in self.test.batches(250))

    def features(self, batches: Iterable[Tensor]) -> Tensor:
        """Of the first images, rounded to 8 bits, as files would hold them."""
        batches = islice(batches, math.ceil(self.num_drawn / 250))
        rounded = (as_unit(of_unit(images)) for images in batches)
        return features_of(self.extractor, rounded)[: self.num_drawn]

    def distance(self, batches: Iterable[Tensor]) -> float:
        return frechet_distance(self.real, self.features(batches))

    @torch.no_grad()
    def of_afternoon(self, model: Afternoon, costs: dict[str, float]) -> dict[str, float]:
        torch.manual_seed(self.seed)
        labels = torch.arange(self.num_drawn) % model.num_classes
        drawn = (model.draw(part, use_cache=True) for part in labels.split(250))
        images, some = as_pixel_values(self.test.batch(slice(0, 250))[0]), torch.arange(250)
        some = some % model.num_classes
        return {
            "Fréchet distance": self.distance(drawn),
            "drawn, batch 1": rate(lambda: model.draw(some[:1], False), 1),
            "drawn, batch 250": rate(lambda: model.draw(some, False), 250),
            "drawn with a key-value cache, batch 250": rate(lambda: model.draw(some, True), 250),
            "encoded": rate(lambda: model.vae(images), len(images)),
            "GFLOP to draw an image": operations(lambda: model.draw(some[:8], False)) / 8e9,
            **{f"trained on, {name}": value for name, value in costs.items()},
        }

    def of_ours(
        self, pipe: ProgressiveVAEPipeline, costs: dict, matrix_rate_in_training: float = math.nan
    ) -> dict[str, float]:
        pipe.set_progress_bar_config(disable=True)
        images = self.test.batch(slice(0, 250))[0].to(torch.uint8)
        drawn = (as_unit(x) for x, _ in draw_labelled(pipe, self.num_drawn, self.seed))
        figures = {"Fréchet distance": self.distance(drawn), **speeds_of(pipe, images)}
        gflop = training_operations(pipe, images[:8])
        for phase, cost in costs.items():
            if phase in gflop:
                figures[f"trained on, {phase}"] = cost["images_per_second"]
                share = gflop[phase] * 1e9 * cost["images_per_second"] / matrix_rate_in_training
                figures[f"share of the rate of bf16 products, training {phase}"] = share
        share = figures["GFLOP to draw an image"] * 1e9 * figures["drawn, batch 250"]
        figures["share of the rate of fp32 products, drawing"] = share / matrix_rate(torch.float32)
        return figures


def table(columns: dict[str, dict[str, float]]) -> str:
    rows = list(dict.fromkeys(name for column in columns.values() for name in column))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        figures = [column.get(row) for column in columns.values()]
        cells = ["" if x is None else f"{x:.0f}" if x >= 1000 else f"{x:.4g}" for x in figures]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(words: list[str]):
    parser = ArgumentParser(
        exit_on_error=False, description="Quality and speed for the same training time."
    )
    parser.add_class_arguments(Arguments)
    arguments = Arguments(**read_flags(parser, words))
    output_dir = Path(arguments.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with locked(output_dir, PartialState(cpu=True)):
        compare(arguments)


def compare(arguments: Arguments):
    """Train both, unless that was done before, and measure them."""
    output_dir, seed, minutes = Path(arguments.output_dir), arguments.seed, arguments.train_minutes
    folder = output_dir / "progressive_vae"
    data = {"dataset_name": arguments.dataset_name, "train_data_dir": arguments.train_data_dir}
    run_settings = {"output_dir": str(folder), "seed": seed, "max_train_minutes": minutes,
                    "report_to": "none"}  # fmt: skip
    overrides = {"data": {name: value for name, value in data.items() if value is not None}}
    recipe = read_recipe(arguments.config, {**overrides, "run": run_settings})
    source = open_source(recipe.data)
    names = source.class_names
    if not names:
        raise ValueError(
            "expected a data set with labels, as distances are in the features of a classifier of "
            f"them, got {source.manifests['train'].dataset}"
        )
    made = {"recipe": recipe.sections, "dataset": source.manifests["train"].dataset}
    path = output_dir / "settings.json"
    if path.is_file() and (found := read_json(path, _ANEW)) != made:
        raise ValueError(f"expected models of {made} in {output_dir}, got those of {found}")
    write_json(path, made)
    accelerator = Accelerator(
        cpu=True,
        mixed_precision=recipe.run.mixed_precision,
        gradient_accumulation_steps=recipe.run.gradient_accumulation_steps,
    )
    train(recipe.sections, accelerator=accelerator)
    if not (folder / MATRIX_RATE).is_file():  # what is measured later may have other threads
        write_json(folder / MATRIX_RATE, matrix_rate(torch.bfloat16))
    pixels = source.pixels(folder / "cache" / "pixels", accelerator)
    run = Run(recipe.run, accelerator, len(recipe.levels), pixels, names)
    flat, flat_costs = afternoon(output_dir / "afternoon", run, minutes, seed)
    classifier = cached_classifier(
        output_dir / "classifier.safetensors", pixels["train"], 4000, seed
    )
    yardstick = Yardstick(ClassifierFeatures(classifier), pixels["test"], arguments.num_drawn, seed)
    some = as_unit(pixels["train"].sample(yardstick.num_drawn, seed))
    columns = {
        f"progressive VAE, {minutes:g} minutes": yardstick.of_ours(
            ProgressiveVAEPipeline.from_pretrained(folder),
            run.phases(),
            read_json(folder / MATRIX_RATE, _ANEW, float),
        ),
        f"afternoon VQ-VAE, {minutes:g} minutes": yardstick.of_afternoon(flat, flat_costs),
        f"{len(some)} training images": {
            "Fréchet distance": yardstick.distance(iter(some.split(250)))
        },
    }
    if arguments.model is not None:
        pipe = ProgressiveVAEPipeline.from_pretrained(arguments.model)
        columns[Path(arguments.model).name] = yardstick.of_ours(pipe, {})
    text = (
        f"{table(columns)}\n\n{torch.get_num_threads()} threads, torch {torch.__version__}, seed "
        f"{seed}; distances of {yardstick.num_drawn} images to the test split, in the "
        "features of a small classifier; images/s where no unit is named; "
        f"products of large matrices: {matrix_rate(torch.bfloat16) / 1e9:.0f} GFLOP/s in bf16, "
        f"{matrix_rate(torch.float32) / 1e9:.0f} in fp32\n"
    )
    write_json(output_dir / "benchmark.json", columns)
    (output_dir / "benchmark.md").write_text(text)
    print(text)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
