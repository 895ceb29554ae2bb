"""Archives: every file comes back, in any order of damage, interruption and odd names."""

import filecmp
import json
import os
import random
import resource
from io import BytesIO
from pathlib import Path

import filelock
import numpy as np
import PIL.Image
import pytest
import torch

from helpers.archives import differences, pack_folder, stored, unpack_folder, write_samples
from helpers.models import AUXILIARY, pipeline_of, tiny_pipeline
from helpers.odd_files import image, write_odd_folder
from helpers.processes import SERVER
from progressive_vae.codec import archive, codec, packing, tiles
from progressive_vae.codec.container import ArchiveReader, ArchiveWriter
from progressive_vae.codec.exact_image import ExactImage, read_exact_image
from progressive_vae.codec.folder import (
    JOURNAL,
    LOCK,
    UNPACK_FILES,
    safe_name,
    sources_of_folder,
)

HEADER_BYTES = 1000
SIZE = (5, 7)  # of a tile


@pytest.fixture(scope="module")
def stack():
    return tiny_pipeline().stack


@pytest.fixture(scope="module")
def gray_stack():
    return tiny_pipeline(num_channels=1).stack


@pytest.fixture(scope="module")
def odd(tmp_path_factory, stack):
    """A folder, its archive and what `pack` did."""
    place = tmp_path_factory.mktemp("odd")
    write_odd_folder(place / "folder")
    result = pack_folder(stack, place / "folder", place / "archive", arithmetic="float")
    return place, result


def test_every_file_comes_back(odd, stack, tmp_path):
    place, packing = odd
    unpacking = unpack_folder(stack, place / "archive", tmp_path)
    assert not unpacking.failed and not unpacking.differing
    assert differences(place / "folder", tmp_path) == []
    assert {name for name, _ in packing.absent} == {
        "names/circle", "names/nowhere", "names/pipe",
    } == {name for name, _ in unpacking.absent}  # fmt: skip
    mode = (tmp_path / "others" / "notes.txt").stat()
    original = (place / "folder" / "others" / "notes.txt").stat()
    assert mode.st_mode == original.st_mode and abs(mode.st_mtime - original.st_mtime) < 0.002
    assert (tmp_path / "empty_folder" / "inside").is_dir()
    # Once more: nothing is written.
    again = unpack_folder(stack, place / "archive", tmp_path)
    assert (again.written, again.unchanged) == (0, unpacking.written)


def test_an_archive_is_not_larger_than_its_folder(odd):
    place, _ = odd
    sources = [*sources_of_folder(place / "folder", set())]
    names = sum(len(os.fsencode(source.name)) for source in sources)
    limit = sum(source.size for source in sources) + 100 * len(sources) + HEADER_BYTES + names
    assert (place / "archive").stat().st_size < limit


def test_each_file_has_a_reason(odd):
    place, _ = odd
    rows = stored(place / "archive")
    reasons = {name.rpartition("/")[2]: (row.method, row.reason) for name, row in rows.items()}
    assert all(reason for _, reason in reasons.values())
    for name, word in {
        "deep.png": "8 bits", "deep_colors.png": "16 bits", "deep.ppm": "PPM", "deep.tif": "bits",
        "palette.png": "palette", "clear.png": "palette", "alpha.png": "alpha",
        "gray_alpha.png": "alpha", "fax.png": "one bit", "animation.gif": "GIF",
        "animation.png": "3 images", "pages.tif": "3 images", "phone.jpg": "MPO",
        "cut.tif": "no image", "cut.png": "damaged", "longer.png": "behind the end",
        "print.jpg": "JPEG", "icon.ico": "ICO", "notes.txt": "no image",
        "a.bmp": "another file", "n" * 250 + ".bmp": "too long",
    }.items():  # fmt: skip
        method, reason = reasons[name]
        assert method in (archive.PLAIN, archive.ZSTD) and word in reason, (name, reason)
    assert reasons["turned.png"][0] == archive.PNG


def test_gray_images_by_a_color_model_and_the_reverse(stack, gray_stack, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    rng = np.random.default_rng(0)
    gray = image(rng, 20, 20, "L")
    for name, picture in {"l.png": gray, "rgb.png": gray.convert("RGB")}.items():
        picture.save(folder / name, compress_level=0)
    image(rng, 20, 20).save(folder / "colors.png", compress_level=0)
    for model, name in ((stack, "by_color"), (gray_stack, "by_gray")):
        pack_folder(model, folder, tmp_path / name)
        rows = stored(tmp_path / name)
        unpack_folder(model, tmp_path / name, tmp_path / f"{name}_back")
        assert differences(folder, tmp_path / f"{name}_back") == []
        assert rows["l.png"].method == rows["rgb.png"].method == archive.PNG
    assert "gray" in rows["colors.png"].reason


# ---- tiles ---------------------------------------------------------------------------------------


def test_simple_tiles_are_short():
    pixels = np.full((10, 21, 3), 9, np.uint8)
    rng = np.random.default_rng(0)
    pixels[:5, :7] = rng.integers(0, 256, (5, 7, 3))
    pixels[5:, 7:14] = pixels[:5, :7]
    codes, places = tiles.simple_codes(pixels, SIZE)
    kinds = [code.kind for code in codes]
    assert kinds == [tiles.PIXELS, *[tiles.CONSTANT] * 3, tiles.REPEAT, tiles.CONSTANT]
    assert places == [0]
    lengths = [len(code.to_bytes()) for code in codes]
    assert lengths == [2 + 105, 4, 4, 4, 1, 4]
    board = np.zeros((64, 64, 3), np.uint8)
    board[::2, ::2] = board[1::2, 1::2] = 255
    codes, places = tiles.simple_codes(board, (64, 64))
    assert len(codes[0].to_bytes()) < board.size / 100 and places == []


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (11, 20), (6, 17), (5, 14)])
def test_images_to_bytes_and_back(size):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 3, (*size, 3), np.uint8) * 100
    pixels[:5, :7] = 7
    exact = ExactImage(pixels, b"before", b"")
    data = tiles.image_to_bytes(exact, tiles.simple_codes(pixels, SIZE)[0])
    checksum, header, codes = tiles.image_from_bytes(data, SIZE)
    assert np.array_equal(tiles.join_tiles(header, codes, {}, (3, *SIZE)), pixels)
    assert header.checksum(pixels) == checksum and header.before == b"before"
    for end in range(len(data)):
        with pytest.raises(ValueError, match="expected"):
            tiles.image_from_bytes(data[:end], SIZE)


def test_streams_that_are_not_decoded_are_stored_as_pixels(stack, tmp_path, monkeypatch):
    write_samples(tmp_path / "folder", 2)
    decode = codec.decode_batch

    def wrong(*arguments, **options):
        pixels, errors = decode(*arguments, **options)
        pixels[0] ^= 1
        return pixels, errors

    monkeypatch.setattr(codec, "decode_batch", wrong)
    result = pack_folder(stack, tmp_path / "folder", tmp_path / "archive")
    assert result.num_wrong == 1
    monkeypatch.undo()
    unpack_folder(stack, tmp_path / "archive", tmp_path / "back")
    assert differences(tmp_path / "folder", tmp_path / "back") == []


# ---- interruptions -------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch, owner, name: str, count: int) -> list[int]:
    """Let the call number `count` of a function raise `Interrupted`; return the sizes of its
    second arguments so far."""
    function = getattr(owner, name)
    sizes: list[int] = []

    def stops(first, second, *more, **options):
        if len(sizes) == count:
            raise Interrupted
        sizes.append(len(second) if hasattr(second, "__len__") else 1)
        return function(first, second, *more, **options)

    monkeypatch.setattr(owner, name, stops)
    return sizes


def test_pack_and_unpack_continue(stack, tmp_path, monkeypatch):
    """No batch of the model is computed twice: in the second part, and inside an image."""
    folder = tmp_path / "folder"
    write_samples(folder, 3, 3, 4)
    monkeypatch.setattr(packing, "PART_TILES", 12)
    monkeypatch.setattr(codec, "MAX_IMAGES", 8)
    options = {"verify": False, "arithmetic": "float"}
    counts: list[int] = []
    pack_folder(stack, folder, tmp_path / "expected", progress=counts.append, **options)
    assert sum(counts) == sum(path.stat().st_size for path in folder.iterdir())
    assert min(counts) >= 0 and len(counts) > 4  # also inside a part
    total = 0
    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            sizes = interrupt_after(patch, codec, "encode_batch", 2)
            pack_folder(stack, folder, tmp_path / "archive", **options)
        total += sum(sizes)
    with monkeypatch.context() as patch:
        sizes = interrupt_after(patch, codec, "encode_batch", 99)
        pack_folder(stack, folder, tmp_path / "archive", **options)
    assert total + sum(sizes) == 36
    assert (tmp_path / "archive").read_bytes() == (tmp_path / "expected").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        sizes = interrupt_after(patch, codec, "decode_batch", 3)
        unpack_folder(stack, tmp_path / "archive", tmp_path / "back")
    with monkeypatch.context() as patch:
        more = interrupt_after(patch, codec, "decode_batch", 99)
        unpack_folder(stack, tmp_path / "archive", tmp_path / "back")
    assert sum(sizes) + sum(more) == 36
    assert differences(folder, tmp_path / "back") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "archive", "back", "expected", "folder",
    ]  # fmt: skip


@pytest.mark.parametrize("change", ["contents", "new", "gone"])
def test_a_source_that_changed_is_seen(stack, tmp_path, monkeypatch, change):
    folder = tmp_path / "folder"
    write_samples(folder, 4)
    monkeypatch.setattr(packing, "PART_FILES", 2)
    interrupt_after(monkeypatch, packing, "_encode_images", 1)
    with pytest.raises(Interrupted):
        pack_folder(stack, folder, tmp_path / "archive")
    monkeypatch.undo()
    if change == "contents":
        (folder / "0.png").write_bytes(b"other contents")
    elif change == "new":
        (folder / "00.png").write_bytes(b"new")
    else:
        (folder / "1.png").unlink()
    with pytest.raises(ValueError, match=r"archive.partial was begun, got others: '\d.png'"):
        pack_folder(stack, folder, tmp_path / "archive")
    other = tiny_pipeline()
    other.level_2.decoder.stem.weight.data.mul_(1.5)
    with pytest.raises(ValueError, match="archive.partial with weights .* delete it"):
        pack_folder(other.stack, folder, tmp_path / "archive")


def test_large_files_are_stored_in_chunks(stack, tmp_path, monkeypatch):
    for name, value in {"CHUNK": 1000, "MAX_IMAGE_FILE": 3000, "PART_BYTES": 2000}.items():
        monkeypatch.setattr(packing, name, value)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "large").write_bytes(random.Random(0).randbytes(7500))
    (folder / "text").write_text("large " * 2000)
    (folder / "small").write_text("small")
    pack_folder(stack, folder, tmp_path / "expected")
    with ArchiveReader(tmp_path / "expected") as reader:
        assert len(reader.parts) > 5
    append = ArchiveWriter.append
    interrupt_after(monkeypatch, ArchiveWriter, "append", 3)
    with pytest.raises(Interrupted):
        pack_folder(stack, folder, tmp_path / "archive")
    monkeypatch.setattr(ArchiveWriter, "append", append)
    pack_folder(stack, folder, tmp_path / "archive")
    assert (tmp_path / "archive").read_bytes() == (tmp_path / "expected").read_bytes()
    # What an interruption leaves of a file is written again.
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, archive.Restoring, "chunk", 4)
        unpack_folder(stack, tmp_path / "archive", tmp_path / "back")
    assert [path.name for path in (tmp_path / "back").iterdir()] == [archive.TEMPORARY]
    result = unpack_folder(stack, tmp_path / "archive", tmp_path / "back")
    assert result.written == 3 and differences(folder, tmp_path / "back") == []
    assert len([*(tmp_path / "back").iterdir()]) == 3
    # A wrong byte of a chunk costs the file, of which nothing is left behind.
    data = bytearray((tmp_path / "archive").read_bytes())
    data[data.index((folder / "large").read_bytes()[3000:3900])] ^= 1
    (tmp_path / "damaged").write_bytes(data)
    result = unpack_folder(stack, tmp_path / "damaged", tmp_path / "other")
    assert result.failed == [("large", "its bytes are damaged")] and result.written == 2
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == ["small", "text"]


# ---- trust ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noise(tmp_path_factory, stack):
    """Six images in an archive."""
    place = tmp_path_factory.mktemp("noise")
    write_samples(place / "folder", 6)
    pack_folder(stack, place / "folder", place / "archive", arithmetic="float")
    return place


def test_a_wrong_bit_costs_one_image(noise, stack, tmp_path):
    data = bytearray((noise / "archive").read_bytes())
    with ArchiveReader(noise / "archive") as reader:
        files = [file for part in archive.stored_files(reader) for file in part]
    row, start = files[2]
    data[start + row.length - 10] ^= 1
    (tmp_path / "damaged").write_bytes(data)
    result = unpack_folder(stack, tmp_path / "damaged", tmp_path / "back")
    assert [name for name, _ in result.failed] == ["2.png"] and result.written == 5
    assert "arithmetic integer" in result.failed[0][1]  # what helps, if it is the arithmetic
    missing = [line for line in differences(noise / "folder", tmp_path / "back")]
    assert missing == ["2.png is missing"]


def test_cut_and_damaged_tables(noise, stack, tmp_path):
    data = (noise / "archive").read_bytes()
    with ArchiveReader(noise / "archive") as reader:
        start, stop = reader.parts[0].start, reader.parts[0].stop
    for name, damaged, failed in (
        ("table", data[: start - 9] + b"?" + data[start - 8 :], set()),
        ("index", data[: stop + 40] + b"?" + data[stop + 41 :], {"archive"}),
        ("without_index", data[:stop], {"archive"}),
        ("cut", data[: stop - 10], {"archive", "5.png"}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "archive").write_bytes(damaged)
        result = unpack_folder(stack, tmp_path / name / "archive", tmp_path / name / "back")
        assert {Path(name).name for name, _ in result.failed} == failed, name
        assert result.written == 6 - len(failed - {"archive"})
    for other in (b"", b"PK\3\4" * 50, data[:5]):
        (tmp_path / "other").write_bytes(other)
        with pytest.raises(ValueError, match="expected an archive in .*other"):
            unpack_folder(stack, tmp_path / "other", tmp_path / "back")


def test_another_model_is_named(noise, gray_stack, tmp_path):
    with pytest.raises(ValueError, match="expected the model of .*archive, 'tiny' with weights"):
        unpack_folder(gray_stack, noise / "archive", tmp_path)
    with ArchiveReader(noise / "archive") as reader:
        header = reader.header
    assert header["torch"] == torch.__version__ and header["processor"] == archive.processor()
    assert len(header["weights"]) == 32 and header["arithmetic"] == "float"


def test_files_that_exist_are_never_overwritten(noise, stack, tmp_path):
    (tmp_path / "0.png").write_text("mine")
    (tmp_path / "1.png").write_bytes((noise / "folder" / "1.png").read_bytes())
    result = unpack_folder(stack, noise / "archive", tmp_path)
    assert (result.written, result.unchanged, result.differing) == (4, 1, ["0.png"])
    assert (tmp_path / "0.png").read_text() == "mine"


def test_one_name_and_previews(tmp_path):
    pipe = pipeline_of(**AUXILIARY)
    stack = pipe.stack
    write_samples(tmp_path / "folder", 3, pipe=pipe)
    (tmp_path / "folder" / "notes.txt").write_text("no preview")
    pack_folder(stack, tmp_path / "folder", tmp_path / "archive")
    result = unpack_folder(stack, tmp_path / "archive", tmp_path / "one", only="1.png")
    assert result.written == 1 and [path.name for path in (tmp_path / "one").iterdir()] == ["1.png"]
    result = unpack_folder(stack, tmp_path / "archive", tmp_path / "previews", num_levels=1)
    assert (result.written, result.skipped) == (3, 1)
    original, preview = (
        np.asarray(PIL.Image.open(tmp_path / name / "1.png")) for name in ("folder", "previews")
    )
    assert original.shape == preview.shape and not np.array_equal(original, preview)
    assert archive.unpack(stack, tmp_path / "archive", None).written == 4  # decoded, not written


def test_what_unpack_is_asked_for_has_to_exist(noise, stack, tmp_path):
    for name in ("9.png", "[0].png"):
        with pytest.raises(ValueError, match="expected only to select files"):
            unpack_folder(stack, noise / "archive", tmp_path / "none", only=name)
    for k in (0, -1, 9):
        with pytest.raises(ValueError, match="expected num_levels"):
            unpack_folder(stack, noise / "archive", tmp_path / "none", num_levels=k)
    assert not [*(tmp_path / "none").iterdir()]


def test_brackets_in_names_are_not_patterns(stack, tmp_path):
    folder = tmp_path / "folder" / "summer [2020]"
    folder.mkdir(parents=True)
    for i in range(2):
        (folder / f"{i}.txt").write_text(f"{i}")
    pack_folder(stack, tmp_path / "folder", tmp_path / "archive")
    only = "summer [2020]/*"
    assert unpack_folder(stack, tmp_path / "archive", tmp_path / "back", only=only).written == 2


def test_one_process_at_a_time_unpacks_into_a_folder(noise, stack, tmp_path):
    folder = tmp_path / "back"
    folder.mkdir()
    lock = filelock.FileLock(folder / LOCK, is_singleton=False)
    with lock, pytest.raises(ValueError, match="expected no other process that unpacks"):
        unpack_folder(stack, noise / "archive", folder)
    assert unpack_folder(stack, noise / "archive", folder).written == 6
    assert differences(noise / "folder", folder) == []


def test_files_of_an_interrupted_unpacking_are_named(stack, tmp_path):
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    for name in (*UNPACK_FILES, f"inner/{JOURNAL}"):
        (folder / name).write_text("mine")
    result = pack_folder(stack, folder, tmp_path / "archive")
    assert sorted(name for name, _ in result.absent) == sorted(UNPACK_FILES)
    assert unpack_folder(stack, tmp_path / "archive", tmp_path / "back").written == 1


@pytest.mark.parametrize("suffix", [".partial", ".journal"])
def test_foreign_files_are_not_deleted(stack, tmp_path, suffix):
    write_samples(tmp_path / "folder", 1)
    foreign = tmp_path / f"archive{suffix}"
    foreign.write_text("mine, not a part of an archive")
    with pytest.raises(ValueError, match="of an interrupted run, got another file"):
        pack_folder(stack, tmp_path / "folder", tmp_path / "archive")
    assert foreign.read_text().startswith("mine")


def pack_large_file(place: Path):
    """In a process of its own, whose memory is measured."""
    stack = tiny_pipeline().stack
    for function, source, target in (
        (pack_folder, "folder", "archive"), (unpack_folder, "archive", "back"),
    ):  # fmt: skip
        function(stack, place / source, place / target)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (place / "memory").write_text(f"{memory / 2**20} GiB")


@pytest.mark.slow
def test_archives_of_more_than_two_gib_in_less_than_one(tmp_path):
    folder = tmp_path / "folder"
    write_samples(folder, 2)
    with open(folder / "0_random", "wb") as file:
        for _ in range(2200):
            file.write(os.urandom(2**20))
    with open(folder / "0_sparse", "wb") as file:
        file.truncate(3 * 2**30)
    process = SERVER.Process(target=pack_large_file, args=(tmp_path,))
    process.start()
    process.join()
    assert (tmp_path / "archive").stat().st_size > 2**31
    memory = (tmp_path / "memory").read_text()
    assert float(memory.split()[0]) < 1, memory
    names = sorted(path.name for path in folder.iterdir())
    _, wrong, missing = filecmp.cmpfiles(folder, tmp_path / "back", names, shallow=False)
    assert wrong == ["0.png", "1.png"] and not missing  # the bytes of PNG files differ
    print(memory)


# ---- names ---------------------------------------------------------------------------------------


def test_hostile_names_and_values_are_refused(stack, tmp_path):
    names = ["/etc/x", "../x", "a/../../x", "", ".", "a//b", "a\0b", "link/x", "fine"]
    entries = [archive.Entry(name, archive.PLAIN, 5, 1, 0, 0, 0o4777, None, "") for name in names]
    data = (b"\x83\xdc\xef\xb7" + b"1") * len(names)  # the CRC-32 of "1"
    header = archive.header_of(stack, "tiny", "integer")
    with ArchiveWriter(tmp_path / "archive", header, ()) as writer:
        writer.append(archive.to_table(entries), data)
        writer.finish()
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "link").symlink_to(tmp_path)
    result = unpack_folder(stack, tmp_path / "archive", tmp_path / "back")
    assert [name for name, _ in result.failed] == names[:-1] and result.written == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "back"]
    assert (tmp_path / "back" / "fine").stat().st_mode & 0o7000 == 0
    for table in ([[1]], [["a"]] * 9, [["a"], ["file"], [9**9], [1], [0], [0], [0], [None], [""]]):
        (tmp_path / "bad").unlink(missing_ok=True)
        with ArchiveWriter(tmp_path / "bad", header, ()) as writer:
            writer.append(table, b"")
            writer.finish()
        with pytest.raises(ValueError, match="expected "):
            unpack_folder(stack, tmp_path / "bad", tmp_path / "back")


def test_names_on_windows():
    names = ["CON", "aux.txt", "a:b", "what?", "end.", "end ", "a\\b", "50%", "caf\udce9", "nul/x"]
    safe = [safe_name(name, is_windows=True) for name in names]
    assert safe == [
        "%43ON", "%61ux.txt", "a%3Ab", "what%3F", "end%2E", "end%20", "a%5Cb", "50%25", "caf%E9",
        "%6Eul/x",
    ]  # fmt: skip
    assert [safe_name(name, is_windows=False) for name in names] == names


def test_unreadable_files_and_folders_are_named(stack, tmp_path, monkeypatch):
    write_samples(tmp_path / "folder", 2)
    write_samples(tmp_path / "folder" / "locked", 2)
    scandir = os.scandir

    def locked(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    result = pack_folder(stack, tmp_path / "folder", tmp_path / "archive")
    assert result.absent == [("locked", "Permission denied")]
    assert json.dumps(dict(enumerate(result.absent)))


def test_exact_images_keep_their_metadata(tmp_path):
    write_odd_folder(tmp_path / "folder")
    source = tmp_path / "folder" / "images" / "turned.png"
    (tmp_path / "back.png").write_bytes(read_exact_image(source.read_bytes()).to_png())
    with PIL.Image.open(source) as expected, PIL.Image.open(tmp_path / "back.png") as actual:
        for opened in (expected, actual):
            opened.load()
        assert actual.info == expected.info and actual.size == expected.size
        assert actual.getexif()[274] == 6 and actual.text == {"Title": "turned"}


def test_exact_bmp_images():
    for mode in ("L", "RGB"):
        image = PIL.Image.effect_noise((5, 3), 64).convert(mode)
        image.save(buffer := BytesIO(), "BMP")
        contents = bytearray(buffer.getvalue())
        exact = read_exact_image(bytes(contents)).pixels
        assert np.array_equal(exact.squeeze(), np.asarray(image))
        place = int.from_bytes(contents[10:14], "little")
        contents[10:14] = (place + 8).to_bytes(4, "little")
        contents[place:place] = bytes(8)  # before the pixels
        with pytest.raises(ValueError, match="or data before its pixels"):
            read_exact_image(bytes(contents))


def test_exact_tiff_images():
    image = PIL.Image.fromarray(np.arange(200, dtype=np.uint8).reshape(10, 20))

    def contents(**options) -> bytes:
        image.save(buffer := BytesIO(), "TIFF", **options)
        return buffer.getvalue()

    for options, resolution in (({}, None), ({"dpi": (300, 300)}, 300)):
        exact = read_exact_image(contents(**options))
        assert np.array_equal(exact.pixels[..., 0], np.asarray(image))
        info = PIL.Image.open(BytesIO(exact.to_png())).info
        assert info.get("dpi", (None,))[0] == pytest.approx(resolution, abs=0.01)
    with pytest.raises(ValueError, match="other than unsigned 8 bits"):
        read_exact_image(contents(tiffinfo={339: (2,)}))  # signed
