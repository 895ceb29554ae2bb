"""Training through `examples/train.py`, at tiny size."""

import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import yaml

from helpers.recipes import SHORT, SMALL, SMALLER
from helpers.scripts import load_script
from progressive_vae import ProgressiveVAELevel, ProgressiveVAEPipeline
from progressive_vae.data.code_cache import GridDataset
from progressive_vae.data.source import open_dataset
from progressive_vae.models.fingerprint import fingerprint
from progressive_vae.training.args import FitSettings, RunSettings
from progressive_vae.training.fit import Fit

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def trained(script, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("digits")
    script.main([*SMALLER, "--report_to", "tensorboard", "--output_dir", str(output_dir)])
    return output_dir


def test_files_of_a_run(trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    bits = metrics["bits_per_dim"]
    assert list(bits) == ["prior", "level_1", "level_2", "total"]
    assert bits["total"] == pytest.approx(sum(v for k, v in bits.items() if k != "total"))
    assert 0 < bits["level_2"] < 8  # uniform pixels cost 8 bits
    assert metrics["num_images"] == 40 and metrics["codes"]["level_2"]["codebook_size"] == 8
    assert {"level_2", "encode_train_2", "level_1", "prior"} <= set(metrics["phases"])
    for name in ("samples.png", "reconstructions.png"):
        assert PIL.Image.open(trained / name).width > 56
    for phase in ("level_2", "level_1", "prior"):
        names = sorted(p.name for p in (trained / "validation" / phase).iterdir())
        assert names == ["step-000004.png", "step-000006.png"]
    assert any((trained / "logs").rglob("events*"))
    card = (trained / "README.md").read_text()
    assert f"{bits['total']:.4f}" in card and "model-index" in card


def test_metrics_are_those_of_the_saved_pipeline(trained, script):
    pipe = ProgressiveVAEPipeline.from_pretrained(trained)
    test = GridDataset(trained / "cache" / "pixels" / "test")
    bits = pipe.bits_per_dim(test.batch(slice(0, 40))[0].to(torch.uint8))
    metrics = json.loads((trained / "metrics.json").read_text())
    assert bits["total"] == pytest.approx(metrics["bits_per_dim"]["total"], rel=1e-4)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(["3"]).images[0].size == (8, 8)


def test_cached_codes_are_those_of_the_pipeline(trained, script):
    pipe = ProgressiveVAEPipeline.from_pretrained(trained)
    cache = trained / "cache"
    pixels = GridDataset(cache / "pixels" / "train").batch(slice(0, 200))[0]
    for i, codes in enumerate(pipe.encode(pixels.to(torch.uint8)), 1):
        cached = GridDataset(cache / f"level_{i}" / "train").batch(slice(0, 200))[0]
        assert torch.equal(codes, cached)


def test_one_phase_again(trained, script, tmp_path):
    output_dir = tmp_path / "again"
    shutil.copytree(trained, output_dir)
    flags = [*SMALLER, "--output_dir", str(output_dir)]
    before = (output_dir / "level_1" / "model.safetensors").read_bytes()
    script.main([*flags, "--phase", "prior", "--prior.fit.max_train_steps", "2"])
    assert (output_dir / "level_1" / "model.safetensors").read_bytes() == before
    script.main([*flags, "--phase", "level_2", "--seed", "1"])
    with pytest.raises(ValueError, match="expected seed=1, with which .*pass --seed 1"):
        script.main([*flags, "--phase", "level_1"])
    flags += ["--seed", "1"]
    for phase in ("prior", "evaluate"):
        with pytest.raises(ValueError, match="level_1.*expected.*weights"):
            script.main([*flags, "--phase", phase])
    for phase in ("level_1", "prior", "evaluate"):
        script.main([*flags, "--phase", phase])
    recipe = yaml.safe_load((output_dir / "recipe.yaml").read_text())
    assert recipe["run"]["seed"] == 1 and recipe["prior"]["fit"]["max_train_steps"] == 6
    with pytest.raises(ValueError, match="run its phase first"):
        script.main([*SMALL, "--output_dir", str(tmp_path / "empty"), "--phase", "level_1"])
    with pytest.raises(ValueError, match="expected phase among"):
        script.main([*flags, "--phase", "level_3"])


def test_resuming_a_finished_run_keeps_its_metrics(trained, script, tmp_path, monkeypatch):
    output_dir = tmp_path / "again"
    shutil.copytree(trained, output_dir)
    module = importlib.import_module("progressive_vae.training.train")  # not the function
    monkeypatch.setattr(module, "evaluate_and_save", lambda *_: None)
    flags = [*SMALLER, "--output_dir", str(output_dir), "--resume_from_checkpoint", "latest"]
    script.main(flags)
    for name in ("metrics.json", "samples.png"):
        assert (output_dir / name).read_bytes() == (trained / name).read_bytes()


def test_a_refit_changes_nothing_coarser(trained, script, tmp_path):
    output_dir = tmp_path / "refit"
    shutil.copytree(trained, output_dir)
    unchanged = [*output_dir.rglob("cache/*/*/*")]
    unchanged += [output_dir / name / "model.safetensors" for name in ("level_1", "prior")]
    contents = [path.read_bytes() for path in unchanged]
    before = fingerprint([ProgressiveVAELevel.from_pretrained(output_dir / "level_2")])
    flags = [*SMALLER, "--output_dir", str(output_dir)]
    refit = (
        "--phase refit_level_2 --level_2.refit.fit.max_train_steps 3 --level_2.refit.code_noise 0.1"
    )
    script.main([*flags, *refit.split(), "--level_2.refit.hidden_size", "16"])
    level = ProgressiveVAELevel.from_pretrained(output_dir / "level_2")
    assert level.config.hidden_size == 16 and level.config.code_noise == 0.1
    assert level.config.encoder_hidden_size == 8 and fingerprint([level]) == before
    assert [path.read_bytes() for path in unchanged] == contents
    script.main([*flags, "--phase", "evaluate"])  # nothing is stale
    phases = json.loads((output_dir / "metrics.json").read_text())["phases"]
    assert phases["refit_level_2"]["validation_bits_per_dim"] > 0
    with pytest.raises(ValueError, match="got 'refit_level_1'; a refit needs its section"):
        script.main([*flags, "--phase", "refit_level_1"])
    recipe = json.loads((output_dir / "metrics.json").read_text())["recipe"]
    assert recipe["level_2"]["refit"]["hidden_size"] == 16 and recipe["level_2"]["hidden_size"] == 8
    wrong = ["--level_2.refit.decoder_type", "causal_lm", "--overwrite_output_dir"]
    with pytest.raises(ValueError, match="decoder_type in"):
        script.main([*flags, *wrong])


def test_a_transformer_over_blocks_of_binary_codes(script, tmp_path):
    flags = (
        "--level_2.quantizer lfq --levels.codebook_size 64 --level_1.decoder_type transformer "
        "--level_1.bits_per_block 3 --gradient_checkpointing true"
    )
    script.main([*SMALLER, *shlex.split(flags), "--output_dir", str(tmp_path)])
    pipe = ProgressiveVAEPipeline.from_pretrained(tmp_path)
    assert pipe.level_1.config.bits_per_block == 3 and pipe.level_1.config.num_symbols == 64
    bits = json.loads((tmp_path / "metrics.json").read_text())["bits_per_dim"]
    assert 0 < bits["level_1"] < 6.5 * 16 / 64  # 16 codes of 6 bits, 64 pixels


@pytest.mark.parametrize(
    "flags",
    [
        "--level_1.decoder_type causal_lm --level_2.ordering masked --level_2.num_groups 3 "
        "--level_1.quantizer gumbel --level_2.quantizer fsq --level_2.class_conditional false",
        "--level_1.ordering factorized --level_1.quantizer fsq --level_2.quantizer gumbel "
        "--level_1.refit.fit.max_train_steps 2 --level_1.refit.decoder_type causal_lm "
        "--level_1.refit.code_noise 0.1 --level_1.refit.code_noise_kind random",
    ],
)
def test_decoder_orders_and_quantizers(script, tmp_path, flags):
    script.main([*SMALLER, *shlex.split(flags), "--output_dir", str(tmp_path)])
    pipe = ProgressiveVAEPipeline.from_pretrained(tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    bits = metrics["bits_per_dim_of_drawn_codes"]
    assert list(bits) == ["prior", "level_1", "level_2", "encoders", "total"]
    assert bits["encoders"] <= 0 < bits["total"]
    assert {level.config.quantizer for level in pipe.levels} == {"fsq", "gumbel"}
    pipe.set_progress_bar_config(disable=True)
    is_refitted = "refit" in flags
    assert pipe(["3"], guidance_scale=[1.5, 2.0, 1.0]).images[0].size == (8, 8)
    assert pipe.level_1.config.ordering == "raster"  # from the first fit, or from the refit
    assert pipe.level_1.config.code_noise == (0.1 if is_refitted else 0.0)
    assert ("refit_level_1" in metrics["phases"]) == is_refitted
    assert pipe.level_2.config.num_classes == (10 if is_refitted else 0)


def test_commands_of_the_docstring_parse(script):
    documented = re.findall(
        r"^    (accelerate launch .*?)\n        \w", script.__doc__, re.M | re.S
    )
    assert len(documented) == 3
    for command in documented:
        words = shlex.split(command.replace("\\\n", " "))
        flags = words[words.index("examples/train.py") + 1 :]
        if "--config" in flags:
            flags[flags.index("--config") + 1] = str(ROOT / flags[flags.index("--config") + 1])
        script.parse(flags)


def test_recipe_of_fashion_mnist_on_a_local_data_set(script, tmp_path):
    """At tiny size, on parquet files in the schema of the Hub's."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["shirt", "shoe"])}
    )
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for split, count in (("train", 60), ("test", 30)):
        images = [PIL.Image.fromarray(x) for x in rng.integers(0, 256, (count, 28, 28), np.uint8)]
        rows = {"image": images, "label": rng.integers(0, 2, count).tolist()}
        table = datasets.Dataset.from_dict(rows, features)
        table.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    recipe = ["--config", str(ROOT / "examples/configs/fashion_mnist.yaml")]
    refit = shlex.split("--level_1.refit.num_layers 1 --level_1.refit.fit.max_train_steps 2")
    flags = [*recipe, *SMALL, *SHORT, *refit, "--report_to", "none"]
    by_name = [*flags, "--dataset_name", str(tmp_path / "data")]
    script.main([*by_name, "--output_dir", str(tmp_path / "run")])
    pipe = ProgressiveVAEPipeline.from_pretrained(tmp_path / "run")
    assert pipe.grid_sizes == [(2, 2), (7, 7), (28, 28)]
    assert pipe.labels == {"shirt": 0, "shoe": 1}
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["num_images"] == 30
    by_folder = [*flags, "--train_data_dir", str(tmp_path / "data")]
    first, second = (
        open_dataset(script.parse(words)[0].data).manifests for words in (by_name, by_folder)
    )
    assert first == second


def test_a_folder_of_color_images(script, tmp_path, monkeypatch, capsys):
    """A run prints places of phases, time left, next commands."""
    recipe = ["--config", str(ROOT / "examples/configs/color_64.yaml")]
    data = "--train_data_dir photos --resolution 16 --center_crop".split()
    monkeypatch.chdir(tmp_path)
    folder = Path("photos")
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(20):
        height, width = rng.integers(70, 100, 2)
        pixels = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).resize((int(width), int(height))).save(folder / f"{i}.png")
    flags = [*recipe, *data, *SMALL, *SHORT, "--report_to", "none"]
    script.main([*flags, "--max_train_minutes", "0.02"])
    output = capsys.readouterr()
    assert "encoder_3 (1 of 7)" in output.err and "prior (7 of 7)" in output.err
    assert re.search(r"left='?\d+( of \d+)? min", output.err)
    done = "encoder_3 (1 of 7) is done; validation images: runs/color_64/validation/encoder_3"
    assert done in output.out
    after = output.out.partition("next: ")[2].strip().splitlines()
    scripts = [f"examples/{name}.py" for name in ("sample", "evaluate", "compress")]
    assert [shlex.split(line)[1] for line in after] == [*scripts, "upload"]
    words = shlex.split(after[1])[2:]
    assert words[2:] == data  # without flags of the training images
    load_script("evaluate").main([*words, *"--features none --num_drawn 4".split()])
    output_dir = Path("runs/color_64")  # the recipe's
    pipe = ProgressiveVAEPipeline.from_pretrained(output_dir)
    assert pipe.level_3.config.pixel_distribution == "guided_logistic_mixture"
    assert pipe.num_levels == 3 and pipe.image_shape == (3, 16, 16)


def test_images_of_several_sizes_are_not_resized_silently(script, tmp_path):
    for i, side in enumerate((8, 8, 8, 9)):
        PIL.Image.new("RGB", (side, 8)).save(tmp_path / f"{i}.png")
    flags = ["--train_data_dir", str(tmp_path), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="all images of .*--resolution"):
        script.main([*SMALL, *flags])


def test_recipes_of_the_examples(script):
    recipe, arguments = script.parse([])  # the embedded default
    assert recipe.data.dataset_name == "digits" and recipe.run.output_dir == "runs/digits"
    assert arguments == {"resume_from_checkpoint": None}
    assert script.parse(["--dataset_name", "x"])[0].data.dataset_name == "x"
    assert script.parse(["--train_data_dir", "x"])[0].data.dataset_name is None
    for path in (ROOT / "examples" / "configs").glob("*.yaml"):
        recipe, _ = script.parse(["--config", str(path)])
        fits = [fit for level in recipe.levels for fit in (level.encoder_fit, level.fit)]
        fits += [level.refit.fit for level in recipe.levels if level.refit is not None]
        shares = [fit.time_share for fit in [*fits, recipe.prior.fit] if fit is not None]
        assert sum(shares) == pytest.approx(1)
        assert yaml.safe_load(path.read_text())["run"]["output_dir"] == f"runs/{path.stem}"


def test_extend_a_pipeline_by_a_coarser_level(trained, script, tmp_path):
    before = {p: p.read_bytes() for p in sorted(trained.glob("*/model.safetensors"))}
    script.main([*SMALLER, "--extend", str(trained), "--output_dir", str(tmp_path)])
    assert before == {p: p.read_bytes() for p in before}
    pipe, old = (ProgressiveVAEPipeline.from_pretrained(folder) for folder in (tmp_path, trained))
    assert pipe.num_levels == 3 and pipe.grid_sizes[1:] == old.grid_sizes
    for level, copy in ((old.level_1, pipe.level_2), (old.level_2, pipe.level_3)):
        for name, value in level.state_dict().items():
            assert torch.equal(value, copy.state_dict()[name])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    old_bits = json.loads((trained / "metrics.json").read_text())["bits_per_dim"]
    assert metrics["bits_per_dim"]["level_3"] == pytest.approx(old_bits["level_2"], rel=1e-5)
    assert "level_2" not in metrics["phases"] and "level_1" in metrics["phases"]
    with pytest.raises(ValueError, match="expected extend to be the folder of a saved pipeline"):
        script.main([*SMALL, "--extend", str(tmp_path / "none"), "--output_dir", str(tmp_path)])


def test_train_on_top_of_a_pretrained_level(trained, script, tmp_path):
    pretrained = trained / "level_2"
    flags = [*SMALLER, "--finest_level", str(pretrained), "--output_dir", str(tmp_path)]
    script.main([*flags, "--level_1.codebook_size", "4", "--level_2.codebook_size", "99"])
    pipe = ProgressiveVAEPipeline.from_pretrained(tmp_path)
    assert pipe.level_2.config.codebook_size == pipe.level_1.config.num_symbols == 8
    assert pipe.level_1.config.codebook_size == 4
    level = ProgressiveVAELevel.from_pretrained(pretrained)
    assert fingerprint([pipe.level_2]) == fingerprint([level])
    with pytest.raises(ValueError, match="expected a saved level in"):
        script.main([*SMALL, "--finest_level", str(tmp_path), "--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match="an output_dir other than that of"):
        script.main([*flags, "--output_dir", str(trained)])


def test_fit_lowers_the_loss_and_ends_with_averaged_weights(trained, script):
    from accelerate import Accelerator

    data = GridDataset(trained / "cache" / "pixels" / "train")
    level = ProgressiveVAELevel.from_pretrained(trained / "level_2")
    pixels = data.batch(slice(0, 200))[0] / 127.5 - 1
    before = level(pixels).loss.item()
    losses = []
    settings = FitSettings(max_train_steps=30, lr_warmup_steps=2)
    run = RunSettings(validation_steps=10, seed=20240101)
    identity = {"phase": "x"}

    def to_inputs(batch):
        return {"finer": batch["grid"] / 127.5 - 1}

    for progress in Fit(level, data, to_inputs, Accelerator(), settings, identity, run=run):
        assert not level.training
        losses.append((progress.step, level(pixels).loss.item()))
    assert [step for step, _ in losses] == [10, 20, 30]
    assert level(pixels).loss.item() == losses[-1][1] < before


def test_an_infinite_loss_stops_the_phase(script, tmp_path):
    flags = [*SMALLER, "--output_dir", str(tmp_path), "--levels.fit.max_train_steps", "30"]
    flags += shlex.split("--levels.fit.learning_rate 1e30 --levels.fit.max_grad_norm null")
    flags += shlex.split("--levels.fit.lr_warmup_steps 0")
    with pytest.raises(FloatingPointError, match="of level_2 became .*at step .*checkpoint"):
        script.main([*flags, "--checkpointing_steps", "1"])
    assert not (tmp_path / "level_2").exists()
