"""The scripts that sample and evaluate, on a pipeline that examples/train.py has written."""

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from helpers.models import tiny_level, tiny_prior
from helpers.recipes import SMALL
from helpers.scripts import load_script
from progressive_vae import ProgressiveVAEPipeline
from progressive_vae.evaluation import throughput as speed
from progressive_vae.evaluation.image_metrics import precision_recall
from progressive_vae.evaluation.likelihood import rate_distortion
from progressive_vae.hub.repository import weights_digest
from progressive_vae.training.muon import has_bf16


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("digits")
    flags = ["--report_to", "none", "--max_train_samples", "200", "--max_eval_samples", "50"]
    load_script("train").main([*SMALL, *flags, "--output_dir", str(output_dir)])
    return output_dir


def write_colored(folder: Path, count: int):
    """Red and blue images of 16×16 in a folder for each class, for training and for testing."""
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for channel, name in ((0, "red"), (2, "blue")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(100, size=(16, 16, 3))
                pixels[..., channel] += 150
                image = PIL.Image.fromarray(pixels.astype(np.uint8))
                image.save(folder / split / name / f"{i}.png")


def test_sample_writes_a_row_for_each_class(trained, tmp_path, capsys):
    script, path = load_script("sample"), tmp_path / "samples.png"
    flags = ["--model", str(trained), "--output", str(path), "--num_images_per_prompt", "3"]
    script.main(flags)
    grid = PIL.Image.open(path)
    assert "sampled 30 images" in capsys.readouterr().out
    script.main([*flags, "--class_labels", "3", "8", "--guidance_scale", "1.5"])
    two = PIL.Image.open(path)
    assert two.width == grid.width and two.height * 5 == grid.height


def test_edit_writes_a_row_for_each_edit(trained, tmp_path, capsys):
    script, path = load_script("edit"), tmp_path / "edited.png"
    flags = ["--output", str(path), "--num_candidates", "4", "--num_images"]
    script.main(["--model", str(trained), *flags, "4"])
    assert "sampled 10 rows of 4" in capsys.readouterr().out  # two rows are interpolations
    size = PIL.Image.open(path).size
    assert size[1] == 3 * size[0]  # twelve rows
    with pytest.raises(ValueError, match="num_images >= 4, got 3"):
        script.main(["--model", str(trained), *flags, "3"])
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(5):
        PIL.Image.new("L", (8, 8), 50 * i).save(folder / f"{i}.png")
    counts = ["--num_candidates", "4", "2", "1"]
    script.main(["--model", str(trained), "--images", str(folder), *flags, "9", *counts])
    assert "sampled 10 rows of 5" in capsys.readouterr().out


def test_evaluate_writes_every_metric(trained, tmp_path):
    script = load_script("evaluate")
    flags = ["--model", str(trained), "--dataset_name", "digits", "--output_dir", str(tmp_path)]
    flags += ["--max_eval_samples", "50", "--num_drawn", "50", "--classifier_steps", "10"]
    flags += ["--num_drawn_to_learn_from", "60", "--num_images_of_curve", "10"]
    script.main(flags)
    first = json.loads((tmp_path / "evaluation.json").read_text())
    bits = first["bits_per_dim"]
    assert set(bits) == {"prior", "level_1", "level_2", "total"} and first["num_images"] == 50
    assert list(first["distances"])[1:] == [
        "reconstructions from z_2",
        "reconstructions from z_1",
        "samples",
    ]
    assert first["sampling"] is None
    for row in first["distances"].values():
        assert len(row["sliced_wasserstein"]) == 1 and row["sliced_wasserstein"][0] > 0  # 8×8
        assert row["frechet_distance"] >= 0 and 0 <= row["precision"] <= 1 >= row["recall"] >= 0
    curve = first["rate_distortion"]
    assert 0 < curve["level_1"]["bits_per_dim"] < curve["level_2"]["bits_per_dim"] < bits["total"]
    for row in curve.values():
        assert row["mse_of_mean"] <= row["mse"]
    assert {"JPEG", "WebP"} <= set(first["curves"])
    score = first["accuracy_of"]["samples"]["classification accuracy score, 60 samples"]
    assert 0 <= score <= 1
    assert first["lossless_files"]["WebP files of 10 images"] > bits["total"]  # headers are long
    assert PIL.Image.open(tmp_path / "rate_distortion.png").width > 500
    assert f"{bits['total']:.4f}" in (tmp_path / "evaluation.md").read_text()
    script.main(flags)  # from caches, with the same results
    assert json.loads((tmp_path / "evaluation.json").read_text()) == first
    script.main([*flags, "--features", "none"])
    without = json.loads((tmp_path / "evaluation.json").read_text())
    assert without["bits_per_dim"] == bits and "accuracy" not in without
    for name, row in without["distances"].items():
        assert row == {"sliced_wasserstein": first["distances"][name]["sliced_wasserstein"]}
    with pytest.raises(ValueError, match="features to be 'classifier', 'inception' or"):
        script.main([*flags, "--features", "x"])


def test_evaluate_tunes_sampling(trained, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(trained, model)
    script = load_script("evaluate")
    flags = ["--model", str(model), "--dataset_name", "digits", "--output_dir"]
    flags += [str(tmp_path / "out"), "--max_eval_samples", "20", "--num_drawn", "20"]
    flags += ["--classifier_steps", "2", "--num_drawn_to_learn_from", "20"]
    flags += ["--num_images_of_curve", "2", "--tune_sampling", "--num_tuning_samples", "20"]
    script.main([*flags, "--num_tuning_evaluations", "4"])
    settings = json.loads((model / "model_index.json").read_text())["sampling"]
    pipe = ProgressiveVAEPipeline.from_pretrained(model)
    assert pipe.config.sampling == settings
    assert set(settings) == {"temperature", "guidance_scale"}
    # Metrics are those of the exact distribution and of the settings.
    metrics = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert list(metrics["distances"])[-2:] == ["samples", "samples by the sampling settings"]
    tuning = json.loads((model / "metrics.json").read_text())["sampling"]
    assert tuning["settings"] == settings and "among 4 settings" in tuning["explanation"]
    rows = {"Fréchet distance", "precision", "recall", "accuracy on samples"}
    rows |= {"distance of patches, scale 1", "classification accuracy score, 20 samples"}
    for title in ("exact distribution", "these settings"):
        assert set(tuning["held_out"][title]) == rows
    card = (model / "README.md").read_text()
    assert "| `temperature` |" in card and "| exact distribution | these settings |" in card
    # The settings stay with the weights that they were chosen for.
    resumed = ["--report_to", "none", "--max_train_samples", "200", "--max_eval_samples", "50"]
    words = [*SMALL, *resumed, "--output_dir", str(model)]
    load_script("train").main([*words, "--resume_from_checkpoint", "latest"])
    assert json.loads((model / "model_index.json").read_text())["sampling"] == settings
    load_script("train").main([*words, "--phase", "prior", "--prior.fit.max_train_steps", "2"])
    load_script("train").main([*words, "--phase", "evaluate"])
    assert json.loads((model / "model_index.json").read_text())["sampling"] is None
    with pytest.raises(ValueError, match="expected model to be the folder of a pipeline"):
        script.main(["--model", "you/photos", "--tune_sampling"])


def test_halve_stores_fp16_weights(trained, tmp_path, images):
    script = load_script("convert_to_fp16", "conversion")
    script.main([str(trained), str(tmp_path)])
    whole, half = (ProgressiveVAEPipeline.from_pretrained(path) for path in (trained, tmp_path))
    for name in whole.factor_names:
        sizes = [(path / name / "model.safetensors").stat().st_size for path in (trained, tmp_path)]
        assert sizes[1] < 0.7 * sizes[0]  # names and shapes are not halved
        assert {p.dtype for p in getattr(half, name).parameters()} == {torch.float32}
    digits = images[:, :1, :5, :5].repeat(1, 1, 2, 2)[..., :8, :8]
    assert half.bits_per_dim(digits) == pytest.approx(whole.bits_per_dim(digits), rel=1e-2)
    with pytest.raises(ValueError, match="expected target to be another folder"):
        script.main([str(tmp_path), str(tmp_path)])
    with torch.no_grad():
        whole.level_1.decoder.stem.bias[0] = 1e6
    whole.save_pretrained(tmp_path / "large")
    with pytest.raises(ValueError, match="below 65504, got larger ones in level_1.decoder.stem"):
        script.main([str(tmp_path / "large"), str(tmp_path / "target")])


def test_precision_and_recall():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(300, 2, generator=generator)
    same = precision_recall(real, torch.randn(300, 2, generator=generator))
    assert same["precision"] > 0.85 and same["recall"] > 0.85
    narrow = precision_recall(real, 0.05 * torch.randn(300, 2, generator=generator))
    assert narrow["precision"] > 0.9 and narrow["recall"] < 0.2
    distant = precision_recall(real, real + 100)
    assert distant == {"precision": 0.0, "recall": 0.0}


def test_the_rate_of_a_level_is_the_sum_of_the_coarser_factors(pipe, images):
    curve = rate_distortion(pipe, images, num_samples=2)
    bits = pipe.bits_per_dim(images)
    rate = 0.0
    for k, factor in enumerate(("prior", "level_1", "level_2"), 1):
        rate += bits[factor]
        assert curve[f"level_{k}"]["bits_per_dim"] == pytest.approx(rate, rel=1e-4)
        assert curve[f"level_{k}"]["psnr"] <= curve[f"level_{k}"]["psnr_of_mean"]
        assert not {"ssim", "psnr_of_preview"} & set(curve[f"level_{k}"])  # no room, and none


def test_evaluate_compares_previews_with_image_files(tmp_path):
    model, out, colored = tmp_path / "model", tmp_path / "out", tmp_path / "colored"
    write_colored(colored, 8)
    levels = [tiny_level(num_symbols=3, seed=1, auxiliary_hidden_size=8, num_classes=2),
              tiny_level(num_channels=3, seed=2, auxiliary_hidden_size=8)]  # fmt: skip
    pipe = ProgressiveVAEPipeline.from_levels(tiny_prior(grid_size=[4, 4]), levels)
    pipe.save_pretrained(model)
    flags = ["--model", str(model), "--train_data_dir", str(colored), "--output_dir", str(out)]
    flags += ["--num_drawn", "8", "--num_drawn_to_learn_from", "0", "--classifier_steps", "2"]
    load_script("evaluate").main(flags)
    metrics = json.loads((out / "evaluation.json").read_text())
    assert "the same, on previews from z_2" in metrics["accuracy"]
    row, curve = metrics["beside_files"]["level_2"], metrics["rate_distortion"]["level_2"]
    assert row["codes"]["bytes"] == pytest.approx(curve["bits_per_dim"] * 16 * 16 * 3 / 8)
    text = (out / "evaluation.md").read_text()
    assert "| bytes, PSNR of | the preview | JPEG | WebP |" in text
    assert f"| z_1 … z_2 | {row['codes']['bytes']:.1f}, {curve['psnr_of_preview']:.2f} | " in text


@pytest.mark.slow
def test_benchmark_of_color_images_and_auxiliary_decoders(tmp_path, monkeypatch):
    recipe, colored, out = tmp_path / "recipe.yaml", tmp_path / "colored", tmp_path / "out"
    write_colored(colored, 20)
    recipe.write_text(
        "levels: {codebook_size: 8, hidden_size: 8, num_layers: 1, auxiliary_hidden_size: 8, "
        "encoder_fit: {train_batch_size: 8}, fit: {train_batch_size: 8}}\n"
        "level_1: {class_conditional: true}\n"
        "level_2: {downsample: 4, num_groups: 7, pixel_distribution: logistic_mixture}\n"
        "prior: {backbone_config: {model_type: llama, hidden_size: 16, intermediate_size: 16, "
        "num_hidden_layers: 1, num_attention_heads: 2}}\n"
        "run: {mixed_precision: bf16}\n"
    )
    script = load_script("benchmark")
    monkeypatch.setattr(speed, "TIMED_SECONDS", 0.02)
    flags = ["--config", str(recipe), "--train_data_dir", str(colored), "--output_dir", str(out)]
    flags += ["--train_minutes", "0.02", "--num_drawn", "40", "--num_drawn_to_learn_from", "20"]
    script.main([*flags, "--classifier_steps", "3"])
    metrics = json.loads((out / "benchmark.json").read_text())
    ours, theirs, real, previews = metrics.values()
    name = "bf16" if has_bf16(torch.device("cpu")) else "fp32"
    for phase in ("encoder_2", "encoder_1", "decoder_2", "decoder_1", "prior"):
        assert 0 < ours[f"share of {name} matrix FLOP/s, training {phase}"] < 1
    assert list(metrics)[3] == "its previews" and previews["sampled, batch 1"] > 0
    for each in (ours, theirs, previews):
        assert 0 <= each["accuracy on samples"] <= 1
        assert 0 <= each["accuracy on test images, trained on 20 samples"] <= 1
        assert each["distance of patches, scale 1"] > real["distance of patches, scale 1"] > 0
    picture = PIL.Image.open(out / "samples.png")  # two classes: of each six images of three kinds
    assert picture.mode == "RGB" and picture.width == 9 * picture.height
    assert f"trained in {name}" in (out / "benchmark.md").read_text()


def test_benchmark_compares_with_the_baseline(tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "levels: {codebook_size: 8, hidden_size: 8, num_layers: 1}\n"
        "level_1: {num_groups: 4, class_conditional: true}\n"
        "level_2: {num_groups: 7}\n"
        "prior: {backbone_config: {model_type: llama, hidden_size: 16, intermediate_size: 16, "
        "num_hidden_layers: 1, num_attention_heads: 2}}\n"
        "data: {dataset_name: digits, max_train_samples: 400, max_eval_samples: 100}\n"
    )
    script, output_dir = load_script("benchmark"), tmp_path / "out"
    monkeypatch.setattr(speed, "TIMED_SECONDS", 0.02)
    flags = ["--train_minutes", "0.02", "--num_drawn", "60", "--num_drawn_to_learn_from", "0"]
    flags += ["--classifier_steps", "100"]
    flags += ["--config", str(recipe), "--output_dir", str(output_dir)]
    script.main(flags)
    ours, theirs, real = json.loads((output_dir / "benchmark.json").read_text()).values()
    assert 0 < real["Fréchet distance"] < min(x["Fréchet distance"] for x in (ours, theirs))
    assert {"level_1, batch 100", "prior, batch 1", "encoded"} <= set(ours)
    assert 0 < ours["share of fp32 matrix FLOP/s, training level_2"] < 1
    pipe = ProgressiveVAEPipeline.from_pretrained(output_dir / "progressive_vae")
    assert pipe.level_2.config.num_groups == 7 and pipe.level_1.config.num_classes == 10
    weights = (output_dir / "baseline" / "vae.safetensors").read_bytes()
    script.main([*flags, "--model", str(output_dir / "progressive_vae")])  # nothing is trained
    assert (output_dir / "baseline" / "vae.safetensors").read_bytes() == weights
    assert "| progressive_vae |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="expected models of .*'seed': 1"):
        script.main([*flags, "--seed", "1"])
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(20):
        PIL.Image.new("L", (8, 8), i).save(pictures / f"{i}.png")
    flags += ["--train_data_dir", str(pictures), "--output_dir", str(tmp_path / "unlabeled")]
    with pytest.raises(ValueError, match="expected a dataset with labels"):
        script.main(flags)


def test_the_fashion_mnist_model(tmp_path, monkeypatch, capsys):
    folder = Path(__file__).parents[1] / "examples" / "fashion_mnist"
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) < 4e6
    monkeypatch.chdir(tmp_path)
    load_script("sample").main(["--num_images_per_prompt", "2"])
    assert "sampled 20 images" in capsys.readouterr().out
    assert PIL.Image.open("samples.png").height > PIL.Image.open("samples.png").width
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["weights"] == weights_digest(folder)  # of these weights
    card = (folder / "README.md").read_text()
    assert f"{metrics['bits_per_dim']['total']:.4f}" in card
    codes = ProgressiveVAEPipeline.from_pretrained(folder).encode(
        PIL.Image.open("samples.png").convert("L").crop((0, 0, 28, 28))
    )
    assert [z.shape for z in codes] == [(1, 2, 2), (1, 7, 7)]
