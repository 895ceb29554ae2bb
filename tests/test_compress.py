"""`examples/compress.py`: a folder or a dataset in one archive, and what the script prints."""

import re

import datasets
import numpy as np
import PIL.Image
import pytest

from helpers.archives import differences, write_samples
from helpers.models import AUXILIARY, pipeline_of, tiny_pipeline
from helpers.scripts import load_script


@pytest.fixture(scope="module")
def script():
    return load_script("compress")


@pytest.fixture(scope="module")
def place(tmp_path_factory, script):
    """A model, a folder, and its archive."""
    place = tmp_path_factory.mktemp("place")
    tiny_pipeline().save_pretrained(place / "model")
    write_samples(place / "folder", 3)
    (place / "folder" / "notes.txt").write_text("no image " * 9)
    (place / "folder" / "gone").symlink_to("/no/such/file")
    return place


@pytest.fixture(scope="module")
def packed(place, script):
    words = ["pack", str(place / "folder"), str(place / "all.pvae"), "--arithmetic", "float"]
    script.main([*words, "--model", str(place / "model")])
    return str(place / "all.pvae")


def test_pack_prints_sizes_and_reasons(script, place, capsys):
    file = place / "printed.pvae"
    words = ["pack", str(place / "folder"), str(file), "--model", str(place / "model")]
    script.main(words)
    output = capsys.readouterr().out
    assert "arithmetic integer: any CPU reads it" in output
    assert "3 as png: streams are shorter than its file" in output
    assert "not in the archive: gone: a link to nothing" in output
    sizes = {name: int(size) for name, size in re.findall(r"\| (.+?) \| (\d+) \|", output)}
    paths = [path for path in (place / "folder").iterdir() if path.is_file()]
    assert sizes["the folder"] == sum(path.stat().st_size for path in paths)
    assert sizes["printed.pvae"] == file.stat().st_size and {"PNG", "WebP"} < {*sizes}
    assert sizes["WebP"] < sizes["the folder"]
    with pytest.raises(ValueError, match="expected a file that does not exist yet, got"):
        script.main(words)


def test_unpack_contents_and_verify(script, place, packed, tmp_path, capsys):
    model = ["--model", str(place / "model")]
    script.main(["contents", packed])
    output = capsys.readouterr().out
    assert "arithmetic float" in output and f"model {place / 'model'}" in output
    assert re.search(r"of 81 bytes, zstd: notes.txt: no image that Pillow can read", output)
    script.main(["verify", packed, *model])
    assert "decoded 4 files" in capsys.readouterr().out
    script.main(["unpack", packed, str(tmp_path), *model, "--only", "*.png"])
    script.main(["unpack", packed, str(tmp_path), *model])
    assert "wrote 1 files to" in capsys.readouterr().out
    assert differences(place / "folder", tmp_path) == []


def test_damage_is_an_error_that_names_the_file(script, place, packed, tmp_path, capsys):
    with open(packed, "rb") as file:
        data = bytearray(file.read())
    with script.ArchiveReader(packed) as reader:
        (part,) = reader.parts
    data[part.stop - 5] ^= 1  # of the last file
    (tmp_path / "damaged").write_bytes(data)
    words = ["unpack", str(tmp_path / "damaged"), str(tmp_path / "back")]
    with pytest.raises(ValueError, match="got 1 that failed: notes.txt"):
        script.main([*words, "--model", str(place / "model")])
    assert "wrote 3 files" in capsys.readouterr().out
    with pytest.raises(ValueError, match="expected the model of .* with weights"):
        script.main(words)  # the default model


def test_a_dataset(script, place, tmp_path, capsys):
    data = tmp_path / "data"
    images = [PIL.Image.new("RGB", (7, 5), (i, i, i)) for i in range(3)]
    features = datasets.Features({"photo": datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({"photo": images, "label": [0, 1, 2]}, features)
    data.mkdir()
    table.to_parquet(data / "test.parquet")
    words = ["--model", str(place / "model"), "--max_files", "2", "--beside_files", "false"]
    script.main(["pack", str(data), str(tmp_path / "all.pvae"), "--split", "test", *words])
    assert "PNG" not in capsys.readouterr().out
    script.main(["unpack", str(tmp_path / "all.pvae"), str(tmp_path / "again"), *words[:2]])
    names = sorted(path.name for path in (tmp_path / "again").iterdir())
    assert len(names) == 2 and names[1].startswith("00000001")
    assert (np.asarray(PIL.Image.open(tmp_path / "again" / names[1])) == 1).all()


@pytest.mark.parametrize("source", ["~/no/such/folder", "./no", "/no/such"])
def test_a_missing_path_is_an_error(script, tmp_path, source):
    with pytest.raises(ValueError, match=f"expected source .*got '{source}', which does not exist"):
        script.main(["pack", source, str(tmp_path / "x")])


def test_no_archive(script, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected files in .*empty, got none"):
        script.main(["pack", str(tmp_path / "empty"), str(tmp_path / "x")])
    (tmp_path / "other").write_text("no archive")
    for words in (["contents"], ["verify"], ["unpack", str(tmp_path / "back")]):
        with pytest.raises(ValueError, match="expected an archive in .*other"):
            script.main([words[0], str(tmp_path / "other"), *words[1:]])


def test_progressive_decoding(script, place, tmp_path, capsys):
    pipeline_of(**AUXILIARY).save_pretrained(tmp_path / "model")
    image = place / "folder" / "0.png"
    words = [str(image), str(tmp_path / "out.png"), "--model", str(tmp_path / "model")]
    script.main(["grow", *words])
    lines = capsys.readouterr().out.splitlines()
    sizes = [int(re.search(r": (\d+) bytes", line)[1]) for line in lines]
    assert sizes[0] <= sizes[1] <= sizes[2] <= sizes[3] and lines[3].endswith("no loss")
    names = {line.split(":")[0] for line in lines}
    assert names >= {"z_1", "z_1 … z_2", "half of s", "all", "JPEG", "WebP"}
    image = PIL.Image.open(tmp_path / "out.png")
    assert image.width > image.height
    with pytest.raises(ValueError, match="expected image of"):
        script.main(["grow", str(place / "folder" / "notes.txt"), *words[1:]])
