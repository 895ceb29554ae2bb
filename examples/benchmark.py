"""Quality and speed for the same training time, beside what one writes in an afternoon.

    python examples/benchmark.py --dataset_name zalando-datasets/fashion_mnist --train_minutes 30

trains two models for so many minutes each and measures both: a progressive VAE of a recipe, and one
grid of codes under a decoder with squared error and a causal transformer as its prior. It prints
Fréchet distances of drawn images, images/s drawn (at batch 1 and 250, whole and by factor), encoded
and trained on, and the floating-point operations of an image as a share of what products of large
matrices reach on this machine. Results are written to `--output_dir`; what is there is not trained
again. `--model` adds the figures of a saved pipeline.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM

from progressive_vae import (
    ProgressiveVAELevel,
    ProgressiveVAELevelConfig,
    ProgressiveVAEPipeline,
    ProgressiveVAEPrior,
    ProgressiveVAEPriorConfig,
)
from progressive_vae.codes import GridDataset, Manifest, cached
from progressive_vae.data import (
    find_image_column,
    find_labels,
    load_images,
    pixel_batches,
    read_images,
)
from progressive_vae.evaluation import (
    ClassifierFeatures,
    cached_classifier,
    draw_labelled,
    frechet_distance,
)
from progressive_vae.fitting import FitSettings, fit
from progressive_vae.quantizer import VectorQuantizer
from progressive_vae.run import Run, as_finer, write_json
from progressive_vae.training import initialize_codebook, train_level, train_prior

TIMED_SECONDS = 3.0  # of each speed
RECIPE = Path(__file__).parent / "configs" / "fashion_mnist.yaml"


@dataclass
class Arguments:
    dataset_name: str = "zalando-datasets/fashion_mnist"
    train_minutes: float = field(default=30, metadata={"help": "of each of the two models"})
    num_drawn: int = field(default=10_000, metadata={"help": "images for each distance"})
    model: str | None = field(default=None, metadata={"help": "one more pipeline to measure"})
    output_dir: str = "runs/benchmark"
    config: str = field(default=str(RECIPE), metadata={"help": "the recipe, but for its steps"})
    seed: int = 0


def cache_images(arguments: Arguments) -> tuple[dict[str, GridDataset], list[str]]:
    splits = load_images(arguments.dataset_name)
    column = find_image_column(splits["train"])
    label_column, names = find_labels(splits)
    image = splits["train"][0][column]
    shape = (len(image.getbands()), image.height, image.width)
    caches = {}
    for split, table in splits.items():
        manifest = Manifest(
            "", f"{arguments.dataset_name} ({table._fingerprint})", split, shape, 256
        )
        folder = Path(arguments.output_dir) / "cache" / "pixels" / split
        images = read_images(table, column, label_column, shape)
        caches[split] = cached(folder, manifest, pixel_batches(images))
    return caches, names


# ---- what one writes in an afternoon -------------------------------------------------------------


class FlatVAE(nn.Module):
    """One grid of codes, a quarter of the image's side; the decoder minimises squared error."""

    def __init__(self, num_channels: int, codebook_size: int = 128, width: int = 128):
        super().__init__()
        config = ProgressiveVAELevelConfig(
            num_channels=num_channels, codebook_size=codebook_size, codebook_dim=64
        )
        self.encoder = nn.Sequential(
            nn.Conv2d(num_channels, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, config.codebook_dim, 1),
        )
        self.quantizer = VectorQuantizer(config)
        self.decoder = nn.Sequential(
            nn.Conv2d(config.codebook_dim, width, 3, padding=1),
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
        codes, quantized, _, commitment = self.quantizer(latents)
        loss = F.mse_loss(self.decoder(quantized), images) + 0.25 * commitment
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
        self.num_classes = max(1, num_classes)
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
        first = torch.cat([next(batches)[0] for _ in range(30)]) / 127.5 - 1
        with torch.no_grad():
            latents = self.vae.encoder(first).movedim(1, -1).flatten(0, -2)
        self.vae.quantizer.initialize(latents, torch.Generator().manual_seed(0))

        def vae_step() -> Tensor:
            loss, codes, latents = self.vae(next(batches)[0] / 127.5 - 1)
            self.vae.quantizer.after_step(latents, codes, lambda tensor: tensor)
            return loss

        steps = train_for(seconds / 2, self.vae, vae_step, lr=1e-3)
        with torch.no_grad():
            encoded = [
                (self.vae(images / 127.5 - 1)[1], labels) for images, labels in train.batches(500)
            ]
        codes, labels = (torch.cat(parts) for parts in zip(*encoded, strict=True))
        tokens = torch.cat([self.prompt(labels.clamp(min=0)), codes.flatten(1)], 1)

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
            output = self.prior(inputs, past_key_values=cache, use_cache=use_cache)
            logits = output.logits[:, -1, : self.codebook_size].float()
            drawn = torch.multinomial(logits.softmax(-1), 1)
            tokens, cache = torch.cat([tokens, drawn], 1), output.past_key_values
            inputs = drawn if use_cache else tokens
        return self.vae.decode(tokens[:, 1:].unflatten(1, self.size))

    def parts(self) -> dict[str, nn.Module]:
        return {"vae": self.vae, "prior": self.prior}


# ---- ours ----------------------------------------------------------------------------------------


def train_ours(arguments: Arguments, pixels: dict[str, GridDataset], names: list[str]) -> Path:
    """A pipeline of the recipe in so many minutes: 70 % of them for the pixels, 20 % for
    the codes and 10 % for the prior."""
    recipe = yaml.safe_load(Path(arguments.config).read_text())
    folder = Path(arguments.output_dir) / "progressive_vae"
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision="bf16")
    num_levels, seconds = recipe["num_levels"], 60 * arguments.train_minutes
    run = Run(folder, accelerator, num_levels, pixels, names)
    classes = {"num_classes": len(names), "id2label": dict(enumerate(names)) or None}
    shares = {num_levels: 0.7, **{i: 0.2 / max(1, num_levels - 1) for i in range(1, num_levels)}}
    fields = ("codebook_size", "downsample", "hidden_size", "num_layers", "encoder_hidden_size",
              "pixel_logit_rank")  # fmt: skip

    def of_level(name: str, index: int):
        values = recipe[name]
        return values[index - 1] if len(values) > 1 else values[0]

    for index in range(num_levels, 0, -1):
        sizes = {name: of_level(name, index) for name in fields if name in recipe}
        is_finest = index == num_levels
        below = pixels["train"].manifest.shape[0] if is_finest else run.level(index + 1).config
        source = {"num_channels": below} if is_finest else {"num_symbols": below.codebook_size}
        told = classes if index in recipe.get("class_conditional_levels", []) else {}
        config = ProgressiveVAELevelConfig(**source, **sizes, **told)
        settings = FitSettings(
            train_batch_size=of_level("train_batch_size", index),
            learning_rate=of_level("learning_rate", index),
            adam_weight_decay=recipe.get("adam_weight_decay", 0.01),
            seed=arguments.seed,
        )
        train = run.grids("train", index + 1)
        steps = num_steps(
            ProgressiveVAELevel(config), train, settings, accelerator, seconds * shares[index]
        )
        train_level(run, index, config, _with_steps(settings, steps))
    train = run.grids("train", 1)
    config = ProgressiveVAEPriorConfig(
        codebook_size=run.level(1).config.codebook_size,
        grid_size=list(train.manifest.shape),
        **classes,
        backbone_config=dict(recipe["prior_config"]),
    )
    settings = FitSettings(
        train_batch_size=recipe["prior_train_batch_size"],
        learning_rate=recipe["prior_learning_rate"],
        adam_weight_decay=0.1,
        optimizer="adamw",
        seed=arguments.seed,
    )
    steps = num_steps(ProgressiveVAEPrior(config), train, settings, accelerator, 0.1 * seconds)
    prior = train_prior(run, config, _with_steps(settings, steps))
    levels = [run.level(i) for i in range(1, num_levels + 1)]
    pipe = ProgressiveVAEPipeline.from_levels(prior.eval(), levels, run.image_shape[1:])
    pipe.save_pretrained(folder / "pipeline")
    write_json(folder / "costs.json", run.phases())
    return folder


def num_steps(
    model: ProgressiveVAELevel | ProgressiveVAEPrior,
    train: GridDataset,
    settings: FitSettings,
    accelerator: Accelerator,
    seconds: float,
) -> int:
    """Steps that fit in so many seconds, from 30 of them."""

    def to_inputs(batch: dict) -> dict:
        if isinstance(model, ProgressiveVAEPrior):
            return {"codes": batch["grid"]}
        return {"finer": as_finer(batch["grid"], model)}

    if isinstance(model, ProgressiveVAELevel):
        initialize_codebook(model, train, settings.seed)
    trial = replace(settings, max_train_steps=40, validation_steps=10)
    identity = {"phase": "time"}
    times = [
        time.perf_counter() for _ in fit(model, train, to_inputs, accelerator, trial, identity)
    ]
    return max(1, round(30 * seconds / (times[-1] - times[0])))


def _with_steps(settings: FitSettings, steps: int) -> FitSettings:
    return replace(settings, max_train_steps=steps, validation_steps=steps)


# ---- figures -------------------------------------------------------------------------------------


def rate(call: Callable[[], object], count: int) -> float:
    """`count` things a second, from calls that make so many; the first is for warming up."""
    call()
    start, calls = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < TIMED_SECONDS or not calls:
        call()
        calls += 1
    return count * calls / passed


def matrix_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """Floating-point operations a second of large matrix products."""
    matrix = torch.randn(size, size, dtype=dtype)
    return rate(lambda: matrix @ matrix, 2 * size**3)


def operations(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@torch.no_grad()
def speeds_of(pipe: ProgressiveVAEPipeline, images: Tensor) -> dict[str, float]:
    """Images a second, by batch size and factor, and GFLOP an image."""
    assert pipe.prior is not None
    figures: dict[str, float] = {}
    codes = pipe.encode(images)
    for size in (1, len(images)):
        draw = {"num_images_per_prompt": size, "batch_size": size, "output_type": "pt"}
        figures[f"drawn, batch {size}"] = rate(partial(pipe, **draw), size)
        figures[f"prior, batch {size}"] = rate(partial(pipe.prior.sample, size), size)
        for i, (level, z) in enumerate(zip(pipe.levels, codes, strict=True), 1):
            figures[f"level_{i}, batch {size}"] = rate(partial(level.sample, z[:size]), size)
    figures["encoded"] = rate(lambda: pipe.encode(images), len(images))
    figures["GFLOP to draw an image"] = (
        operations(lambda: pipe(num_images_per_prompt=8, batch_size=8, output_type="pt")) / 8e9
    )
    figures["GFLOP to encode an image"] = operations(lambda: pipe.encode(images[:8])) / 8e9
    return figures


def training_operations(pipe: ProgressiveVAEPipeline, images: Tensor) -> dict[str, float]:
    """GFLOP of one image, forward and backward, for each level and the prior."""
    grids: list[Tensor] = [*pipe.encode(images), images / 127.5 - 1]
    figures = {}
    for name, model, grid in zip(
        pipe.factor_names, [pipe.prior, *pipe.levels], [grids[0], *grids[1:]], strict=True
    ):
        model.train().requires_grad_(True)
        count = operations(lambda model=model, grid=grid: model(grid).loss.backward())
        model.eval().requires_grad_(False)
        figures[name] = count / (1e9 * len(images))
    return figures


def distance(features: nn.Module, test: GridDataset, drawn: Iterator[Tensor]) -> float:
    real = (images / 255 for images, _ in test.batches(250))
    return frechet_distance(features, real, drawn)


def afternoon(
    arguments: Arguments, pixels: dict[str, GridDataset], names: list[str]
) -> tuple[Afternoon, dict[str, float]]:
    """Trained, or as it was saved."""
    folder = Path(arguments.output_dir) / "afternoon"
    channels, height, width = pixels["train"].manifest.shape
    model = Afternoon(channels, len(names), (height // 4, width // 4), arguments.seed)
    if (folder / "costs.json").is_file():
        for name, part in model.parts().items():
            part.load_state_dict(load_file(folder / f"{name}.safetensors"))
        return model, json.loads((folder / "costs.json").read_text())
    costs = model.fit(pixels["train"], 60 * arguments.train_minutes)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in model.parts().items():
        state = {key: value.contiguous().clone() for key, value in part.state_dict().items()}
        save_file(state, folder / f"{name}.safetensors")
    write_json(folder / "costs.json", costs)
    return model, costs


@torch.no_grad()
def measure_afternoon(
    arguments: Arguments, model: Afternoon, costs: dict, features: nn.Module, test: GridDataset
) -> dict[str, float]:
    torch.manual_seed(arguments.seed)
    labels = torch.arange(arguments.num_drawn) % model.num_classes
    drawn = (model.draw(part, use_cache=True) for part in labels.split(250))
    images = test.batch(slice(0, 250))[0] / 127.5 - 1
    return {
        "Fréchet distance": distance(features, test, drawn),
        "drawn, batch 1": rate(lambda: model.draw(labels[:1], False), 1),
        "drawn, batch 250": rate(lambda: model.draw(labels[:250], False), 250),
        "drawn with a key-value cache, batch 250": rate(
            lambda: model.draw(labels[:250], True), 250
        ),
        "encoded": rate(lambda: model.vae(images), 250),
        "GFLOP to draw an image": operations(lambda: model.draw(labels[:8], False)) / 8e9,
        **{f"trained on, {name}": value for name, value in costs.items()},
    }


def measure_ours(
    arguments: Arguments,
    pipe: ProgressiveVAEPipeline,
    costs: dict,
    features: nn.Module,
    test: GridDataset,
) -> dict[str, float]:
    images = test.batch(slice(0, 250))[0].to(torch.uint8)
    drawn = (x / 255 for x, _ in draw_labelled(pipe, arguments.num_drawn, arguments.seed))
    figures = {"Fréchet distance": distance(features, test, drawn), **speeds_of(pipe, images)}
    gflop = training_operations(pipe, images[:8])
    for phase, cost in costs.items():
        if phase in gflop:
            figures[f"trained on, {phase}"] = cost["images_per_second"]
            share = gflop[phase] * 1e9 * cost["images_per_second"] / matrix_rate(torch.bfloat16)
            figures[f"share of the rate of bf16 products, training {phase}"] = share
    share = figures["GFLOP to draw an image"] * 1e9 * figures["drawn, batch 250"]
    figures["share of the rate of fp32 products, drawing"] = share / matrix_rate(torch.float32)
    return figures


def table(columns: dict[str, dict[str, float]]) -> str:
    rows = list(dict.fromkeys(name for column in columns.values() for name in column))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = [f"{column[row]:.4g}" if row in column else "" for column in columns.values()]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(words: list[str]):
    arguments = HfArgumentParser(
        Arguments, description="Quality and speed for the same training time."
    ).parse_args_into_dataclasses(words, look_for_args_file=False)[0]
    output_dir = Path(arguments.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    pixels, names = cache_images(arguments)
    path = output_dir / "cache" / "classifier.safetensors"
    classifier = cached_classifier(path, pixels["train"], 4000, arguments.seed)
    features, test = ClassifierFeatures(classifier), pixels["test"]
    folder = output_dir / "progressive_vae"
    if not (folder / "costs.json").is_file():
        train_ours(arguments, pixels, names)
    costs = json.loads((folder / "costs.json").read_text())
    minutes = f"{arguments.train_minutes:g} minutes"
    flat, flat_costs = afternoon(arguments, pixels, names)
    some = pixels["train"].batch(slice(0, arguments.num_drawn))[0] / 255
    columns = {
        f"progressive VAE, {minutes}": measure_ours(
            arguments, _pipeline(folder / "pipeline"), costs, features, test
        ),
        f"afternoon VQ-VAE, {minutes}": measure_afternoon(
            arguments, flat, flat_costs, features, test
        ),
        f"{len(some)} training images": {
            "Fréchet distance": distance(features, test, iter(some.split(250)))
        },
    }
    if arguments.model is not None:
        pipe = _pipeline(arguments.model)
        columns[Path(arguments.model).name] = measure_ours(arguments, pipe, {}, features, test)
    text = (
        f"{table(columns)}\n\n{torch.get_num_threads()} threads, torch {torch.__version__}, seed "
        f"{arguments.seed}; distances of {arguments.num_drawn} images to the test split, in the "
        "features of a small classifier; images/s where no unit is named; "
        f"products of large matrices: {matrix_rate(torch.bfloat16) / 1e9:.0f} GFLOP/s in bf16, "
        f"{matrix_rate(torch.float32) / 1e9:.0f} in fp32\n"
    )
    (output_dir / "benchmark.md").write_text(text)
    write_json(output_dir / "benchmark.json", columns)
    print(text)


def _pipeline(folder: str | Path) -> ProgressiveVAEPipeline:
    pipe = ProgressiveVAEPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


if __name__ == "__main__":
    main(sys.argv[1:])
