"""`examples/compress.py`: lossless compression of images of any size into one file."""

import os
import re
import struct
import zlib

import datasets
import numpy as np
import PIL.Image
import PIL.ImageCms
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from helpers.models import AUXILIARY, pipeline_of, tiny_pipeline
from helpers.scripts import load_script

# One pixel of 16 bits a color, which Pillow reads as one of 8.
_CHUNKS = [(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)),
           (b"IDAT", zlib.compress(b"\0" + b"\x12\x34" * 3)), (b"IEND", b"")]  # fmt: skip
DEEP = b"\x89PNG\r\n\x1a\n" + b"".join(
    struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    for kind, data in _CHUNKS
)
SIZES = [(7, 5), (1, 1), (20, 11), (6, 17), (7, 5)]


@pytest.fixture(scope="module")
def script():
    return load_script("compress")


@pytest.fixture
def model(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def folder(tmp_path):
    """Images of several sizes and formats, and files that are left out."""
    rng, folder = np.random.default_rng(0), tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for i, (width, height) in enumerate(SIZES):
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        PIL.Image.fromarray(pixels).save(folder / ("more/" * (i % 2) + f"{i}.png"))
    PIL.Image.fromarray(pixels[..., 0]).save(folder / "gray.png")
    PIL.Image.fromarray(pixels).save(folder / "0.bmp")  # beside 0.png
    PIL.Image.new("RGBA", (3, 3)).save(folder / "glass.png")
    pages = [PIL.Image.new("RGB", (3, 3), (i, 0, 0)) for i in range(2)]
    pages[0].save(folder / "pages.tif", save_all=True, append_images=pages[1:])
    (folder / "deep.png").write_bytes(DEEP)
    (folder / "notes.txt").write_text("no image")
    return folder


def colors(path):
    return np.asarray(PIL.Image.open(path).convert("RGB"))


def test_images_of_any_size_are_restored(script, model, folder, tmp_path, capsys, monkeypatch):
    file, again = tmp_path / "all.parquet", tmp_path / "again"
    words = ["pack", str(folder), str(file), "--model", model, "--pictures_per_part", "2"]
    words += ["--arithmetic", "integer"]
    script.main(words)
    output = capsys.readouterr().out
    assert re.findall("left out (.*?): ", output) == [
        "deep.png", "glass.png", "notes.txt", "pages.tif",
    ]  # fmt: skip
    for reason in ("16 bits a channel", "transparency", "first of 2 frames", "no image"):
        assert reason in output
    assert f"| all.parquet | {file.stat().st_size} |" in output and "| PNG files |" in output
    table = pq.read_table(file)
    streams = sum(len(tile.as_py()) for tiles in table["tiles"] for tile in tiles)
    count = 3 * (sum(width * height for width, height in SIZES) + 2 * 35)
    assert f"| its streams | {streams} | {8 * streams / count:.4f} |" in output
    with pytest.raises(ValueError, match="expected file that does not exist"):
        script.main(words)
    script.main(["unpack", str(file), str(again), "--model", model])
    written = sorted(str(path.relative_to(again)) for path in again.rglob("*.*"))
    names = ["0.bmp.png", "0.png", "2.png", "4.png", "gray.png", "more/1.png", "more/3.png"]
    assert written == names
    for name in names:
        source = folder / name.removesuffix(".png") if "bmp" in name else folder / name
        assert np.array_equal(colors(again / name), colors(source))
    # Existing files are not overwritten, missing ones are written.
    (again / "0.png").unlink()
    (again / "2.png").write_text("mine")
    script.main(["unpack", str(file), str(again), "--model", model])
    assert np.array_equal(colors(again / "0.png"), colors(folder / "0.png"))
    assert (again / "2.png").read_text() == "mine"


def test_pack_resumes_after_an_interruption(script, model, folder, tmp_path, monkeypatch):
    file = tmp_path / "all.parquet"
    words = ["pack", str(folder), str(file), "--model", model, "--pictures_per_part", "3"]
    packed, calls = script.packed, []

    def stops(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return packed(*arguments)

    monkeypatch.setattr(script, "packed", stops)
    with pytest.raises(KeyboardInterrupt):
        script.main(words)
    assert not file.exists()
    with pytest.raises(ValueError, match="expected parts of .*got those of"):
        script.main([*words[:-1], "4"])
    script.main(words)
    assert len(calls) == 5  # four parts, of which one was begun twice
    assert sorted(pq.read_table(file)["name"].to_pylist()) == sorted(
        ["0.bmp", "0.png", "2.png", "4.png", "gray.png", "more/1.png", "more/3.png"]
    )
    assert not list(tmp_path.glob("*.parts")) and not list(tmp_path.glob("*.incomplete"))


def test_palettes_first_images_and_color_profiles(script, model, tmp_path, capsys):
    """A phone's JPEG holds further images beside the first one, as a gain map."""
    rng, folder = np.random.default_rng(0), tmp_path / "images"
    folder.mkdir()
    first, other = (
        PIL.Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)) for _ in range(2)
    )
    first.quantize(4).save(folder / "palette.png")
    first.quantize(4).save(folder / "frame.gif")
    first.save(folder / "phone.jpg", "MPO", save_all=True, append_images=[other])
    profile = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
    first.save(folder / "profile.png", icc_profile=profile)
    first.convert("L").save(folder / "gray.png", icc_profile=profile[:16] + b"GRAY" + profile[20:])
    PIL.Image.new("P", (7, 5)).save(folder / "clear.png", transparency=0)
    with open(os.fsencode(folder) + b"/caf\xe9.png", "wb") as file:
        file.write((folder / "palette.png").read_bytes())
    packed = str(tmp_path / "all.parquet")
    script.main(["pack", str(folder), packed, "--model", model, "--beside_files", "false"])
    output = capsys.readouterr().out
    left_out = dict(re.findall("left out (.*?): (.*)", output))
    assert set(left_out) == {"clear.png", "gray.png", r"caf\udce9.png"}
    assert "profile" in left_out["gray.png"] and "UTF-8" in left_out[r"caf\udce9.png"]
    script.main(["unpack", packed, str(tmp_path / "again"), "--model", model])
    for name in ("palette.png", "frame.gif", "phone.jpg", "profile.png"):
        back = next((tmp_path / "again").glob(f"{name}*"))
        assert np.array_equal(colors(back), colors(folder / name)), name
    assert PIL.Image.open(tmp_path / "again" / "profile.png").info["icc_profile"] == profile


def test_files_of_earlier_versions_and_of_windows(script, model, folder, tmp_path):
    """Names with backslashes are those of folders; tables had no column of color profiles."""
    packed = str(tmp_path / "one.parquet")
    script.main(["pack", str(folder / "0.png"), packed, "--model", model])
    table = pq.read_table(packed)
    assert table["name"].to_pylist() == ["0.png"]
    table = table.set_column(0, "name", pa.array(["sub\\x.png"])).drop_columns(["icc_profile"])
    pq.write_table(table, packed)
    script.main(["unpack", packed, str(tmp_path / "again"), "--model", model])
    assert np.array_equal(colors(tmp_path / "again" / "sub" / "x.png"), colors(folder / "0.png"))


@pytest.mark.parametrize("source", ["~/no/such/folder", "./no", "/no/such"])
def test_a_missing_path_is_not_taken_for_a_dataset_name(script, model, tmp_path, source):
    with pytest.raises(ValueError, match=f"expected source .*got '{source}', which does not exist"):
        script.main(["pack", source, str(tmp_path / "x"), "--model", model])


def test_links_and_stray_tables(script, model, folder, tmp_path, capsys):
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "one").symlink_to(folder / "more")
    (linked / "one" / "circle").symlink_to(linked)
    pq.write_table(pa.table({"x": [1]}), linked / "notes.parquet")
    words = [str(linked), str(tmp_path / "x.parquet"), "--model", model, "--beside_files", "false"]
    script.main(["pack", *words])
    output = capsys.readouterr().out
    assert "| 2 images |" in output and "left out notes.parquet: no image" in output


def test_a_data_set(script, model, tmp_path, capsys):
    data, file = tmp_path / "data", tmp_path / "all.parquet"
    images = [PIL.Image.new("RGB", (7, 5), (i, i, i)) for i in range(3)]
    features = datasets.Features({"photo": datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({"photo": images, "label": [0, 1, 2]}, features)
    data.mkdir()
    table.to_parquet(data / "test.parquet")
    words = ["--model", model, "--max_pictures", "2", "--beside_files", "false"]
    script.main(["pack", str(data), str(file), *words])
    assert "PNG" not in capsys.readouterr().out
    assert pq.read_table(file)["name"].to_pylist() == ["00000000", "00000001"]
    script.main(["unpack", str(file), str(tmp_path / "again"), "--model", model])
    assert (colors(tmp_path / "again" / "00000001.png") == 1).all()


def test_bad_files(script, model, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected images in .*empty, got none"):
        script.main(["pack", str(tmp_path / "empty"), str(tmp_path / "x"), "--model", model])
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"got a table of \['a'\]"):
        script.main(["unpack", str(tmp_path / "other.parquet"), str(tmp_path), "--model", model])
    row = {"name": "../outside", "height": 1, "width": 1, "tiles": [b""]}
    pq.write_table(pa.Table.from_pylist([row], script.SCHEMA), tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match="expected names inside a folder"):
        script.main(
            ["unpack", str(tmp_path / "bad.parquet"), str(tmp_path / "y"), "--model", model]
        )


def test_progressive_decoding(script, folder, tmp_path, capsys):
    pipeline_of(**AUXILIARY).save_pretrained(tmp_path / "model")
    words = [str(folder / "0.png"), str(tmp_path / "out.png"), "--model", str(tmp_path / "model")]
    script.main(["grow", *words])
    lines = capsys.readouterr().out.splitlines()
    sizes = [int(re.search(r": (\d+) bytes", line)[1]) for line in lines]
    assert sizes[0] <= sizes[1] <= sizes[2] and lines[2].endswith("no loss")
    assert {line.split(":")[0] for line in lines} >= {"z_1", "z_1 … z_2", "all", "JPEG", "WebP"}
    image = PIL.Image.open(tmp_path / "out.png")
    assert image.width > image.height
    with pytest.raises(ValueError, match="expected image of"):
        script.main(["grow", str(folder / "notes.txt"), *words[1:]])


def test_join_tiles_inverts_split_tiles(script):
    image = np.random.default_rng(0).integers(0, 256, (11, 20, 3), np.uint8)
    tiles = script.split_tiles(image, (5, 7))
    assert tiles.shape == (9, 3, 5, 7) and tiles.dtype == torch.uint8
    assert np.array_equal(script.join_tiles(tiles, 11, 20), image)
    assert torch.equal(tiles[0], torch.from_numpy(image[:5, :7]).movedim(-1, 0))
