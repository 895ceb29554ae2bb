"""The small experiments of examples/ablations.py, at tiny size."""

import numpy as np
import PIL.Image
import pytest
import yaml

from helpers.models import tiny_level, tiny_prior
from helpers.scripts import load_script
from progressive_vae import ProgressiveVAEPipeline
from progressive_vae.evaluation import throughput

SIZE = 16


@pytest.fixture
def script():
    return load_script("ablations")


@pytest.fixture
def photos(tmp_path):
    """A folder of color images."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        (tmp_path / "photos" / split).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(tmp_path / "photos" / split / f"{i}.png")
    return str(tmp_path / "photos")


@pytest.mark.parametrize("auxiliary_hidden_size", [None, 8])
def test_codes_beside_image_files(script, photos, tmp_path, capsys, auxiliary_hidden_size):
    levels = [
        tiny_level(num_symbols=3, auxiliary_hidden_size=auxiliary_hidden_size),
        tiny_level(num_channels=3, auxiliary_hidden_size=auxiliary_hidden_size),
    ]
    pipe = ProgressiveVAEPipeline.from_levels(tiny_prior(grid_size=[4, 4]), levels)
    pipe.save_pretrained(tmp_path / "model")
    flags = ["--num_images", "3", "--num_samples", "2", "--model", str(tmp_path / "model")]
    script.main(["image_codecs", photos, *flags])
    header, _, *rows = capsys.readouterr().out.splitlines()
    column = "preview" if auxiliary_hidden_size else "mean of 2"
    assert header.startswith(f"| bytes, PSNR | {column} | JPEG | WebP |")
    assert [row[:9] for row in rows] == ["| z_1 … z", "| z_1 … z", "| the sma", "| a black"]
    num_bytes = [float(row.split("|")[2].split(",")[0]) for row in rows[:2]]
    assert 0 < num_bytes[0] < num_bytes[1]


@pytest.mark.slow
def test_few_images(script, photos, tmp_path, capsys, monkeypatch):
    rows = {name: script.AUGMENTATIONS[name] for name in ("none", "flip, rotation")}
    monkeypatch.setattr(script, "AUGMENTATIONS", rows)
    path = tmp_path / "recipe.yaml"
    settings = {"hidden_size": 8, "encoder_hidden_size": 8, "num_layers": 1, "codebook_size": 8}
    settings["fit"] = {"train_batch_size": 4}
    path.write_text(yaml.safe_dump({"levels": settings, "level_2": {"downsample": 4}}))
    folder = tmp_path / "runs"
    flags = ["--recipe", str(path), "--output_dir", str(folder), "--minutes", "0.01"]
    script.main(["few_images", photos, "--num_images", "4", *flags])
    *_, none, rotation = capsys.readouterr().out.splitlines()
    bits = [float(row.split("|")[-2]) for row in (none, rotation)]
    assert len(list(folder.iterdir())) == 2 and all(0 < total < 10 for total in bits)


@pytest.mark.slow
def test_quantizers(script, photos, tmp_path, capsys, monkeypatch):
    rows = {name: script.QUANTIZERS[name] for name in ("vq, rotation trick", "bsq")}
    monkeypatch.setattr(script, "QUANTIZERS", rows)
    path = tmp_path / "recipe.yaml"
    level = {"encoder_hidden_size": 8, "auxiliary_hidden_size": 8, "downsample": 4}
    path.write_text(yaml.safe_dump({"level_1": {**level, "encoder_fit": {"train_batch_size": 4}}}))
    flags = ["--recipe", str(path), "--output_dir", str(tmp_path / "runs"), "--minutes", "0.01"]
    script.main(["quantizers", photos, "--codebook_size", "8", "--num_images", "4", *flags])
    *_, rotation, bsq = capsys.readouterr().out.splitlines()
    assert rotation.startswith("| vq, rotation trick | ") and "of 8 |" in rotation
    psnr, used, _, steps = bsq.split(" | ")[1:]
    assert float(psnr) > 0 and used.endswith(" of 8") and int(steps.strip(" |")) > 0


def test_factors(script, photos, tmp_path, capsys):
    levels = [
        tiny_level(num_symbols=3, auxiliary_hidden_size=8),
        tiny_level(num_channels=3, auxiliary_hidden_size=8),
    ]
    pipe = ProgressiveVAEPipeline.from_levels(tiny_prior(grid_size=[4, 4]), levels)
    pipe.save_pretrained(tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "cache")]
    script.main(["factors", photos, *flags])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    names = ["the images", "pixels", "no codes, preview"]
    assert [name for name, *_ in rows] == names + [f"codes from z_{i} on, preview" for i in (2, 1)]
    psnr = {name: float(value) for name, value, _ in rows}
    assert psnr["the images"] > 100 > psnr["pixels"]
    assert len(set(psnr.values())) == len(rows)


def test_speed(script, monkeypatch, capsys):
    monkeypatch.setattr(throughput, "TIMED_SECONDS", 0.02)
    script.main(["speed", "--batch_sizes", "[2,3]"])
    rows = capsys.readouterr().out.splitlines()[2:4]
    assert all(float(cell) > 0 for row in rows for cell in row.split("|")[2:4])
