"""The script that makes the sprites, on a few tiles."""

import re

import datasets
import numpy as np
import PIL.Image

from helpers.scripts import load_script


def write_tile(path, color, size=(32, 32), num_rows=16):
    pixels = np.zeros((*size[::-1], 4), np.uint8)
    pixels[:num_rows] = (*color, 255)
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels).save(path)


def test_sprites_of_a_few_tiles(tmp_path, capsys):
    script = load_script("prepare_sprites")
    test_name = next(
        line for line in script.TEST_NAMES.read_text().splitlines() if line.startswith("monster: ")
    ).removeprefix("monster: ")
    tiles = tmp_path / "rltiles"
    for i, color in enumerate([(255, 0, 0), (0, 255, 0), (0, 255, 0)]):  # the last is a duplicate
        write_tile(tiles / "mon" / "animals" / f"{test_name.replace(' ', '_')}{i}.png", color)
    write_tile(tiles / "mon" / "unique" / "boris_2.png", (0, 0, 255))
    write_tile(tiles / "dngn" / "wall" / "brick_dark_2_11.png", (9, 9, 9))
    write_tile(tiles / "mon" / "tentacles" / "ends" / "kraken.png", (1, 2, 3))  # a piece
    write_tile(tiles / "item" / "large.png", (1, 2, 3), size=(32, 48))
    write_tile(tiles / "item" / "empty.png", (1, 2, 3), num_rows=1)
    write_tile(tiles / "player" / "hair" / "long.png", (1, 2, 3))  # no class
    script.main([str(tmp_path / "sprites"), "--tiles", str(tiles)])
    sprites = datasets.load_dataset(str(tmp_path / "sprites"), cache_dir=str(tmp_path / "cache"))
    assert [*sprites["test"]["name"]] == 2 * [re.sub(r"\d", "", test_name)]
    labels = sprites["train"].features["label"].int2str(sprites["train"]["label"])
    assert {*zip(labels, sprites["train"]["name"], strict=True)} == {
        ("character", "boris"),
        ("wall", "brick dark"),
    }
    script.main([str(tmp_path / "held_out"), "--validation", "--tiles", str(tiles)])
    held_out = datasets.load_dataset(str(tmp_path / "held_out"), cache_dir=str(tmp_path / "cache"))
    assert [*held_out["validation"]["name"], *held_out["train"]["name"]] == ["boris", "brick dark"]
    assert len(held_out["test"]) == 2
    pixels = np.asarray(sprites["test"][0]["image"])
    assert pixels.shape == (32, 32, 3)
    assert (pixels[:16] == (255, 0, 0)).all() and (pixels[16:] == 255).all()
    assert "test: 2 (" in capsys.readouterr().out
    assert "CC0" in (tmp_path / "sprites" / "README.md").read_text()
